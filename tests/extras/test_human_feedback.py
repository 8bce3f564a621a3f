"""Published human feedback as records for a reward model: made-up rows, and real ones if there."""

import pytest

from extras.human.records import joined, longest_kept, records
from t2g.align import resolve
from t2g.feedback import Feedback
from t2g.log import read_jsonl
from t2g.notes import read_usable, write_whole

DEFACTO = {
    "article": "Deschamps praised his side in Paris. He has coached France since 2012.",
    "candidate": "France coach Didier Deschamps praised his 23 players in Paris.",
    "has_error": True,
    "intrinsic_error": False,
    "extrinsic_error": True,
    "feedback": {
        "summary": "France coach Deschamps praised his players in Paris.",
        "explanation": "No first name is given.\nNor how many players.",
        "instruction": "Remove the information about Didier from the summary.",
        "instruction_list": ["Remove the information about Didier from the summary."],
    },
}
GROUNDING = {"start": 26, "end": 45, "error type": "Wrong-Grounding"}
ERRORS = [
    GROUNDING | {"explanation": '{"passage_id": 1, "sentence_id": [2]}'},
    {"start": 18, "end": 24, "error type": "Unverifiable", "explanation": ""},
]
PASSAGE = ["Bloom", "Bloom is an album.", "It came out on 31 August 2018."]
QA = {
    "question": "When did Bloom come out?",
    "passages": [PASSAGE, ["Ana", "Ana sings."]],
    "prediction 1": "Bloom is an album by Ana. It came out in May. Many people like it very much.",
    "feedback": {"errors": ERRORS, "missing-info": [{"passage_id": 1, "sentence_id": [2]}]},
}
HEAD = '"""\nWrite a function to add one.\n"""\n\nimport os\ndef f(x):\n'
ILF = {
    "prompt": HEAD,
    "original_model_completion": HEAD + '    """Adds one."""\n    y = x - 1\n\n    return  y\n',
    "unedited_annotator_completion": HEAD + "    y = x + 1\n    return y\n",
    "Feedback": "It takes one away.\nIt should add it.",
}


def marked(record, sign):
    """Returns the texts that the record's quotes mark; each quote must be found as it stands."""
    feedback = Feedback(record["critique"], record["good_spans"], record["poor_spans"])
    spans, counts = resolve(record["response"], feedback)
    assert counts["lost"] == counts["fuzzy"] == 0
    return [record["response"][a:b] for a, b, score in spans if score == sign]


def at(text, *parts):
    return [(text.index(part), text.index(part) + len(part)) for part in parts]


def test_lines_that_the_mended_program_lacks_are_poor_and_kept_ones_good():
    [record] = records([ILF], "rows")
    assert record["poor_spans"] == ["y = x - 1"] and record["good_spans"] == ["return  y"]
    assert record["critique"] == "It takes one away. It should add it."
    assert record["prompt"].endswith("def f(x):") and record["response"].startswith("```python")


def test_what_a_correction_removed_is_poor_and_the_facts_that_it_kept_are_good():
    [record] = records([DEFACTO], "rows")
    assert marked(record, 1) == ["Paris"] and marked(record, -1) == ["Didier", "23"]
    assert record["kinds"] == ["extrinsic", "extrinsic"] and record["status"] == "ok"
    explained = "No first name is given. Nor how many players."
    instructed = "Remove the information about Didier from the summary."
    assert record["critique"] == f"{explained} {instructed}"
    assert DEFACTO["article"] in record["prompt"] and record["response"] == DEFACTO["candidate"]


def test_a_response_without_error_has_nothing_poor():
    feedback = {"summary": "", "explanation": "All right.", "instruction": ""}
    row = DEFACTO | {"has_error": False, "extrinsic_error": False}
    [record] = records([row | {"feedback": feedback | {"instruction_list": []}}], "rows")
    assert record["poor_spans"] == record["kinds"] == [] and record["critique"] == "All right."


def test_marked_errors_become_sentences_and_quotes_and_the_rest_is_good():
    [record] = records([QA], "rows")
    assert marked(record, 1) == ["Bloom is an album", "Many people like it very much"]
    assert marked(record, -1) == ["by Ana", "It came out in May."]
    assert record["kinds"] == ["Unverifiable", "Wrong-Grounding"]
    assert record["critique"] == (
        '"by Ana" stands in none of the passages. '
        '"It came out in May." is not what the passages say: It came out on 31 August 2018. '
        "It leaves out: It came out on 31 August 2018."
    )
    assert "Ana sings." in record["prompt"] and QA["question"] in record["prompt"]


def test_files_can_be_joined_and_equal_ids_of_other_responses_are_refused(tmp_path, refused):
    path, rows = tmp_path / "all.jsonl", records([DEFACTO], "a/defacto.jsonl")
    rows += records([QA], "a/answers.jsonl")
    write_whole(path, rows)
    assert len(read_usable(path)) == 2
    write_whole(path, [row | {"id": "1"} for row in rows])
    assert "record 2 of" in refused(read_usable, path)


def test_a_finished_record_is_taken_as_it_is():
    row = {"id": "7", "prompt": "p", "response": "Ana is 27.", "critique": "She is 41."}
    row |= {"good_spans": [], "poor_spans": ["27"]}
    assert records([row], "rows") == [row | {"status": "ok", "reason": ""}]


def test_what_people_filled_in_is_checked_and_the_invalid_rows_are_reported(capsys, refused):
    row = {"prompt": "p", "response": "Ana is 27.", "critique": "Her age is wrong."}
    quote = {"text": "ANA IS", "severity": 0.5}
    valid = row | {"poor_spans": ["27"], "kinds": ["age"], "good_spans": [quote]}
    faults = {
        "critique": row | {"critique": ""},
        "quote 1 of poor_spans": row | {"poor_spans": ["nowhere"]},
        '"kinds"': valid | {"kinds": ["x", "y"]},
    }
    [record] = records([*faults.values(), valid], "rows")
    assert record["good_spans"] == [{"text": "Ana is", "severity": 0.5}]
    for number, (fault, line) in enumerate(zip(faults, capsys.readouterr().out.splitlines()), 1):
        assert f"row {number} of rows" in line and fault in line
    assert "no row of rows has valid feedback" in refused(records, [faults["critique"]], "rows")


BAD_QUOTE = {"critique": "c", "good_spans": [], "poor_spans": [1]}


@pytest.mark.parametrize("row", [{}, {"candidate": "x"}, QA | {"passages": None}, BAD_QUOTE])
def test_a_row_of_no_known_form_is_named(row, refused):
    assert "row 2 of rows.jsonl has no known form" in refused(records, [ILF, row], "rows.jsonl")


def test_ranges_with_only_link_words_between_them_are_joined():
    text = "He died in the city of Leeds, and she in York"
    ranges = joined(text, at(text, "York", "city", "died", "Leeds", "city of"))
    assert ranges == at(text, "died in the city of Leeds", "York")


def test_the_longest_runs_end_at_sentences_and_at_what_is_wrong():
    text = "One two three four five. Six seven WRONG eight nine ten eleven twelve thirteen"
    runs = longest_kept(text, at(text, "WRONG"))
    assert runs == at(text, "One two three four five", "eight nine ten eleven twelve thirteen")


SHARES = [("defacto/train", 0.21), ("defacto/val", 0.19), ("finegrained_qa/first250", 0.60)]


@pytest.mark.parametrize(("name", "share"), SHARES)
def test_real_feedback_stands_in_its_responses_to_the_letter(public_data, name, share):
    found = records(read_jsonl(public_data(f"{name}.jsonl")), name)
    assert all(len(record["kinds"]) == len(record["poor_spans"]) for record in found)
    poor = sum(len(quote) for record in found for quote in marked(record, -1))
    assert abs(poor / sum(len(record["response"]) for record in found) - share) < 0.01
