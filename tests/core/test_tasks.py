"""Data sets in their published forms, and what tasks make of them."""

import argparse
import gzip
import json
import sys
import types
from functools import partial

import pytest

from t2g import cli, data, tasks
from t2g.tasks import qa, summarize

SLF5K = {
    "id": "t3_1", "subreddit": "relationships", "title": "My dog left me",
    "post": "He is 7. I fed him well.\n", "summary_prompt": "Title: ...",
    "ideal_human_summary": "A dog of 7 left its owner.",
    "generated_summary_for_comparison_A": "A dog.", "comparison_preference": "Summary A",
    "generated_summary_for_feedback": "A dog of 8 left.", "feedback": "The dog is 7.",
}  # fmt: skip
SYSTEM, AGAIN = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "5."}
TURNS = [
    {"content": "What is 2 + 2?", "role": "user"},
    {"content": "It is 4.", "role": "assistant"},
    {"content": "And 3?", "role": "user"},
]
SHAREGPT = [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "It is 4."}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "What is 2 + 2?"}]}]


def flags(task, path, *more):
    """The arguments of a script with --task, --data and more flags."""
    parser = argparse.ArgumentParser()
    tasks.add_flags(cli.flags(parser))
    summarize.add_flags(cli.flags(parser))
    return parser.parse_args(["--task", str(task), "--data", str(path), *map(str, more)])


def write(path, rows):
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(rows), path)
        return path
    text = json.dumps(rows) if ".json" in path.suffixes else "\n".join(map(json.dumps, rows)) + "\n"
    mode = dict(mode="wt", encoding="utf-8-sig" if path.suffix == ".jsonl" else "utf-8")
    with (gzip.open if path.suffix == ".gz" else open)(path, **mode) as file:
        file.write(text)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz", "a.json.gz"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    rows = [SLF5K, {"chosen": TURNS} if "parquet" not in name else SLF5K]
    assert data.read_rows(str(write(tmp_path / name, rows))) == rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_surrogate_pair_becomes_a_question_mark_and_is_reported(tmp_path, capsys, name):
    rows = [{"article": "Lyon \ud83d", "n": [1.5, None]}, {"article": "Porto 😀"}]
    read = data.read_rows(str(write(tmp_path / name, rows)))
    assert read == [rows[0] | {"article": "Lyon ?"}, rows[1]]
    assert "half" in capsys.readouterr().out


zipped = partial(gzip.compress, mtime=0)  # the bytes are in the names of tests
DAMAGED = [  # name, content, what the sentence says
    ("a.json", b"[{", "a.json cannot be read"),
    ("a.json.gz", zipped(b"[1]")[:-9], "a.json.gz cannot be read"),
    ("a.json.gz", zipped(b"[1]" * 99).replace(b"\x8b", b"\xff"), "a.json.gz cannot be read"),
    ("a.jsonl.gz", zipped(b"{}")[:10] + b"\xff" * 9, "a.jsonl.gz cannot be read"),
    ("a.jsonl.gz", zipped(b"{}\n{"), "a.jsonl.gz is not a JSON object"),
    ("a.jsonl", b'{}\n"x"', "a.jsonl is not a JSON object"),
    ("a.jsonl", b"{}\n\xff", "a.jsonl cannot be read"),
    ("a.csv", b"a,b", "a.csv is not a .jsonl"),
]


@pytest.mark.parametrize(("name", "content", "problem"), DAMAGED)
def test_a_damaged_or_unknown_file_is_refused(tmp_path, refused, name, content, problem):
    (tmp_path / name).write_bytes(content)
    sentence = refused(data.read_rows, str(tmp_path / name))
    assert problem in sentence and ("line 2" in sentence) == ("object" in problem)


def test_a_hub_id_is_loaded_by_datasets_with_its_split_or_refused(monkeypatch, refused):
    calls = []

    def load_dataset(name, split):
        calls.append((name, split))
        if split == "none":
            raise RuntimeError("scripts are not supported\nfor some reason")
        return iter([SLF5K])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for arguments in (["a/b:train_prefs"], ["a/b"], ["a/b", "test"]):
        assert data.read_rows(*arguments) == [SLF5K]
    assert calls == [("a/b", "train_prefs"), ("a/b", "train"), ("a/b", "test")]
    assert "a/b:none: scripts are not supported." in refused(data.read_rows, "a/b:none")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refused(data.read_rows, "JeremyAlain/SLF5K")


def test_slf5k_is_recognised_by_its_fields_and_keeps_human_feedback(tmp_path):
    rows = [SLF5K, {**SLF5K, "post": "Another.", "feedback": None}]
    ((a,), (b,)) = summarize.load(flags("summarize", write(tmp_path / "train.jsonl", rows)))
    a, b = sorted((a, b), key=lambda example: len(example.prompt), reverse=True)
    assert a.facts["source"] == "My dog left me\n\nHe is 7. I fed him well."
    assert a.facts["source"] in a.prompt and a.reference == "A dog of 7 left its owner."
    assert a.facts["candidate"] == "A dog of 8 left." and a.facts["feedback"] == "The dog is 7."
    assert set(b.facts) == {"source"}
    assert "8" in summarize.critique(a, a.facts["candidate"]).poor[0]


def test_other_summaries_are_read_by_the_names_of_their_fields(tmp_path, capsys, refused):
    rows = [{"text": f"Ana is {n}.", "summary": str(n)} for n in range(10)]
    rows += [{"text": "Ana is 3.", "summary": "a"}, {"text": " "}, {}]
    path = write(tmp_path / "a.jsonl", rows)
    fields = ("--source_field", "text", "--reference_field", "summary")
    train, heldout = summarize.load(flags("summarize", path, *fields))
    assert len(train) == 8 and len(heldout) == 2
    assert not {example.prompt for example in train} & {example.prompt for example in heldout}
    printed = capsys.readouterr().out
    assert "10 of 13 rows" in printed and "1 (an earlier" in printed and "2 (they lack" in printed
    sentence = refused(summarize.load, flags("summarize", path))
    assert "article" in sentence and "text, summary" in sentence and "--source_field" in sentence


def test_heldout_data_is_not_trained_on(tmp_path, refused, capsys):
    rows = [{"prompt": str(n), "chosen": "x"} for n in range(10)]
    path, held = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:4])
    train, heldout = qa.load(flags("qa", path, "--heldout_data", held))
    assert [example.prompt for example in heldout] == list("0123")
    assert [example.prompt for example in train] == list("456789")
    assert f"4 prompts of {path} are held out, and dropped" in capsys.readouterr().out
    one = write(tmp_path / "c.jsonl", rows[:1])
    for args in (flags("qa", held, "--heldout_data", path), flags("qa", one)):
        assert "no examples to train on, or none held out" in refused(tasks.load, qa, args)


ONE_TURN = [
    {"prompt": "What is 2 + 2?", "chosen": TURNS[:2], "rejected": TURNS[:1]},
    {"chosen": TURNS, "rejected": TURNS[:2], "score_chosen": 8.5, "score_rejected": 6.0},
    {"prompt": "What is 2 + 2?", "chosen": "It is 4.", "rejected": "5", "metadata": {}},
    {"prompt": TURNS[:1], "chosen": TURNS[1:2]},
    {"chosen": SHAREGPT},
    {"prompt": PARTS, "chosen": TURNS[1:2]},
    {"messages": TURNS[:2]},
    {"conversations": SHAREGPT},
    {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1]},
    {"prompt": TURNS[:1], "completion": TURNS[1:2], "messages": TURNS},
    {"prompt": [{"role": "system", "content": ""}, *TURNS[:1]], "chosen": "It is 4."},
    {"messages": [{"role": "User", "content": "What is 2 + 2?"}, {**TURNS[1], "role": "model"}]},
]
SEVERAL_TURNS = [
    {"prompt": [SYSTEM, *TURNS], "chosen": [AGAIN]},
    {"prompt": [SYSTEM, *TURNS], "chosen": "5."},
    {"prompt": "And 3?", "chosen": [SYSTEM, *TURNS, AGAIN]},
    {"prompt": [SYSTEM], "chosen": [*TURNS, AGAIN]},
    {"prompt": [SYSTEM, *TURNS[:1]], "chosen": [*TURNS, AGAIN]},
]
NO_EXAMPLE = [
    {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "Porto."},
    {"prompt": [*TURNS[:1], {"role": "assistant", "content": None}], "chosen": "5."},
    {"prompt": "Why?", "chosen": TURNS[2:]},
    {"prompt": "Why?"},
    {"chosen": "So."},
    {"prompt": ["Why?"], "chosen": "So."},
    {"prompt": [{"role": 1, "content": ""}], "chosen": "So."},
    {"prompt": TURNS, "chosen": None},
]


def test_a_request_a_conversation_and_rows_without_a_text():
    for row in ONE_TURN:
        assert qa.example_of(row) == ("What is 2 + 2?", "It is 4.", {})
    turns = "User: What is 2 + 2?\n\nAssistant: It is 4.\n\nUser: And 3?"
    for row in SEVERAL_TURNS:
        assert qa.example_of(row) == (f"System: Be brief.\n\n{turns}", "5.", {})
    for row in NO_EXAMPLE:
        assert qa.example_of(row) is None


def test_qa_has_scores_and_no_rule(tmp_path, refused):
    example = tasks.Example("?", "one two three four", {})
    assert qa.score(example, "one two three four") == {"rouge_l": 1, "words": 4, "repeated": 0}
    assert qa.score(example, "a b c a b c")["repeated"] == 0.25
    assert qa.score(example, "")["words"] == 0
    assert set(qa.METRICS) == set(qa.score(example, "x")) and not hasattr(qa, "critique")
    path = write(tmp_path / "a.jsonl", [{"text": "a"}])
    sentence = refused(qa.load, flags("qa", path))
    assert "chosen, completion, messages, conversations; it has text" in sentence
