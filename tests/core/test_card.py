"""The card of a critic: identities of its figures, the files it reads, the page it writes."""

import json
import random
import re
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import eval as eval_script
from t2g import policy
from t2g.card import SAMPLES_SHOWN, SIGNS, card, flat, samples, write_page
from t2g.feedback import Feedback, quoted
from t2g.tasks import toy

TEXT = "Ana is 27, lives in Porto."
EVIL = "<script>alert(1)</script>"


def record(response, feedback, **more):
    return {"prompt": "Who?", "response": response, "feedback": feedback, **more}


def toy_records(count, seed=0):
    """Noisy summaries with the rule's feedback, and the kinds of its poor quotes."""
    rng, records = random.Random(seed), []
    for _ in range(count):
        example = toy.make_example(rng)
        text = toy.noisy_summary(example, rng)
        records.append(record(text, toy.critique(example, text), kinds=toy.kinds(example, text)))
    return records


def halves(records, seed=0):
    """A critic that leaves out half of the quotes and calls some good ones poor."""
    rng, feedback = random.Random(seed), []
    for truth in (row["feedback"].plain() for row in records):
        good = [quote for quote in truth.good if rng.random() < 0.5]
        poor = [quote for quote in truth.poor if rng.random() < 0.5]
        wrong = [quote for quote in truth.good if rng.random() < 0.1]
        feedback.append(Feedback(truth.critique, good, poor + wrong))
    return feedback


def of(records, feedback, tokenizer=None, **more):
    return card(samples(records, tokenizer), feedback, **more)


def three(figures):
    return figures["precision"], figures["recall"], figures["f1"]


def test_a_critic_that_repeats_the_truth_has_all_ones_and_invents_nothing(tok):
    records = toy_records(12)
    found = of(records, [row["feedback"] for row in records], tok)
    shares = flat(found["intervals"]) | flat({k: v for k, v in found.items() if k != "intervals"})
    ends = ("precision", "recall", "f1")
    shares = {name: value for name, value in shares.items() if name.endswith(ends)}
    assert len(shares) == 15 + len(found["kinds"]) and set(shares.values()) == {1.0}
    assert found["json_valid"] == found["verbatim"] == 1
    for way in ("invented", "normalised", "fuzzy", "truth_invented"):
        assert found[way] == 0


def test_a_critic_that_marks_nothing_has_recall_0_and_a_precision_of_0_without_interval():
    records = toy_records(12)
    for feedback, valid in ((Feedback("Nothing to say."), 1), (None, 0)):
        found = of(records, [feedback] * 12)
        assert found["json_valid"] == valid
        assert found["invented"] == 0 and found["intervals"]["invented"] is None
        for sign in SIGNS:
            assert three(found[sign]) == three(found["by_character"][sign]) == (0, 0, 0)
            assert three(found["intervals"][sign]) == (None, [0, 0], [0, 0])


signs = st.sampled_from([-1, 0, 1])
words = st.lists(st.tuples(signs, signs), min_size=1, max_size=12)


def marked(values):
    """Feedback that marks the i-th word of a text of different words by the i-th sign."""
    good = [f"word{i}" for i, value in enumerate(values) if value == 1]
    poor = [f"word{i}" for i, value in enumerate(values) if value == -1]
    return Feedback("So it is.", good, poor)


def card_of(texts):
    """The card of texts of different words, from the signs that truth and critic give each."""
    records, feedback = [], []
    for text in texts:
        truth, critic = zip(*text)
        response = " ".join(f"word{i}" for i in range(len(text)))
        records.append(record(response, marked(truth)))
        feedback.append(marked(critic))
    return of(records, feedback)


@given(st.lists(words, min_size=1, max_size=4))
def test_good_changes_places_with_poor_and_precision_with_recall(texts):
    """Once good and poor are swapped, and once the truth and the critic."""
    found = card_of(texts)
    signs_swapped = card_of([[(-truth, -critic) for truth, critic in text] for text in texts])
    sides_swapped = card_of([[(critic, truth) for truth, critic in text] for text in texts])
    for part in (lambda figures: figures, lambda figures: figures["by_character"]):
        for one, two in (("good", "poor"), ("poor", "good")):
            assert part(found)[one] == part(signs_swapped)[two]
            assert part(found["intervals"])[one] == part(signs_swapped["intervals"])[two]
            precision, recall, f1 = three(part(found)[one])
            assert three(part(sides_swapped)[one]) == (recall, precision, f1)


def test_tokens_and_characters_of_one_response_counted_by_hand():
    """Ana | is | 27 | , | lives | in | Porto | . : one of three good words is good."""
    truth = Feedback("No.", [" Porto"], [" 27"])
    critic = Feedback("It is not 27.", ["lives in Porto"], ["27"])
    found = of([record(TEXT, truth)], [critic])
    assert three(found["good"]) == (1 / 3, 1, 1 / 2) and three(found["poor"]) == (1, 1, 1)
    assert three(found["by_character"]["good"]) == (5 / 14, 1, 10 / 19)
    assert found["kinds"] == {} and found["responses"] == 1


def test_words_that_repeat_count_where_they_stand():
    text = "the cat saw the dog and the dog saw the bird"
    found = of([record(text, Feedback("c", poor=["the cat"]))], [Feedback("c", poor=["the bird"])])
    assert three(found["poor"]) == (0, 0, 0), "they have a word in common, but no place"
    twice = record(text, Feedback("c", poor=["the dog"] * 2))
    assert three(of([twice], [Feedback("c", poor=["the dog"])])["poor"]) == (1, 1 / 2, 2 / 3)


def test_quotes_are_counted_by_how_they_are_found():
    critic = Feedback("c", good=["Ana", "LIVES in"], poor=["lives in Portto.", "London"])
    found = of([record(TEXT, Feedback("c", good=["Berlin", "Ana", "Rome"]))], [critic])
    assert [found[way] for way in ("verbatim", "normalised", "fuzzy", "invented")] == [1 / 4] * 4
    assert found["truth_invented"] == 2 / 3


def test_an_unreadable_critique_counts_in_recall_and_not_in_precision():
    records = toy_records(12) * 2
    found = of(records, [row["feedback"] for row in records[:12]] + [None] * 12)
    for figures in (found["good"], found["poor"], found["by_character"]["poor"], found["any_poor"]):
        assert three(figures) == (1, 1 / 2, pytest.approx(2 / 3))
    assert found["json_valid"] == 1 / 2
    assert {figures["recall"] for figures in found["kinds"].values()} == {1 / 2}


def test_kinds_add_up_to_all_poor_spans(tok):
    records = toy_records(40)
    found = of(records, halves(records), tok)
    assert set(found["kinds"]) == {"wrong", "vague", "repeated", "filler"}
    spans = [kind["spans"] for kind in found["kinds"].values()]
    assert sum(spans) == sum(len(row["feedback"].poor) for row in records)
    assert spans == sorted(spans, reverse=True)
    recalls = [kind["recall"] for kind in found["kinds"].values()]
    assert min(recalls) <= found["poor"]["recall"] <= max(recalls)


def test_of_a_quote_that_is_given_twice_each_kind_has_its_own_place():
    feedback = Feedback("c", poor=["so", "so", "London"])
    truth = record("so it is, so it was", feedback, kinds=["first", "second", "nowhere"])
    kinds = of([truth], [Feedback("c", good=["so it is"], poor=["so it was"])])["kinds"]
    assert [kinds[name]["recall"] for name in ("first", "second", "nowhere")] == [0, 1, 0]


def test_the_kinds_of_the_toy_stand_beside_its_poor_quotes():
    for row in toy_records(100, seed=1):
        severities = [quoted(quote)[1] for quote in row["feedback"].poor]
        assert severities == [toy.SEVERITY[kind] for kind in row["kinds"]]


def test_intervals_hold_the_figure_shrink_with_more_responses_and_follow_the_seed():
    records = toy_records(10)
    feedback = halves(records[:7]) + [None] * 3
    assert of(records, feedback, seed=1)["intervals"] != of(records, feedback)["intervals"]
    few, many = (of(records * n, feedback * n) for n in (1, 16))
    values, wide, shrunk = flat(many), flat(few["intervals"]), []
    for name, (low, high) in flat(many["intervals"]).items():
        assert low <= values[name] <= high and values[name] == pytest.approx(flat(few)[name]), name
        if high - low > 0.01 and not name.startswith("kinds"):  # few spans have odd intervals
            shrunk.append((wide[name][1] - wide[name][0]) / (high - low))
    assert len(shrunk) > 12 and min(shrunk) > 2 and max(shrunk) < 10, "about the root of 16"


# ---- files and the command line ----------------------------------------------------------------


def write(path, records, **more):
    """Writes records as annotate.py does."""
    lines = []
    for number, row in enumerate(records):
        line = {"id": str(number), "kinds": [], **row}
        feedback = line.pop("feedback")
        if feedback:
            line |= {"critique": feedback.critique}
            line |= {"good_spans": feedback.good, "poor_spans": feedback.poor}
        lines.append(line | {"status": "ok" if feedback else "failed"} | more)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs eval.py rm in this process and returns the object of its last line."""

    def main(*flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["eval.py", "rm", *map(str, flags)])
        eval_script.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return main


def test_critics_that_are_files_are_compared_by_their_responses(run, tmp_path):
    records = [row | {"prompt": f"Who is {i}?"} for i, row in enumerate(toy_records(30))]
    feedback = halves(records)
    failed = [row | {"feedback": None} for row in records[28:]]
    truth = write(tmp_path / "truth.jsonl", records[:28] + failed)
    weak = [row | {"feedback": one, "kinds": []} for row, one in zip(records, feedback)]
    weak[3]["feedback"] = None
    weak = write(tmp_path / "weak.jsonl", weak[:2:-1])  # the first three are absent
    found = run(weak, "--annotations", truth)
    expected = of(records[:28], [None] * 4 + feedback[4:28])
    assert found == json.loads(json.dumps(expected)), "failed records of the truth are left out"
    assert (tmp_path / "card.html").is_file()
    out = tmp_path / "new" / "both.html"
    both = run(weak, truth, "--annotations", truth, "--out", out)
    assert list(both) == [str(weak), str(truth)] and both[str(truth)]["good"]["f1"] == 1
    assert "weak.jsonl" in out.read_text()


def test_a_reward_model_is_measured_by_its_own_tokens_against_annotations(run, tmp_path):
    tokenizer, model = toy.new_model(0)
    policy.save(model, tokenizer, tmp_path / "rm", 1)
    records = toy_records(4)
    truth = write(tmp_path / "truth.jsonl", records)
    both = run(tmp_path / "rm", truth, "--annotations", truth, "--critique_length", 3)
    assert both[str(tmp_path / "rm")] == json.loads(json.dumps(of(records, [None] * 4, tokenizer)))
    assert (tmp_path / "rm" / "card.html").is_file()


def test_what_cannot_be_compared_ends_in_one_sentence(run, refused, tmp_path):
    row = record(TEXT, Feedback("c", poor=["27"]))
    truth = write(tmp_path / "truth.jsonl", [row])
    for change in ({"response": "another"}, {"status": "failed"}, {"good_spans": [3]}):
        critic = write(tmp_path / "critic.jsonl", [row], **change)
        assert "critic.jsonl" in refused(run, critic, "--annotations", truth)
    failed = write(tmp_path / "failed.jsonl", [row], status="failed")
    assert "--annotations" in refused(run, truth)
    assert "no record whose status is ok" in refused(run, truth, "--annotations", failed)
    assert "none.jsonl" in refused(run, truth, "--annotations", tmp_path / "none.jsonl")
    assert "cannot be written" in refused(run, truth, "--annotations", truth, "--out", tmp_path)
    assert "has no rule" in refused(run, "--task", "qa")


# ---- the page ----------------------------------------------------------------------------------


def make_page(path, names):
    """Writes a page with texts that are markup; the last critic is never readable."""
    rows = [row | {"prompt": f"{EVIL} 東京"} for row in toy_records(30)]
    evil = Feedback(EVIL, [EVIL], [f"{EVIL} is nowhere, nowhere"])
    rows = samples(rows + [record(f"{EVIL} &amp; \u2028 {i}", evil) for i in range(30)])
    feedback = {name: [row.truth for row in rows] for name in names}
    feedback[names[-1]] = [None] * len(rows)
    cards = {name: card(rows, opinions) for name, opinions in feedback.items()}
    write_page(path, f"the truth of {EVIL}", "words", rows, feedback, cards)
    return path.read_text()


def test_the_page_holds_the_marks_of_all_critics_and_no_markup_of_models(tmp_path):
    text = make_page(tmp_path / "card.html", ["runs/a/rm", "runs/b/rm"])
    assert EVIL not in text and "\\u003cscript>alert(1)" in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    truth, same, unreadable = json.loads(data[1])["groups"]
    assert [truth["label"], same["label"]] == ["truth", "runs/a/rm"]
    assert len(truth["samples"]) == SAMPLES_SHOWN and truth["samples"] == same["samples"]
    for sample, other in zip(truth["samples"], unreadable["samples"]):
        marks = {token["delta"] for token in sample["tokens"]}
        assert {token["delta"] for token in other["tokens"]} == {0} < marks <= {-1, 0, 1}
        assert other["critique"] is None
        for quote in sample["good"]:
            pieces = [sample["tokens"][i] for i in quote["tokens"]]
            assert "".join(piece["text"] for piece in pieces) == quote["text"].strip()
    assert same["result"]["poor, recall"] == [[1, 1, 1]]


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium on PATH")
def test_a_browser_shows_it_without_an_error(tmp_path):
    page, names = tmp_path / "card.html", ["one", "two", "three"]
    make_page(page, names)
    flags = "--headless --no-sandbox --disable-gpu --window-size=1280,2400 --dump-dom".split()
    flags += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path}/profile"]
    command = ["chromium", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert not re.search("CONSOLE|Uncaught", done.stderr), done.stderr
    body = done.stdout.split('<script type="application/json"')[0]
    assert body.count('class="text"') == SAMPLES_SHOWN * (1 + len(names))
    assert body.count("the critique could not be read") == SAMPLES_SHOWN
    assert body.count(">poor, recall<") == 1 and "card-of-critics" in body
    assert EVIL not in body and "&lt;script&gt;alert(1)" in body
