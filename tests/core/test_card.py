"""The card of a reward model: identities between what is marked and the figures, the files it reads, the page it writes."""

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
from t2g.card import SAMPLES_SHOWN, SIGNS, card, samples, write_page
from t2g.feedback import Feedback, quoted
from t2g.notes import FIELDS
from t2g.tasks import toy

NOTHING = Feedback("Nothing to say.")
TEXT = "Ana is 27, lives in Porto."
EVIL = "<script>alert(1)</script>"


def record(response, feedback, **more):
    return {"prompt": "Who?", "response": response, "feedback": feedback, **more}


def toy_records(count, seed=0):
    """Noisy summaries with what the rule says of them, and the kinds of its poor quotes."""
    rng, records = random.Random(seed), []
    for _ in range(count):
        example = toy.make_example(rng)
        text = toy.noisy_summary(example, rng)
        records.append(record(text, toy.critique(example, text), kinds=toy.kinds(example, text)))
    return records


def halves(records, seed=0):
    """A critic that leaves out half of the quotes, calls some good ones poor, and says less."""
    rng, said = random.Random(seed), []
    for truth in (row["feedback"].plain() for row in records):
        good, poor = (
            [quote for quote in quotes if rng.random() < 0.5] for quotes in (truth.good, truth.poor)
        )
        said.append(
            Feedback(
                truth.critique[: rng.randrange(99)],
                good,
                poor + [q for q in truth.good if rng.random() < 0.1],
            )
        )
    return said


def of(records, said, tokenizer=None, **more):
    return card(samples(records, tokenizer), said, **more)


def leaves(figures, path=()):
    """Every figure of nested ones, by its path."""
    for name, value in figures.items():
        yield from (
            leaves(value, (*path, name)) if isinstance(value, dict) else [((*path, name), value)]
        )


def three(figures):
    return figures["precision"], figures["recall"], figures["f1"]


# ---- figures -------------------------------------------------------------------------------------------------------------


def test_a_critic_that_says_what_is_true_has_all_ones_and_invents_nothing(tok):
    records = toy_records(12)
    found = of(records, [row["feedback"] for row in records], tok)
    figures = leaves({name: value for name, value in found.items() if name != "intervals"})
    shares = {
        path: value
        for path, value in figures
        if path[-1] in ("precision", "recall", "f1", "recall_by_character")
    }
    assert len(shares) == 15 + 2 * len(found["kinds"]) and set(shares.values()) == {1.0}
    assert set(found["iou"].values()) == {1.0} and found["json_valid"] == found["verbatim"] == 1
    assert (
        found["invented"] == found["normalised"] == found["fuzzy"] == found["truth_invented"] == 0
    )
    assert found["labelled"]["critic"] == found["labelled"]["truth"] > 0.2
    for sizes in found["calibration"].values():
        assert (
            sizes["ratio"] == 1
            and sizes["correlation"] == pytest.approx(1)
            and sizes["critic"] == sizes["truth"] > 1
        )


def test_a_critic_that_marks_nothing_has_recall_0_and_a_precision_of_0_without_interval():
    records = toy_records(12)
    silent, unreadable = (of(records, [said] * 12) for said in (NOTHING, None))
    for found in (silent, unreadable):
        for sign in SIGNS:
            assert (
                three(found[sign]) == three(found["by_character"][sign]) == (0, 0, 0)
                and found["iou"][sign] == 0
            )
            assert three(found["intervals"][sign]) == (None, [0, 0], [0, 0])
        assert (
            found["invented"] == found["labelled"]["critic"] == 0
            and found["intervals"]["invented"] is None
        )
    assert silent["json_valid"] == 1 and silent["calibration"]["words"]["critic"] == 3
    assert (
        unreadable["json_valid"] == 0
        and unreadable["intervals"]["calibration"]["words"]["truth"] is None
    )


words = st.lists(
    st.tuples(st.sampled_from([-1, 0, 1]), st.sampled_from([-1, 0, 1])), min_size=1, max_size=12
)


def marked(signs, swapped=1):
    """Feedback that marks the i-th word of a text of different words by the sign."""
    good, poor = (
        [f"word{i}" for i, sign in enumerate(signs) if sign * swapped == value]
        for value in SIGNS.values()
    )
    return Feedback("So it is.", good, poor)


def both_ways(texts, swapped=1):
    """The truth's and the critic's feedback on texts of different words."""
    records = [
        record(
            " ".join(f"word{i}" for i in range(len(text))), marked([t for t, _ in text], swapped)
        )
        for text in texts
    ]
    return records, [marked([guess for _, guess in text], swapped) for text in texts]


@given(st.lists(words, min_size=1, max_size=4))
def test_to_call_good_what_was_poor_and_poor_what_was_good_swaps_the_figures(texts):
    found, other = of(*both_ways(texts)), of(*both_ways(texts, swapped=-1))
    for one, two in (("good", "poor"), ("poor", "good")):
        assert found[one] == other[two] and found["by_character"][one] == other["by_character"][two]
        assert (
            found["iou"][one] == other["iou"][two]
            and found["intervals"][one] == other["intervals"][two]
        )


@given(st.lists(words, min_size=1, max_size=4))
def test_where_truth_and_critic_change_places_so_do_precision_and_recall(texts):
    found, other = (
        of(*both_ways(texts)),
        of(*both_ways([[pair[::-1] for pair in text] for text in texts])),
    )
    for sign in SIGNS:
        for here, there in ((found, other), (found["by_character"], other["by_character"])):
            assert three(here[sign]) == (
                there[sign]["recall"],
                there[sign]["precision"],
                there[sign]["f1"],
            )
    assert (
        found["iou"] == other["iou"] and found["labelled"]["critic"] == other["labelled"]["truth"]
    )
    assert found["any_poor"]["precision"] == other["any_poor"]["recall"]
    here, there = found["calibration"]["characters"], other["calibration"]["characters"]
    assert (
        here["correlation"] == pytest.approx(there["correlation"])
        and here["critic"] == there["truth"]
    )


def test_tokens_and_characters_of_one_response_counted_by_hand():
    """Ana | is | 27 | , | lives | in | Porto | . : the critic calls three words good, and one of them is; both fault the age."""
    truth, said = (
        Feedback("No.", [" Porto"], [" 27"]),
        Feedback("It is not 27.", ["lives in Porto"], ["27"]),
    )
    found = of([record(TEXT, truth)], [said])
    assert three(found["good"]) == (1 / 3, 1, 1 / 2) and three(found["poor"]) == (1, 1, 1)
    assert three(found["by_character"]["good"]) == (5 / 14, 1, 10 / 19)
    assert found["iou"] == {"good": 5 / 14, "poor": 1} and found["labelled"] == {
        "critic": 4 / 8,
        "truth": 2 / 8,
    }
    assert [found["calibration"]["characters"][who] for who in ("critic", "truth", "ratio")] == [
        16,
        7,
        16 / 7,
    ]
    assert (
        found["calibration"]["words"]["ratio"] == 4
        and found["kinds"] == {}
        and found["responses"] == 1
    )


def test_words_that_repeat_count_where_they_stand():
    text = "the cat saw the dog and the dog saw the bird"
    found = of([record(text, Feedback("c", poor=["the cat"]))], [Feedback("c", poor=["the bird"])])
    assert three(found["poor"]) == (0, 0, 0), "they have a word in common, but no place"
    found = of(
        [record(text, Feedback("c", poor=["the dog"] * 2))], [Feedback("c", poor=["the dog"])]
    )
    assert three(found["poor"]) == (1, 1 / 2, 2 / 3)


def test_quotes_are_counted_by_how_they_are_found():
    said = Feedback("c", good=["Ana", "LIVES in"], poor=["lives in Portto.", "London"])
    found = of([record(TEXT, Feedback("c", good=["Berlin", "Ana", "Rome"]))], [said])
    assert [found[way] for way in ("verbatim", "normalised", "fuzzy", "invented")] == [1 / 4] * 4
    assert found["truth_invented"] == 2 / 3


def test_what_cannot_be_read_counts_in_recall_and_not_in_precision_nor_in_sizes():
    records = toy_records(12) * 2
    found = of(records, [row["feedback"] for row in records[:12]] + [None] * 12)
    for figures in (found["good"], found["poor"], found["by_character"]["poor"], found["any_poor"]):
        assert three(figures) == (1, 1 / 2, pytest.approx(2 / 3))
    assert found["json_valid"] == 1 / 2 and set(found["iou"].values()) == {1 / 2}
    assert {sizes["ratio"] for sizes in found["calibration"].values()} == {1}
    assert {figures["recall"] for figures in found["kinds"].values()} == {1 / 2}


def test_responses_without_a_fault_tell_who_finds_faults_everywhere():
    records = [record(TEXT, Feedback("c", poor=["27"] if i < 2 else [])) for i in range(8)]
    assert three(of(records, [Feedback("c", poor=["Ana"])] * 8)["any_poor"]) == (
        2 / 8,
        1,
        2 * 2 / 10,
    )
    assert three(of(records, [Feedback("c", poor=["London"])] * 8)["any_poor"]) == (0, 0, 0), (
        "what is nowhere marks nothing"
    )


def test_kinds_add_up_to_all_poor_spans(tok):
    records = toy_records(40)
    found = of(records, halves(records), tok)
    assert set(found["kinds"]) == {"wrong", "vague", "repeated", "filler"}
    assert sum(kind["spans"] for kind in found["kinds"].values()) == sum(
        len(row["feedback"].poor) for row in records
    )
    spans = [kind["spans"] for kind in found["kinds"].values()]
    assert spans == sorted(spans, reverse=True)
    recalls = [kind["recall"] for kind in found["kinds"].values()]
    assert min(recalls) <= found["poor"]["recall"] <= max(recalls)
    unnamed = [row | {"kinds": []} for row in records[:20]]
    assert of(unnamed, halves(unnamed))["kinds"] == {}
    mixed = of(unnamed + records[20:], halves(records))["kinds"]
    assert mixed["unnamed"]["spans"] == sum(len(row["feedback"].poor) for row in unnamed)
    assert sum(kind["spans"] for kind in mixed.values()) == sum(spans)


def test_of_a_quote_that_is_given_twice_each_kind_has_its_own_place():
    truth = record(
        "so it is, so it was",
        Feedback("c", poor=["so", "so", "London"]),
        kinds=["first", "second", "nowhere"],
    )
    kinds = of([truth], [Feedback("c", good=["so it is"], poor=["so it was"])])["kinds"]
    assert {name: (kind["recall"], kind["spans"], kind["tokens"]) for name, kind in kinds.items()} == {
        "first": (0, 1, 1), "second": (1, 1, 1), "nowhere": (0, 1, 0)
    }  # fmt: skip


def test_the_kinds_of_the_toy_stand_beside_its_poor_quotes():
    seen = set()
    for row in toy_records(200, seed=1):
        poor = row["feedback"].poor
        assert [quoted(quote)[1] for quote in poor] == [toy.SEVERITY[kind] for kind in row["kinds"]]
        assert all(
            quoted(quote)[0].strip(", ").endswith(toy.FILLERS)
            for quote, k in zip(poor, row["kinds"])
            if k == "filler"
        )
        seen |= set(row["kinds"])
    assert seen == set(toy.SEVERITY) - {"unclear"}, "what noise can be is of a known kind"


def test_intervals_hold_the_figure_and_shrink_with_more_responses():
    records = toy_records(10)
    few, many = (of(records * n, (halves(records[:7]) + [None] * 3) * n) for n in (1, 16))
    widths, intervals = {}, dict(leaves(few["intervals"]))
    for path, (low, high) in leaves(many["intervals"]):
        value = dict(leaves(many))[path]
        assert low <= value <= high and value == pytest.approx(dict(leaves(few))[path]), path
        widths[path] = (intervals[path][1] - intervals[path][0], high - low)
    kinds = {path for path in widths if path[0] == "kinds"}  # few spans have odd intervals
    shrunk = [
        wide / narrow
        for path, (wide, narrow) in widths.items()
        if narrow > 0.01 and path not in kinds
    ]
    assert len(shrunk) > 20 and min(shrunk) > 2 and max(shrunk) < 10, "about the root of 16"


def test_the_same_seed_draws_the_same_intervals():
    records = toy_records(10)
    one, again, other = (of(records, halves(records), seed=seed) for seed in (1, 1, 2))
    assert one == again and one["intervals"] != other["intervals"]


# ---- files and the command line ------------------------------------------------------------------------------------------


def write(path, records, **more):
    """The records as annotate.py writes them, a critic's feedback in place of the truth's if it is given."""
    lines = []
    for number, row in enumerate(records):
        said = row["feedback"]
        line = {
            "id": str(number),
            "prompt": row["prompt"],
            "response": row["response"],
            "kinds": row.get("kinds", []),
        }
        line |= (
            {"critique": said.critique, "good_spans": said.good, "poor_spans": said.poor}
            if said
            else {}
        )
        lines.append(line | {"status": "ok" if said else "failed", "reason": ""} | more)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """eval.py rm in this process: the object of its last line, or the one sentence with which it refuses."""

    def main(*flags, refuse=False):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["eval.py", "rm", *map(str, flags)])
        if refuse:
            with pytest.raises(SystemExit) as stopped:
                eval_script.main()
            assert stopped.value.code == 2
            (sentence,) = capsys.readouterr().err.splitlines()
            return sentence
        eval_script.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return main


def test_critics_that_are_files_are_compared_by_id(run, tmp_path):
    records = toy_records(30)
    said = halves(records)
    truth = write(
        tmp_path / "truth.jsonl",
        [*records[:28], *(row | {"feedback": None} for row in records[28:])],
    )
    weak = write(
        tmp_path / "weak.jsonl",
        [row | {"feedback": f, "kinds": []} for row, f in zip(records, said)],
    )
    lines = weak.read_text().splitlines()
    weak.write_text(
        "\n".join([*lines[:3:-1], json.dumps(json.loads(lines[3]) | {"status": "failed"})])
    )  # 0 to 2 are absent
    found = run(weak, "--annotations", truth)
    assert found == json.loads(json.dumps(of(records[:28], [None] * 4 + said[4:28]))), (
        "failed records of the truth are left out"
    )
    assert (tmp_path / "card.html").is_file()
    both = run(
        weak,
        truth,
        "--annotations",
        truth,
        "--eval_samples",
        8,
        "--out",
        tmp_path / "new" / "both.html",
    )
    assert list(both) == [str(weak), str(truth)] and both[str(truth)]["good"]["f1"] == 1
    assert {found["responses"] for found in both.values()} == {8}
    assert "weak.jsonl, truth.jsonl against" in (tmp_path / "new" / "both.html").read_text()


def test_of_an_id_that_stands_twice_the_later_line_counts(run, tmp_path):
    truth = record(TEXT, Feedback("c", poor=["27"]))
    lines = [
        truth | {"feedback": said}
        for said in (None, Feedback("c", poor=["Ana"]), truth["feedback"])
    ]
    again = write(tmp_path / "again.jsonl", lines, id="0")
    found = run(again, "--annotations", again)
    assert found["responses"] == 1 and found["kinds"] == {} and three(found["poor"]) == (1, 1, 1)
    assert (
        run(again, "--annotations", write(tmp_path / "truth.jsonl", [truth]))["poor"]
        == found["poor"]
    )


def test_a_reward_model_is_measured_by_its_own_tokens_against_annotations(run, tmp_path):
    tokenizer, model = toy.new_model(0)
    policy.save(model, tokenizer, tmp_path / "rm", 1)
    records = toy_records(4)
    truth = write(tmp_path / "truth.jsonl", records)
    both = run(tmp_path / "rm", truth, "--annotations", truth, "--critique_length", 3)
    assert both[str(tmp_path / "rm")] == json.loads(json.dumps(of(records, [None] * 4, tokenizer)))
    assert (
        both[str(truth)]["kinds"]
        == of(records, [None] * 4, tokenizer)["kinds"] | both[str(truth)]["kinds"]
    )
    assert (tmp_path / "rm" / "card.html").is_file()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            dict(response="another"),
            "record 0 of .*critic.jsonl has another prompt or response than that of .*truth.jsonl; .*",
        ),
        (
            dict(id="7"),
            ".*critic.jsonl says nothing readable of the 1 records of .*truth.jsonl: none of their ids .*",
        ),
        (dict(status="failed"), ".*critic.jsonl says nothing readable .*"),
        (
            dict(good_spans=[3]),
            'record 1 of .*critic.jsonl is no feedback: "good" must be a list of texts, .*',
        ),
        (dict(critique="\ud800"), "record 1 of .*critic.jsonl is no feedback: .*surrogate.*"),
        (dict(response="\ud800"), "record 1 of .*critic.jsonl is no feedback: .*surrogate.*"),
        (
            dict(critique=None),
            "record 1 of .*critic.jsonl has no usable critique; see annotate.py for the fields",
        ),
        (
            dict(kinds=["a", "b"]),
            'record 1 of .*critic.jsonl is no feedback: "kinds" must be a list of texts, .*',
        ),
        (
            dict(id=None),
            ".*critic.jsonl has a record whose id is no text, and records of two files are matched by it",
        ),
    ],
)
def test_records_that_cannot_be_compared_are_one_clear_sentence(run, tmp_path, change, sentence):
    row = record(TEXT, Feedback("c", poor=["27"]))
    truth, critic = (
        write(tmp_path / "truth.jsonl", [row]),
        write(tmp_path / "critic.jsonl", [row], **change),
    )
    assert re.fullmatch(f"error: {sentence}", run(critic, "--annotations", truth, refuse=True))


def test_flags_that_do_not_go_together_are_one_clear_sentence(run, tmp_path):
    row = record(TEXT, Feedback("c", poor=["27"]))
    truth, failed = (
        write(tmp_path / "truth.jsonl", [row]),
        write(tmp_path / "failed.jsonl", [row], status="failed"),
    )
    assert "say with --annotations what is true of them" in run(truth, refuse=True)
    assert "holds no record whose status is ok" in run(truth, "--annotations", failed, refuse=True)
    assert "there is no file" in run(truth, "--annotations", tmp_path / "none.jsonl", refuse=True)
    assert "cannot be written; choose another --out" in run(
        truth, "--annotations", truth, "--out", tmp_path, refuse=True
    )
    assert set(FIELDS) < set(json.loads(truth.read_text()))


# ---- the page ------------------------------------------------------------------------------------------------------------


def make_page(path, names):
    """A page with texts that are markup; the last critic is never readable."""
    rows = [row | {"prompt": f"{EVIL} 東京"} for row in toy_records(30)]
    rows += [
        record(f"{EVIL} &amp; \u2028 {i}", Feedback(EVIL, [EVIL], [f"{EVIL} is nowhere, nowhere"]))
        for i in range(30)
    ]
    rows = samples(rows)
    said = {name: [row.truth for row in rows] for name in names} | {names[-1]: [None] * len(rows)}
    cards = {name: card(rows, feedback) for name, feedback in said.items()}
    write_page(path, f"the truth of {EVIL}", "words", rows, said, cards)
    return path.read_text()


def test_a_page_is_one_file_that_needs_no_network_and_holds_no_markup_of_models(tmp_path):
    text = make_page(tmp_path / "card.html", ["runs/a/rm", "runs/b/rm"])
    assert EVIL not in text and "\\u003cscript>alert(1)" in text
    assert not re.search(r"https?://|innerHTML|\b(src|href)=", text) and len(text) < 2e6
    data = json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    )
    assert [critic["name"] for critic in data["critics"]] == ["runs/a/rm", "runs/b/rm"], (
        "both are called rm"
    )
    assert len(data["samples"]) == SAMPLES_SHOWN
    for row in data["samples"]:
        truth, same, unreadable = row["opinions"]
        assert truth == same and unreadable is None
        assert ("lost" in row["prompt"]) is False and all(text for text, _ in truth["pieces"])


@pytest.mark.skipif(
    not shutil.which("chromium"), reason="no chromium on PATH to look at the page with"
)
@pytest.mark.parametrize("names", [["one"], ["one", "two", "three"]])
def test_a_browser_shows_it_without_an_error(names, tmp_path):
    page, picture = tmp_path / "card.html", tmp_path / "card.png"
    make_page(page, names)
    flags = "--headless --no-sandbox --disable-gpu --window-size=1280,2400 --enable-logging=stderr --v=0 --dump-dom".split()
    command = [
        "chromium",
        *flags,
        f"--user-data-dir={tmp_path}/profile",
        f"--screenshot={picture}",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert not re.search("CONSOLE|Uncaught", done.stderr), done.stderr
    body = (
        done.stdout.split('<script type="application/json"')[0] + done.stdout.split("</script>")[-1]
    )
    assert body.count('class="opinion"') == SAMPLES_SHOWN * (1 + len(names))
    assert body.count("<table>") == 6 and body.count('class="bar"') > 15 * len(names)
    assert (
        body.count('class="critique">(it cannot be read)') == SAMPLES_SHOWN
        and body.count("nothing to divide") > 3
    )
    assert (
        EVIL not in body and "&lt;script&gt;alert(1)" in body and "nowhere in the response" in body
    )
    assert picture.stat().st_size > 60_000, "an empty page of this size makes a picture of 14 kB"


def test_a_task_without_a_rule_is_told_before_any_stage_is_run(monkeypatch, capsys):
    monkeypatch.setattr(eval_script.stages, "ensure", lambda *_: pytest.fail("a stage was run"))
    monkeypatch.setattr(sys, "argv", ["eval.py", "rm", "--task", "qa"])
    with pytest.raises(SystemExit):
        eval_script.main()
    assert "the task qa has no rule" in capsys.readouterr().err
