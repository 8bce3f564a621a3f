"""Alignment against spans that people marked: made-up ones, and real ones if the data is there."""

import pytest
from annotating import write
from forking import output, result_of

from extras.human import spans as human_spans
from t2g.align import token_offsets
from t2g.log import read_jsonl

TEXT = "Ana is 27, lives in Porto and is 27 indeed. She said “yes”."
ERROR = {"start": 0, "end": 3, "error type": "Irrelevant"}
ROWS = [
    {"response": TEXT, "spans": [[20, 25], [33, 35]]},
    {"prediction 1": TEXT, "feedback": {"errors": [ERROR]}},
    {"response": TEXT, "spans": []},
]


@pytest.fixture(scope="module")
def answers(public_data):
    return human_spans.read_marked(read_jsonl(public_data("finegrained_qa/first250.jsonl")), "rows")


def test_rows_of_both_forms_are_read():
    responses = human_spans.read_marked(ROWS, "rows")
    assert [marked.quotes for marked in responses] == [["Porto", "27"], ["Ana"]]


OUTSIDE = [{"response": TEXT, "spans": [s]} for s in ([3, 3], [5, 2], [-1, 2], [0, 1000])]
NO_SPANS = [
    {},
    {"response": TEXT},
    {"response": TEXT, "spans": [3]},
    {"response": TEXT, "spans": [[0.0, 3.0]]},
    {"response": TEXT, "spans": [["0", "3"]]},
    {"response": 5, "spans": [[0, 3]]},
    {"prediction 1": TEXT},
    {"prediction 1": TEXT, "feedback": None},
]
BAD = [(row, "row 1 of rows has a span that is empty or outside") for row in OUTSIDE]
BAD += [(row, "row 1 of rows has no known form") for row in NO_SPANS]
BAD += [(ROWS[2], "rows marks nothing")]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_refused_in_one_sentence(row, message, refused):
    assert message in refused(human_spans.read_marked, [row], "rows")


def test_tokens_outside_the_human_spans_are_wrong_and_those_not_marked_are_missed(tok, monkeypatch):
    def shifted(tokenizer, ids):
        """Gives each token the place of the next one: an index off by one."""
        offsets = token_offsets(tokenizer, ids)
        return [*offsets[1:], (offsets[-1][1], offsets[-1][1])]

    responses = human_spans.read_marked(ROWS[:1], "rows")
    right = human_spans.compare_tokens(responses, tok)["all"]
    assert right["wrong"] == right["missed"] == 0 < right["marked"] == right["human"]
    monkeypatch.setattr(human_spans, "token_offsets", shifted)
    wrong = human_spans.compare_tokens(responses, tok)["all"]
    assert wrong["wrong"] > 0 and wrong["missed"] > 0


def test_the_command_measures_a_file(tmp_path, tok):
    """In each response people marked a name that occurs once and the second of two numbers."""
    rows = []
    for age in range(20, 60):
        response = f"Ana is {age}, lives in Porto and is {age} again."
        rows.append({"response": response, "spans": [[19, 24], [32, 34]]})
    folder, data = str(tmp_path / "tokenizer"), write(tmp_path / "spans.jsonl", rows)
    tok.save_pretrained(folder)
    result = result_of(output(f"extras.human.spans --data {data} {folder}"))
    rules, table = result["rules"], result["tokenizers"][folder]
    assert result["quotes"] == 80 and rules["last"]["own"] == 40
    assert rules["last"]["precision"] == rules["last"]["recall"] == rules["all"]["recall"] == 1
    assert rules["first"]["precision"] == rules["first"]["recall"] == 0
    assert rules["all"]["precision"] == 0.5
    assert rules["context"]["recall"] == 1 > rules["context"]["precision"]
    assert result["garbled"]["ways"]["case"]["normalised"] == 1
    assert table["all"]["wrong"] == 0 < table["milliseconds"]["512 tokens"]


def test_a_file_without_ambiguous_quotes_is_measured(tmp_path):
    data = write(tmp_path / "spans.jsonl", [{"response": "Ana is 27.", "spans": [[7, 9]]}])
    result = result_of(output(f"extras.human.spans --data {data}"))
    assert result["quotes"] == 1 and result["rules"] == {}


def test_quotes_that_stand_once_mark_exactly_the_tokens_that_people_marked(tok, answers):
    tokens = human_spans.compare_tokens(answers, tok)["verbatim"]
    assert tokens["human"] > 5000 and tokens["wrong"] == tokens["missed"] == 0


def test_misquotes_are_found_in_the_right_place_or_not_at_all(answers):
    found = human_spans.find_misquotes(answers)["found"]
    assert found["normalised"]["quotes"] > 1500 and found["normalised"]["right characters"] == 1
    assert found["fuzzy"]["quotes"] > 1000 and found["fuzzy"]["right characters"] >= 0.98


def test_of_the_rules_for_ambiguous_quotes_ours_has_the_highest_precision(answers):
    rules = human_spans.compare_rules(answers)
    assert rules["last"]["precision"] == max(rule["precision"] for rule in rules.values()) > 0.9
