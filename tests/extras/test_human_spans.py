"""Alignment on spans that people marked: on made-up ones, and on real ones where those are at hand."""

import json
from pathlib import Path

import pytest

from extras.human import spans as human_spans
from t2g.align import token_offsets

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TEXT = "Ana is 27, lives in Porto and is 27 indeed. She said “yes”."
ROWS = [
    {"response": TEXT, "spans": [[20, 25], [33, 35]]},
    {
        "prediction 1": TEXT,
        "feedback": {"errors": [{"start": 0, "end": 3, "error type": "Irrelevant"}]},
    },
]


def rows_of(folder, name):
    path = DATA / folder / name
    if not path.is_file():
        pytest.skip(f"the real data is not here: {path}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_of_both_forms_with_offsets_are_read():
    responses, verbatim = human_spans.read(ROWS, "rows")
    assert verbatim and [marked.quotes for marked in responses] == [["Porto", "27"], ["Ana"]]


def test_instructions_are_read_as_quotes_and_corrections_as_ranges():
    said = [
        "Remove the information about 27 from the summary.",
        "Replace the information about Porto with the information about Lyon.",
    ]
    row = {
        "candidate": "Ana is 27, lives in Porto.",
        "feedback": {"instruction_list": said, "summary": "Ana lives in Lyon."},
    }
    [marked], verbatim = human_spans.read([row], "rows")
    assert not verbatim and marked.quotes == ["27", "Porto"]
    assert [marked.text[slice(*place)] for place in marked.ranges] == ["is 27,", "Porto"]
    table = human_spans.against_corrections([marked])
    assert (
        table["exact"]["quotes"] == 2
        and table["exact"]["changed"] == 1
        and 0 < table["exact"]["by_chance"] < 1
    )


@pytest.mark.parametrize("span", [[3, 3], [5, 2], [-1, 2], [0, 1000]])
def test_a_span_that_is_none_is_refused_in_one_sentence(span, capsys):
    with pytest.raises(SystemExit):
        human_spans.read([{"response": TEXT, "spans": [span]}], "rows")
    assert "empty or outside" in capsys.readouterr().err


NO_SPANS = [
    {},
    {"response": TEXT},
    {"response": TEXT, "spans": [3]},
    {"response": TEXT, "spans": [[0.0, 3.0]]},
    {"response": TEXT, "spans": [["0", "3"]]},
    {"response": 5, "spans": [[0, 3]]},
    {"candidate": TEXT},
    {"candidate": TEXT, "feedback": {"instruction_list": [5], "summary": ""}},
    {"prediction 1": TEXT},
]


@pytest.mark.parametrize("row", NO_SPANS)
def test_a_row_without_human_spans_is_refused_in_one_sentence(row, capsys):
    with pytest.raises(SystemExit):
        human_spans.read([row], "rows")
    assert "row 1 of rows has no known form" in capsys.readouterr().err


def test_rules_are_measured_on_quotes_that_stand_in_several_places():
    """Of "27" in two places people marked the second one."""
    responses, _ = human_spans.read(ROWS, "rows")
    rules = human_spans.rules_for_ambiguous_quotes(responses)
    assert rules["last"]["precision"] == rules["last"]["recall"] == rules["all"]["recall"] == 1
    assert rules["first"]["precision"] == rules["first"]["recall"] == 0
    assert (
        rules["all"]["precision"] == 0.5
        and rules["context"]["recall"] == 1 > rules["context"]["precision"]
    )


def test_tokens_outside_the_human_spans_are_counted_as_wrong_and_those_not_found_as_missed(
    tok, monkeypatch
):
    responses, _ = human_spans.read(ROWS[:1], "rows")
    right = human_spans.tokens_marked(responses, tok)["all"]
    assert right["wrong"] == right["missed"] == 0 < right["marked"] == right["human"]
    monkeypatch.setattr(
        human_spans, "token_offsets", lambda tok, ids: shifted(token_offsets(tok, ids))
    )
    wrong = human_spans.tokens_marked(responses, tok)["all"]
    assert wrong["wrong"] > 0 and wrong["missed"] > 0


def shifted(offsets):
    """Each token in the place of the one before it: an index off by one."""
    return [*offsets[1:], (offsets[-1][1], offsets[-1][1])]


# ---- real data -----------------------------------------------------------------------------------------------------------


def test_quotes_of_people_are_all_found_and_no_token_is_wrong(tok):
    """Whatever the tokenizer: of quotes that stand once in the text it writes, exactly the tokens that people marked."""
    responses, _ = human_spans.read(rows_of("finegrained_qa", "first250.jsonl"), "rows")
    found = human_spans.how_found(responses)
    assert found["quotes"] > 600 and found["exact"] == 1
    tokens = human_spans.tokens_marked(responses, tok)["verbatim"]
    assert tokens["human"] > 5000 and tokens["wrong"] == tokens["missed"] == 0


def test_garbled_quotes_are_found_in_the_right_place_or_not_at_all():
    responses, _ = human_spans.read(rows_of("finegrained_qa", "first250.jsonl"), "rows")
    found = human_spans.garbled_quotes(responses)["found"]
    assert found["normalised"]["quotes"] > 1500 and found["normalised"]["right characters"] == 1
    assert found["fuzzy"]["quotes"] > 1000 and found["fuzzy"]["right characters"] >= 0.98


def test_of_the_rules_for_ambiguous_quotes_ours_has_the_highest_precision():
    responses, _ = human_spans.read(rows_of("finegrained_qa", "first250.jsonl"), "rows")
    rules = human_spans.rules_for_ambiguous_quotes(responses)
    assert rules["last"]["precision"] == max(rule["precision"] for rule in rules.values()) > 0.9


def test_quotes_in_instructions_lead_to_words_that_the_correction_changed():
    responses, _ = human_spans.read(rows_of("defacto", "train.jsonl"), "rows")
    for kind, table in human_spans.against_corrections(responses).items():
        assert table["changed"] >= 0.98 > table["by_chance"], kind


def test_spans_of_a_file_are_measured(tmp_path, tok):
    rows = []
    for age in range(20, 60):
        response = f"Ana is {age}, lives in Porto and is {age} again."
        rows.append({"response": response, "spans": [[19, 24], [32, 34]]})
    tok.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "spans.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = human_spans.measure(tmp_path / "spans.jsonl", [str(tmp_path / "tokenizer")])
    assert result["quotes"]["exact"] == 1 and result["quotes"]["ambiguous"] == 0.5
    assert result["rules"]["last"]["precision"] == 1 and result["rules"]["first"]["precision"] == 0
    assert result["tokenizers"]["tokenizer"]["all"]["wrong"] == 0
