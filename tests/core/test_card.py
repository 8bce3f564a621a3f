"""The card of a critic: identities of its figures, and the files it reads."""

import gzip
import json
import random
import re

import pytest
from annotating import annotated
from forking import output, refusal, result_of
from hypothesis import given
from hypothesis import strategies as st
from toys import noisy_examples

from t2g.card import SIGNS, card, flat
from t2g.feedback import Feedback, quoted
from t2g.notes import write_whole
from t2g.tasks import toy

TEXT = "Ana is 27, lives in Porto."


def record(response, feedback, **more):
    return {"prompt": "Who?", "response": response, "feedback": feedback, **more}


def toy_records(count, seed=0):
    """Noisy summaries with the rule's feedback, and the kinds of its poor quotes."""
    records = []
    for example, text in noisy_examples(random.Random(seed), count):
        records.append(record(text, toy.critique(example, text), kinds=toy.kinds(example, text)))
    return records


def imperfect(records, seed=0):
    """A critic that leaves out half of the quotes and calls some good ones poor."""
    rng, feedback = random.Random(seed), []
    for truth in (row["feedback"].plain() for row in records):
        good = [quote for quote in truth.good if rng.random() < 0.5]
        poor = [quote for quote in truth.poor if rng.random() < 0.5]
        wrong = [quote for quote in truth.good if rng.random() < 0.1]
        feedback.append(Feedback(truth.critique, good, poor + wrong))
    return feedback


def three(figures):
    return figures["precision"], figures["recall"], figures["f1"]


def test_a_critic_that_repeats_the_truth_has_all_ones_and_invents_nothing(tok):
    records = toy_records(12)
    result = card(records, [row["feedback"] for row in records], tok)
    figures = [*flat(result).items(), *flat(result["intervals"]).items()]
    ones = [value for name, value in figures if name.endswith(("precision", "recall", "f1"))]
    assert len(ones) > 18 and all(one in (1, [1, 1]) for one in ones)
    assert result["json_valid"] == result["verbatim"] == 1
    for name in ("invented", "normalised", "fuzzy", "truth_invented"):
        assert result[name] == 0


@pytest.mark.parametrize(("feedback", "valid"), [(Feedback("Nothing to say."), 1), (None, 0)])
def test_a_critic_that_marks_nothing_has_no_recall_and_no_interval_of_precision(feedback, valid):
    result = card(toy_records(12), [feedback] * 12)
    assert result["json_valid"] == valid
    assert result["invented"] == 0 and result["intervals"]["invented"] is None
    for sign in SIGNS:
        assert three(result[sign]) == (0, 0, 0)
        assert three(result["intervals"][sign]) == (None, [0, 0], [0, 0])


def card_of(texts):
    """The card of texts of different words, from the signs that truth and critic give each."""

    def marked(signs):
        words = {1: [], -1: [], 0: []}
        for i, sign in enumerate(signs):
            words[sign].append(f"word{i}")
        return Feedback("So it is.", words[1], words[-1])

    records, feedback = [], []
    for text in texts:
        truth, critic = zip(*text)
        response = " ".join(f"word{i}" for i in range(len(text)))
        records.append(record(response, marked(truth)))
        feedback.append(marked(critic))
    return card(records, feedback)


signs = st.sampled_from([-1, 0, 1])
words = st.lists(st.tuples(signs, signs), min_size=1, max_size=12)


@given(st.lists(words, min_size=1, max_size=4))
def test_good_changes_places_with_poor_and_precision_with_recall(texts):
    """Once good and poor are swapped, and once the truth and the critic."""
    result = card_of(texts)
    signs_swapped = card_of([[(-truth, -critic) for truth, critic in text] for text in texts])
    sides_swapped = card_of([[(critic, truth) for truth, critic in text] for text in texts])
    for one, two in (("good", "poor"), ("poor", "good")):
        assert result[one] == signs_swapped[two]
        assert result["intervals"][one] == signs_swapped["intervals"][two]
        precision, recall, f1 = three(result[one])
        assert three(sides_swapped[one]) == (recall, precision, f1)


def test_words_of_one_response_counted_by_hand():
    """Ana | is | 27 | , | lives | in | Porto | . : one of three good words is good."""
    truth = Feedback("No.", [" Porto"], [" 27"])
    critic = Feedback("It is not 27.", ["lives in Porto"], ["27"])
    result = card([record(TEXT, truth)], [critic])
    assert three(result["good"]) == (1 / 3, 1, 1 / 2) and three(result["poor"]) == (1, 1, 1)
    assert result["kinds"] == {} and result["responses"] == 1


def test_words_and_kinds_of_repeated_quotes_count_where_they_stand():
    text = "the cat saw the dog and the dog saw the bird"
    cat, bird = (record(text, Feedback("c", poor=[f"the {x}"])) for x in ("cat", "bird"))
    assert three(card([cat], [bird["feedback"]])["poor"]) == (0, 0, 0), "one word, two places"
    twice = record(text, Feedback("c", poor=["the dog"] * 2))
    assert three(card([twice], [Feedback("c", poor=["the dog"])])["poor"]) == (1, 1 / 2, 2 / 3)
    feedback = Feedback("c", poor=["so", "so", "London"])
    truth = record("so it is, so it was", feedback, kinds=["first", "second", "nowhere"])
    kinds = card([truth], [Feedback("c", good=["so it is"], poor=["so it was"])])["kinds"]
    assert [kinds[name]["recall"] for name in ("first", "second", "nowhere")] == [0, 1, 0]


def test_quotes_are_counted_by_how_they_are_found():
    critic = Feedback("c", good=["Ana", "LIVES in"], poor=["lives in Portto.", "London"])
    result = card([record(TEXT, Feedback("c", good=["Berlin", "Ana", "Rome"]))], [critic])
    assert [result[way] for way in ("verbatim", "normalised", "fuzzy", "invented")] == [1 / 4] * 4
    assert result["truth_invented"] == 2 / 3


def test_an_unreadable_critique_counts_in_recall_and_not_in_precision():
    records = toy_records(12) * 2
    result = card(records, [row["feedback"] for row in records[:12]] + [None] * 12)
    for name in ("good", "poor", "any_poor"):
        assert three(result[name]) == (1, 1 / 2, pytest.approx(2 / 3))
    assert result["json_valid"] == 1 / 2
    assert {figures["recall"] for figures in result["kinds"].values()} == {1 / 2}


def test_kinds_add_up_to_all_poor_spans(tok):
    records = toy_records(40)
    result = card(records, imperfect(records), tok)
    assert set(result["kinds"]) == {"wrong", "vague", "repeated", "filler"}
    spans = [kind["spans"] for kind in result["kinds"].values()]
    assert sum(spans) == sum(len(row["feedback"].poor) for row in records)
    assert spans == sorted(spans, reverse=True)
    recalls = [kind["recall"] for kind in result["kinds"].values()]
    assert min(recalls) <= result["poor"]["recall"] <= max(recalls)


def test_the_kinds_of_the_toy_stand_beside_its_poor_quotes():
    for row in toy_records(100, seed=1):
        severities = [quoted(quote)[1] for quote in row["feedback"].poor]
        assert severities == [toy.SEVERITY[kind] for kind in row["kinds"]]


def test_intervals_contain_the_figure_shrink_with_more_responses_and_follow_the_seed():
    records = toy_records(10)
    feedback = imperfect(records[:7]) + [None] * 3
    assert card(records, feedback, seed=1)["intervals"] != card(records, feedback)["intervals"]
    few, many = (card(records * n, feedback * n) for n in (1, 16))
    values, wide, shrunk = flat(many), flat(few["intervals"]), []
    for name, (low, high) in flat(many["intervals"]).items():
        assert low <= values[name] <= high and values[name] == pytest.approx(flat(few)[name]), name
        if high - low > 0.01 and not name.startswith("kinds"):  # few spans have odd intervals
            shrunk.append((wide[name][1] - wide[name][0]) / (high - low))
    assert len(shrunk) > 6 and min(shrunk) > 2 and max(shrunk) < 10, "about the root of 16"


# ---- files and the command line ----------------------------------------------------------------
def write(path, records, **more):
    """Writes records as annotate.py does, and returns the path."""
    lines = []
    for number, row in enumerate(records):
        feedback, status = row["feedback"] or Feedback(""), "ok" if row["feedback"] else "failed"
        fields = {"id": str(number), "kinds": row.get("kinds", []), "status": status}
        lines.append(annotated(row["prompt"], row["response"], feedback, **fields) | more)
    write_whole(path, lines)
    return path


def measured(*flags):
    """The card that eval.py rm prints as its last line, below what it shows to a reader."""
    printed = output("eval rm", *flags)
    assert re.search(r"^truth: ", printed, re.M)
    assert re.search(r"^poor, recall .* \[[01]\.", printed, re.M)
    return result_of(printed)


def test_critics_that_are_files_are_compared_by_their_responses(tmp_path):
    records = [row | {"prompt": f"Who is {i}?"} for i, row in enumerate(toy_records(30))]
    feedback = imperfect(records)
    failed = [row | {"feedback": None} for row in records[28:]]
    truth = write(tmp_path / "truth.jsonl", records[:28] + failed)
    weak = [row | {"feedback": one, "kinds": []} for row, one in zip(records, feedback)]
    weak[3]["feedback"] = None
    weak = write(tmp_path / "weak.jsonl", weak[:2:-1])  # the first three are absent
    result = measured(weak, "--annotations", truth)
    packed = tmp_path / "weak.jsonl.gz"
    packed.write_bytes(gzip.compress(weak.read_bytes()))
    assert measured(packed, "--annotations", truth) == result
    expected = card(records[:28], [None] * 4 + feedback[4:28])
    assert result == json.loads(json.dumps(expected)), "failed records of the truth are left out"
    both = measured(weak, truth, "--annotations", truth)
    assert list(both) == [str(weak), str(truth)] and both[str(truth)]["good"]["f1"] == 1


def test_a_reward_model_is_measured_by_its_own_tokens(tmp_path, untrained, tokenizer):
    records = toy_records(4)
    truth = write(tmp_path / "truth.jsonl", records)
    both = measured(untrained, truth, "--annotations", truth, "--critique_length", 3)
    expected = card(records, [None] * 4, tokenizer)
    assert both[str(untrained)] == json.loads(json.dumps(expected))


def test_what_cannot_be_compared_ends_in_one_sentence(tmp_path):
    row = record(TEXT, Feedback("c", poor=["27"]))
    truth = write(tmp_path / "truth.jsonl", [row])
    for change in ({"response": "another"}, {"status": "failed"}, {"good_spans": [3]}):
        critic = write(tmp_path / "critic.jsonl", [row], **change)
        assert "critic.jsonl" in refusal("eval rm", critic, "--annotations", truth)
    failed = write(tmp_path / "failed.jsonl", [row], status="failed")
    assert "no record whose status is ok" in refusal("eval rm", truth, "--annotations", failed)
