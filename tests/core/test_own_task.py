"""A task of one's own, prompts that are too long, and the stages that run before a script."""

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
import types

import pytest
from test_tasks import flags

from t2g import cli, stages, tasks
from t2g.tasks import toy

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
