"""The task of programs: published problems, the permission to run code, and records with tests."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
from annotating import write

from extras.code import problems, sandbox
from extras.code import task as code
from t2g import data, tasks
from t2g.log import read_jsonl

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")
KODCODE = {
    "question": "Double a number.", "solution": "def double(x):\n    return 2 * x",
    "test": "from solution import double\n\ndef test_two():\n    assert double(2) == 4",
    "test_info": [{"function_name": "double", "function_declaration": "def double(x):"}],
}  # fmt: skip
DEMO = {**KODCODE, "test_code": KODCODE["test"], "test": None}
MBPP = {
    "text": "Write a function to double a number.", "code": "def double(x):\r\n  return 2 * x",
    "task_id": 1, "test_setup_code": "",
    "test_list": ["assert double(2) == 4", "assert double(0) == 0"], "challenge_test_list": [],
}  # fmt: skip
SANITIZED = {
    "prompt": MBPP["text"], "code": MBPP["code"], "test_imports": ["import math"],
    "test_list": ["assert math.isclose(double(0.1), 0.2)"],
}  # fmt: skip


def load(path):
    return code.load(Namespace(task="code", data=str(path), heldout_data=None))


def test_rows_of_no_known_form_are_refused(tmp_path, refused):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}])
    assert "question, solution, test or" in refused(load, path)


@pytest.mark.parametrize("row", [KODCODE, DEMO, MBPP, SANITIZED])
def test_problems_are_read_in_each_form_and_their_solutions_pass(tmp_path, row):
    another = {**row, "text": "Another.", "question": "Another.", "prompt": "Another."}
    train, heldout = load(write(tmp_path / "a.jsonl", [row, another]))
    (example,) = [one for one in train + heldout if "nother" not in one.prompt]
    assert "```python block" in example.prompt and "double" in example.prompt
    assert example.reference.startswith("```python\n") and "\r" not in example.reference
    scores = {"pass": 1, "parses": 1, "timeout": 0, "lines": 2}
    assert code.score(example, example.reference) == scores


def test_a_function_with_the_name_of_a_builtin_is_the_solution_s():
    row = {**MBPP, "code": "def sum(a, b): return a + b", "test_list": ["assert sum(1, 2) == 3"]}
    assert "from solution import sum" in problems.mbpp(row).facts["tests"]


F = "from solution import double\n"
OWN = "def double(x):\n    return 2 * x\n"
INHERITED = "class TestF(Base):\n    def test_f(self):\n        assert double(2) == 4"
REFUSED = [  # tests, a word of the reason, or "" if they can be used
    ("def test_a(tmp_path): pass", "fixtures"),
    ("@pytest.mark.parametrize('x', [1])\ndef test_a(x=1): pass", "fixtures"),
    ("class TestF:\n    def setup_method(self): pass", "fixtures"),
    (INHERITED, "inherit"),
    ("import no_such_package.part", "the package no_such_package"),
    ("assert f(", "not Python"),
    ("import solution", "no test"),
    ("def check_f():\n    assert f(2) == 4", "no test"),
    ("class Checks:\n    def test_f(self):\n        assert f(2) == 4", "no test"),
    ("if __name__ == '__main__':\n    assert f(2) == 4", "no test"),
    ("async def test_f():\n    assert f(2) == 4", "async"),
    ("def test_f():\n    yield\n    assert f(2) == 4", "generators"),
    (f"{OWN}def test_two():\n    assert double(2) == 4", "nothing of the solution"),
    (f"{F}{OWN}assert double(2) == 4", "nothing of the solution"),
    (f"{F}assert 2 + 2 == 4", "nothing of the solution"),
    (f"{OWN}def test_two(x: List = ()):\n    assert double(2) == 4", "nothing of the solution"),
    (f"{F}class TestF:\n    def test_a(self): assert double(1)", ""),
    ("from solution import double as f\ndef double(x): return f(x)\nassert double(2) == 4", ""),
    ("import solution\nassert solution.double(2) == 4", ""),
    ("def test_two():\n    double_ = double\n    assert double_(2) == 4", ""),
]


@pytest.mark.parametrize(("tests", "reason"), REFUSED)
def test_rows_whose_tests_judge_nothing_are_dropped_and_counted(tmp_path, capsys, tests, reason):
    rows = [{**KODCODE, "question": str(n)} for n in range(3)] + [{**KODCODE, "test": tests}]
    train, heldout = load(write(tmp_path / "a.jsonl", rows))
    assert len(train) + len(heldout) == 3 + (not reason)
    printed = capsys.readouterr().out
    assert reason in printed and ("3 of 4 rows" in printed) == bool(reason)


@pytest.mark.parametrize("tests", [5, {"a": 1}, None, ["assert f(2) == 4", 5]])
def test_tests_that_are_no_text_are_refused(tests, refused):
    example = tasks.Example("p", "", {"tests": tests})
    assert "unit tests must be a text" in refused(code.critique, example, "def f(x): return x")


PERMISSION = [  # script, flags, whether it runs programs
    ("train_ppo", {"critic": "rm"}, True),
    ("eval", {"what": "policy"}, True),
    ("eval", {"what": "rm", "annotations": None}, True),
    ("eval", {"what": "rm", "annotations": "truth.jsonl"}, False),
    ("eval", {"what": "page"}, False),
    ("annotate", {"critic": None, "model": None, "base_url": None}, True),
    ("annotate", {"critic": None, "model": "gpt", "base_url": None}, False),
    ("annotate", {"critic": "rule", "model": None, "base_url": None}, True),
    ("train_sft", {"model": None}, False),
    ("scalar_rm", {}, False),
    ("dpo", {"critic": "rule"}, True),
    ("benchmark", {}, True),
]


@pytest.mark.parametrize(("script", "flags", "runs"), PERMISSION)
def test_running_programs_must_be_allowed(refused, script, flags, runs):
    args = Namespace(allow_code_execution=False, **flags)
    if runs:
        assert "--allow_code_execution" in refused(code.check, args, script)
    else:
        code.check(args, script)


def test_the_console_says_what_protects_the_machine(monkeypatch, capsys, refused):
    allowed = Namespace(allow_code_execution=True)
    code.check(allowed, "train_ppo")
    assert "limits of time, memory" in capsys.readouterr().out
    monkeypatch.setattr(sandbox, "protections", lambda: ["not root"])
    code.check(allowed, "train_ppo")
    warning = "cannot guarantee no file but Python's, read-only, no network"
    assert warning in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(sandbox, "JAIL", Path("none.py"))
    sandbox.protections.cache_clear()
    assert "no program can run here: " in refused(code.check, allowed, "train_ppo")


def test_annotate_judges_records_by_unit_tests_of_their_own(serve, tmp_path, call):
    records = [
        {"id": str(n), "prompt": "Double.", "response": f"def f(x):\n    return x * {n}",
         "tests": "assert f(3) == 6"}
        for n in (2, 3)
    ]  # fmt: skip
    source, out = write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    given = ("--task", "extras/code/task.py", "--responses", source)
    assert "--allow_code_execution" in call(*given, "--out", out)[1]
    assert call(*given, "--out", out, "--allow_code_execution")[0] == 0
    right, wrong = read_jsonl(out)
    assert (right["good_spans"], right["poor_spans"]) == (["return x * 2", "def f(x):"], [])
    assert (wrong["good_spans"], wrong["poor_spans"]) == (["def f(x):"], ["return x * 3"])
    assert "f(3) is 9, not 6" in wrong["critique"]

    served = tmp_path / "served.jsonl"
    server = (*given, "--out", served, "--model", "m", "--base_url", serve()[0])
    assert "without --allow_code_execution" in call(*server)[1]
    assert not any("test_log" in row for row in read_jsonl(served))
    served.unlink()
    call(*server, "--allow_code_execution")
    logs = {row["id"]: row["test_log"] for row in read_jsonl(served)}
    assert "f(3) is 9, not 6" in logs["3"]

    write(source, [records[0] | {"tests": "assert ("}])
    out.unlink()
    printed = call(*given, "--out", out, "--allow_code_execution")[1]
    assert "unit tests of record 2 cannot run" in printed


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "form", "share"),
    [("kodcode_demo/rl.jsonl", problems.kodcode, 1), ("mbpp/mbpp.jsonl", problems.mbpp, 0.999)],
)
def test_real_solutions_pass_their_tests(public_data, name, form, share, every):
    rows = data.read_rows(str(public_data(name)))
    examples = [one for one in map(form, rows) if isinstance(one, tasks.Example)][::every]
    examples = examples[:5] if every > 1 else examples
    passed = [code.score(example, example.reference)["pass"] for example in examples]
    assert sum(passed) / len(passed) >= share
