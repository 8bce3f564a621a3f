"""Data sets in their published forms, what tasks make of them, and the stages before a script."""

import argparse
import gzip
import json
import os
import random
import signal
import sys
import threading
import time
import types
from functools import partial

import pytest

from t2g import cli, data, stages, tasks
from t2g.tasks import qa, summarize, toy

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


# ---- rows --------------------------------------------------------------------------------------


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


# ---- readers -----------------------------------------------------------------------------------


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


# ---- a task of one's own -----------------------------------------------------------------------

OWN = """
from __future__ import annotations
import dataclasses
from t2g.tasks import Example
METRICS = {"good": "share"}
load = lambda args: ([Example("a", "b", {})], [Example("c", "", {})])
score = lambda example, response: {"good": 1}
@dataclasses.dataclass
class Data:
    x: int
"""
BROKEN = [  # what is added to the file, and what the sentence names
    ("import no_such_module", "cannot be imported: No module"),
    ("METRICS = ['good']", "METRICS of"),
    ("METRICS = {'good': 1}", "METRICS of"),
    ("METRICS |= {'reward': ''}", "reward"),
    ("METRICS |= {'good_greedy': ''}", "good_greedy"),
    ("load = lambda: 0", "must define load(args)"),
    ("score = 0", "must define score(example, response)"),
    ("critique = lambda response: 0", "must define critique(example, response)"),
    ("add_flags = lambda add: add('--seed', 1, 'x')", "--seed"),
    *((f"load = lambda args: {value}", "(train, heldout)") for value in
      ("None", "[Example('a', '', {})]", "Example('a', 'b', {})", "('a', 'b')")),
    *((f"load = lambda args: {value}", "none held out") for value in ("([], [1])", "([1], [])")),
    *((f"load = lambda args: ([{value}], [1])", "not an Example") for value in
      ("'prompt'", "('a', 'b', {})", "Example(None, '', {})", "Example('a', None, {})")),
]  # fmt: skip


def load_own(path, source):
    """Imports a task and loads its examples, as each stage does."""
    path.write_text(OWN + source)
    parser = argparse.ArgumentParser()
    tasks.add_flags(cli.flags(parser))
    parser.set_defaults(task=str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_ppo.py"])
        return tasks.load(*tasks.parse(parser, "train_ppo"))


@pytest.mark.parametrize(("source", "named"), BROKEN)
def test_a_task_that_breaks_the_contract_is_refused(tmp_path, refused, source, named):
    assert named in refused(load_own, tmp_path / "mine.py", source)


def test_a_task_of_one_s_own_may_have_one_example_and_half_an_emoji(tmp_path, capsys):
    source = "load = lambda args: ([Example('a \\ud83d', '', {})], [Example('b', '\\udfff', {})])"
    assert load_own(tmp_path / "mine.py", source) == [[("a ?", "", {})], [("b", "?", {})]]
    assert "half a surrogate pair" in capsys.readouterr().out


def test_an_error_inside_a_task_keeps_its_traceback(tmp_path):
    with pytest.raises(KeyError):
        load_own(tmp_path / "mine.py", "load = lambda args: {}['bug']")


# ---- lengths -----------------------------------------------------------------------------------


LENGTHS = [  # max_prompt_length, response_length, what is kept, and why the rest is not
    (None, 0, [1, 20, 200], ""),
    (None, 200, [1, 20], "2 of 3"),
    (12, 200, [1], "1 of 3"),
]


@pytest.mark.parametrize(("longest", "response_length", "kept", "reason"), LENGTHS)
def test_prompts_that_leave_no_room_for_a_response_are_dropped(
    model, tokenizer, capsys, refused, longest, response_length, kept, reason
):
    """The context is 256 tokens."""
    examples = [tasks.Example("a" * count, "", {}) for count in (1, 20, 200)]
    args = types.SimpleNamespace(max_prompt_length=longest, response_length=response_length)
    left = tasks.short_enough(examples, tokenizer, model, args)
    assert [len(example.prompt) for example in left] == kept
    printed = capsys.readouterr().out
    assert reason in printed and bool(reason) == bool(printed)
    for longest, response_length, flag in ((2, 200, "--max_prompt_length"), (12, 256, "context")):
        args = types.SimpleNamespace(max_prompt_length=longest, response_length=response_length)
        assert flag in refused(tasks.short_enough, examples, tokenizer, model, args)


# ---- stages ------------------------------------------------------------------------------------


ENDS = [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]


@pytest.mark.parametrize(("number", "ends_with"), ENDS)
def test_a_signal_ends_the_running_stage_too(tmp_path, number, ends_with):
    script, started = tmp_path / "stage.py", tmp_path / "pid"
    write_pid = "open(sys.argv[1], 'w').write(str(os.getpid()))"
    script.write_text(f"import os, sys, time; {write_pid}; time.sleep(60)")

    def stop():
        while not (started.exists() and started.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    handler = print  # without one, the process that runs the tests might end
    before = signal.signal(signal.SIGTERM, handler)
    threading.Thread(target=stop).start()
    with pytest.raises(ends_with) as stopped:
        stages.run("stage", [str(script), str(started)])
    assert signal.signal(signal.SIGTERM, before) is handler
    assert number == signal.SIGINT or stopped.value.code == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_earlier_stages_get_the_same_flags_and_those_of_the_task(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(stages, "run", lambda title, command: commands.append(" ".join(command)))
    task = tmp_path / "mine.py"
    task.write_text(OWN + "add_flags = lambda add: add('--mine', 1, 'its own flag')")
    args = flags(task, "a.jsonl", "--heldout_data", "b.jsonl", "--bf16")
    args.mine = 7
    stages.ensure(["sft", "annotate", "rm"], args, tmp_path)
    assert len(commands) == 3
    given = ("--heldout_data b.jsonl --", "--bf16 --", "--mine 7")
    assert all(flag in command for command in commands for flag in given)
    stages.ensure(["sft", "annotate", "rm"], args, tmp_path, policy="p")
    assert "--policy p" in commands[3] and "--model p" in commands[4] and len(commands) == 5


def test_a_stage_that_was_made_with_other_flags_is_named(tmp_path, capsys):
    (tmp_path / "sft" / "checkpoint-1").mkdir(parents=True)
    args = flags("toy", "a.jsonl", "--chat_template_kwargs", '{"a": 1}')
    other = vars(args) | {"chat_template_kwargs": None, "seed": 1}
    (tmp_path / "sft" / "config.json").write_text(json.dumps(other))
    stages.ensure(["sft"], args, tmp_path)
    assert "made with another chat_template_kwargs, seed;" in capsys.readouterr().out


def test_a_revision_fixes_the_faults_that_the_critique_names_and_nothing_else():
    rng = random.Random(1)
    for _ in range(200):
        example = toy.make_example(rng)
        response = toy.noisy_summary(example, rng)
        remarks = toy.judge(example, response)
        assert toy.score(example, toy.revise(response, remarks))["perfect"] == 1
        kept = [remark for remark in remarks if remark.kind == "good" or rng.random() < 0.5]
        after = toy.judge(example, toy.revise(response, kept))
        assert sum(remark.kind != "good" for remark in after) <= len(remarks) - len(kept)
        assert toy.revise(response, []) == response


@pytest.mark.parametrize("flag", ["model", "policy"])
def test_the_toy_trains_and_shows_no_hub_model_but_measures_any(flag, refused):
    args = argparse.Namespace(data=None, **{flag: "hub/model"})
    for script in ("annotate", "eval", "benchmark"):
        toy.check(args, script)
    for script in ("train_sft", "train_rm", "dpo"):
        assert "hub/model is no folder" in refused(toy.check, args, script)
