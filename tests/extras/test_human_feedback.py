"""What people said, made into records that a reward model learns from; on made-up rows, and on real ones where they are at hand."""

import json
from pathlib import Path

import pytest

from extras.human.records import joined, longest_kept, records
from t2g.align import resolve
from t2g.feedback import Feedback

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
DEFACTO = {
    "article": "Deschamps praised his side in Paris. He has coached France since 2012.",
    "candidate": "France coach Didier Deschamps praised his 23 players in Paris.",
    "abstract": "Deschamps is pleased.",
    "has_error": True,
    "intrinsic_error": False,
    "extrinsic_error": True,
    "feedback": {
        "summary": "France coach Deschamps praised his players in Paris.",
        "explanation": "No first name is given.\nNor how many players.",
        "instruction": "Remove the information about Didier from the summary. Remove the information about how many players.",
        "instruction_list": ["Remove the information about Didier from the summary."],
    },
}
QA = {
    "question": "When did Bloom come out?",
    "passages": [
        ["Bloom", "Bloom is an album.", "It came out on 31 August 2018."],
        ["Ana", "Ana sings."],
    ],
    "prediction 1": "Bloom is an album by Ana. It came out in May. Many people like it very much indeed.",
    "feedback": {
        "errors": [
            {
                "error type": "Wrong-Grounding",
                "explanation": '{"passage_id": 1, "sentence_id": [2]}',
                "start": 26,
                "end": 45,
            },
            {"error type": "Unverifiable", "explanation": "", "start": 18, "end": 24},
        ],
        "missing-info": [{"error type": "Missing-Answer", "passage_id": 1, "sentence_id": [2]}],
    },
}


def places(record):
    spans, counts = resolve(
        record["response"], Feedback(record["critique"], record["good_spans"], record["poor_spans"])
    )
    assert counts["lost"] == counts["fuzzy"] == 0
    return {
        sign: [record["response"][a:b] for a, b, score in spans if score == sign]
        for sign in (1, -1)
    }


HEAD = '"""\nWrite a function to add one.\n"""\n\nimport os\ndef f(x):\n'
ILF = {
    "prompt": HEAD,
    "original_model_completion": HEAD + '    """Adds one."""\n    y = x - 1\n\n    return  y\n',
    "unedited_annotator_completion": HEAD + "    y = x + 1\n    return y\n",
    "Feedback": "It takes one away.\nIt should add it.",
}


def test_of_a_program_the_lines_that_the_mended_one_lacks_are_poor_and_kept_ones_good():
    [record] = records([ILF], "x")
    assert record["poor_spans"] == ["y = x - 1"] and record["good_spans"] == ["return  y"]
    assert record["critique"] == "It takes one away. It should add it."
    assert record["prompt"].endswith("def f(x):") and record["response"].startswith("```python")


def test_a_correction_says_what_is_poor_and_the_facts_that_it_left_are_good():
    [record] = records([DEFACTO], "rows")
    assert places(record) == {1: ["Paris"], -1: ["Didier", "23"]}
    assert (
        record["kinds"] == ["extrinsic", "extrinsic"]
        and record["status"] == "ok"
        and "\n" not in record["critique"]
    )
    assert record["critique"].startswith(
        "No first name is given. Nor how many players. Remove the information about Didier"
    )
    assert DEFACTO["article"] in record["prompt"] and record["response"] == DEFACTO["candidate"]


def test_a_response_without_error_has_nothing_poor():
    said = {
        "summary": "",
        "explanation": "All of it stands there.",
        "instruction": "",
        "instruction_list": [],
    }
    [record] = records(
        [DEFACTO | {"has_error": False, "extrinsic_error": False, "feedback": said}], "rows"
    )
    assert (
        record["poor_spans"] == record["kinds"] == []
        and record["critique"] == "All of it stands there."
    )


def test_marked_errors_become_sentences_and_quotes_and_what_has_none_is_good():
    [record] = records([QA], "rows")
    assert places(record) == {
        1: ["Bloom is an album", "Many people like it very much indeed"],
        -1: ["by Ana", "It came out in May."],
    }
    assert record["kinds"] == ["Unverifiable", "Wrong-Grounding"]
    assert record["critique"] == (
        '"by Ana" stands in none of the passages. '
        '"It came out in May." is not what the passages say: It came out on 31 August 2018. '
        "It leaves out: It came out on 31 August 2018."
    )
    assert "Ana sings." in record["prompt"] and QA["question"] in record["prompt"]


def test_a_record_that_somebody_filled_in_is_taken_as_it_is():
    row = {
        "id": "7",
        "prompt": "p",
        "response": "Ana is 27.",
        "critique": "She is 41.",
        "good_spans": [],
        "poor_spans": ["27"],
    }
    assert records([row], "rows") == [row | {"status": "ok", "reason": ""}]


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"candidate": "x"},
        QA | {"passages": None},
        {"critique": "c", "good_spans": [], "poor_spans": [1]},
    ],
)
def test_a_row_in_no_known_form_is_named(row, capsys):
    with pytest.raises(SystemExit):
        records([DEFACTO, row], "rows.jsonl")
    assert "row 2 of rows.jsonl has no known form" in capsys.readouterr().err


def test_ranges_with_only_link_words_between_them_are_one():
    text = "He died in the city of Leeds, and she in York"
    at = [
        (text.index(word), text.index(word) + len(word))
        for word in ("York", "city", "died", "Leeds", "city of")
    ]
    assert [text[slice(*place)] for place in joined(text, at)] == [
        "died in the city of Leeds",
        "York",
    ]


def test_the_longest_runs_end_at_sentences_and_at_what_is_wrong():
    text = "One two three four five. Six seven WRONG eight nine ten eleven twelve thirteen"
    runs = longest_kept(text, [(text.index("WRONG"), text.index("WRONG") + 5)])
    assert [text[slice(*place)] for place in runs] == [
        "One two three four five",
        "eight nine ten eleven twelve thirteen",
    ]


@pytest.mark.parametrize(
    ("name", "share"),
    [("defacto/train", 0.21), ("defacto/val", 0.19), ("finegrained_qa/first250", 0.60)],
)
def test_real_feedback_stands_in_its_responses_to_the_letter(name, share):
    path = DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"the real data is not here: {path}")
    found = records(
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()], name
    )
    poor = sum(len(quote) for record in found for quote in places(record)[-1])
    assert all(len(record["kinds"]) == len(record["poor_spans"]) for record in found)
    assert abs(poor / sum(len(record["response"]) for record in found) - share) < 0.01
