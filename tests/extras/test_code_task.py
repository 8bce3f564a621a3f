"""The task of programs: published problems, unit tests as a critic, and the permission to run code."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from extras.code import sandbox, unit_tests
from extras.code import task as code
from t2g import cli, data, tasks
from t2g.log import read_jsonl

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
linux = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")
KODCODE = {
    "version": "v1.0", "style": "instruct", "subset": "Algorithm", "question_id": "A_1", "question": "Double a number.",
    "solution": "def double(x):\n    return 2 * x",
    "test": "from solution import double\n\ndef test_two():\n    assert double(2) == 4",
    "test_info": [{"function_name": "double", "parameter_list": "(x)", "function_declaration": "def double(x):", "docstring": ""}],
    "gpt_pass_sequence": [1], "gpt_difficulty": "easy",
}  # fmt: skip
MBPP = {
    "text": "Write a function to double a number.", "code": "def double(x):\r\n  return 2 * x", "task_id": 1, "test_setup_code": "",
    "test_list": ["assert double(2) == 4", "assert double(0) == 0"], "challenge_test_list": [],
}  # fmt: skip
SANITIZED = {"source_file": "", "task_id": 2, "prompt": MBPP["text"], "code": MBPP["code"], "test_imports": ["import math"],
             "test_list": ["assert math.isclose(double(0.1), 0.2)"]}  # fmt: skip
ILF = {
    "task_id": 1, "prompt": '"""\nDouble.\n"""\n\nZERO = 0\ndef double(x):\n',
    "test": "def check(candidate):\n\tassert candidate(2) == 4, 'candidate(2) == 4'",
    "Feedback": "It triples.", "completion": "\n    return 2 * x",
    "unedited_annotator_completion": "ZERO = 0\ndef double(x):\n    return 2 * x",
    "original_model_completion": "ZERO = 0\ndef double(x):\n    return 3 * x\n",
}  # fmt: skip


def flags(path):
    """The arguments of a script with --data."""
    parser = argparse.ArgumentParser()
    tasks.add_flags(cli.flags(parser))
    return parser.parse_args(["--data", str(path)])


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


FORMS = {
    "kodcode": KODCODE,
    "demo": {**KODCODE, "test_code": KODCODE["test"]},
    "mbpp": MBPP,
    "sanitized": SANITIZED,
    "ilf": ILF,
}
FORMS["demo"].pop("test")


def rows_of(folder, name):
    path = DATA / folder / name
    if not path.is_file():
        pytest.skip(f"the real data is not here: {path}")
    return data.read_rows(str(path))


def test_rows_of_no_known_form_are_refused(tmp_path, refused):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}])
    assert "question, solution, test; " in refused(code.load, flags(path))


@linux
@pytest.mark.parametrize("form", FORMS)
def test_problems_are_read_in_each_form_and_their_solutions_pass(tmp_path, form):
    rows = [
        FORMS[form],
        {
            **FORMS[form],
            "text": "Another.",
            "question": "Another.",
            "prompt": "def double(x):\n    # another",
        },
    ]
    train, heldout = code.load(flags(write(tmp_path / "a.jsonl", rows)))
    example = next(example for example in train + heldout if "nother" not in example.prompt)
    assert "```python block" in example.prompt and "double" in example.prompt
    assert example.reference.startswith("```python\n") and "\r" not in example.reference
    assert code.score(example, example.reference) == {
        "pass": 1,
        "parses": 1,
        "timeout": 0,
        "lines": len(code.extract_code(example.reference).splitlines()),
    }
    if form == "ilf":
        assert example.facts["feedback"] == "It triples."
        assert (
            code.critique(example, example.facts["candidate"]).critique
            == "It gives a wrong answer: double(2) is 6, not 4."
        )


def test_a_function_with_the_name_of_a_builtin_is_the_solution_s(tmp_path):
    tests = code.mbpp(
        {**MBPP, "code": "def sum(a, b): return a + b", "test_list": ["assert sum(1, 2) == 3"]}
    ).facts["tests"]
    assert "from solution import sum" in tests


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("def test_a(tmp_path): pass", "fixtures"),
        ("@pytest.mark.parametrize('x', [1])\ndef test_a(x=1): pass", "fixtures"),
        ("import no_such_package.part", "the package no_such_package"),
        ("assert f(", "no Python"),
        ("import solution", "no test"),
        ("def check_f():\n    assert f(2) == 4", "no test"),
        ("class Checks:\n    def test_f(self):\n        assert f(2) == 4", "no test"),
        ("if __name__ == '__main__':\n    assert f(2) == 4", "no test"),
        ("async def test_f():\n    assert f(2) == 4", "async"),
        ("def test_f():\n    yield\n    assert f(2) == 4", "generators"),
        ("from solution import double\nclass TestF:\n    def test_a(self): assert double(1)", ""),
    ],
)
def test_tests_that_cannot_run_here_are_left_out_and_counted(tmp_path, capsys, tests, reason):
    assert reason in unit_tests.obstacle(tests) and bool(reason) == bool(unit_tests.obstacle(tests))
    rows = [{**KODCODE, "question": str(n)} for n in range(3)] + [{**KODCODE, "test": tests}]
    train, heldout = code.load(flags(write(tmp_path / "a.jsonl", rows)))
    assert len(train) + len(heldout) == 3 + (not reason)
    assert not reason or (reason in (said := capsys.readouterr().out) and "3 of 4 rows" in said)


@pytest.mark.parametrize(
    ("tests", "used"),
    [
        ("def double(x):\n    return 2 * x\ndef test_two():\n    assert double(2) == 4", False),
        (
            "from solution import double\ndef double(x):\n    return 2 * x\nassert double(2) == 4",
            False,
        ),
        ("from solution import double\nassert 2 + 2 == 4", False),
        (
            "from solution import double as twice\ndef double(x):\n    return twice(x)\nassert double(2) == 4",
            True,
        ),
        ("import solution\nassert solution.double(2) == 4", True),
        ("def test_two():\n    double_ = double\n    assert double_(2) == 4", True),
    ],
)
def test_rows_whose_tests_use_nothing_of_the_solution_are_left_out(tests, used):
    found = code.kodcode({**KODCODE, "test": tests})
    assert isinstance(found, tasks.Example) if used else "use nothing of the solution" in found


@pytest.mark.parametrize(
    ("script", "given", "needed"),
    [
        ("train_ppo", {"critic": "rm"}, True),
        ("eval", {"what": "policy"}, True),
        ("eval", {"what": "rm", "annotations": None}, True),
        ("eval", {"what": "rm", "annotations": "truth.jsonl"}, False),
        ("eval", {"what": "seeds"}, False),
        ("annotate", {"critic": None, "model": None, "base_url": None}, True),
        ("annotate", {"critic": None, "model": "gpt", "base_url": None}, False),
        ("annotate", {"critic": "rule", "model": None, "base_url": None}, True),
        ("train_sft", {"model": None}, False),
    ],
)
def test_running_programs_must_be_allowed(refused, capsys, script, given, needed):
    if needed:
        sentence = refused(
            code.check, argparse.Namespace(allow_code_execution=False, **given), script
        )
        assert "--allow_code_execution" in sentence
    else:
        code.check(argparse.Namespace(allow_code_execution=False, **given), script)


@linux
def test_annotate_judges_records_by_unit_tests_of_their_own(serve, tmp_path, call):
    program = "def f(x):\n    return x * {}"
    records = [
        {
            "id": str(n),
            "prompt": "Double.",
            "response": program.format(n),
            "tests": "assert f(3) == 6",
        }
        for n in (2, 3)
    ]
    given = ("--responses", write(tmp_path / "in.jsonl", records), "--out", tmp_path / "out.jsonl")
    task = ("--task", "extras/code/task.py")
    assert "--allow_code_execution" in call(*task, *given)[1]
    assert call(*task, *given, "--allow_code_execution")[0] == 0
    right, wrong = read_jsonl(tmp_path / "out.jsonl")
    assert (right["good_spans"], right["poor_spans"]) == (["return x * 2"], [])
    assert (wrong["good_spans"], wrong["poor_spans"]) == ([], ["return x * 3"])
    assert "f(3) is 9, not 6" in wrong["critique"]

    out = tmp_path / "served.jsonl"
    served = (*task, *given[:-1], out, "--model", "m", "--base_url", serve()[0])
    assert "without --allow_code_execution" in call(*served, "--dry_run")[1]
    call(*served, "--allow_code_execution")
    logs = {row["id"]: row["test_log"] for row in read_jsonl(out)}
    assert "f(3) is 9, not 6" in logs["3"]

    write(tmp_path / "in.jsonl", [records[0] | {"tests": "assert ("}])
    (tmp_path / "out.jsonl").unlink()
    printed = call(*task, *given, "--allow_code_execution")[1]
    assert "unit tests of record 2 cannot run" in printed


@linux
def test_what_protects_the_machine_and_what_does_not_is_said_where_programs_are_run(
    monkeypatch, capsys, refused
):
    allowed = argparse.Namespace(allow_code_execution=True)
    code.check(allowed, "train_ppo")
    assert "limits of time, memory" in capsys.readouterr().out
    monkeypatch.setattr(sandbox, "protections", lambda: ["not root"])
    code.check(allowed, "train_ppo")
    assert "no file but Python's, read-only, no network" in capsys.readouterr().out

    def broken():
        raise RuntimeError("no fork")

    monkeypatch.setattr(sandbox, "protections", broken)
    assert refused(code.check, allowed, "train_ppo") == "no program can run here: no fork"


@linux
@pytest.mark.parametrize(
    ("folder", "name", "form"),
    [
        ("kodcode_demo", "rl.jsonl", code.kodcode),
        ("mbpp", "mbpp.jsonl", code.mbpp),
        ("ilf_code", "outside_mbppplus.jsonl", code.ilf),
    ],
)
def test_real_solutions_pass_their_tests(folder, name, form):
    examples = [
        example
        for example in map(form, rows_of(folder, name))
        if isinstance(example, tasks.Example)
    ]
    for example in examples[3::20][:5]:
        assert code.critique(example, example.reference).critique == "It passes the tests."


@linux
def test_what_people_called_wrong_fails():
    for row in rows_of("ilf_code", "outside_mbppplus.jsonl")[:5]:
        example = code.ilf(row)
        said = code.critique(example, example.facts["candidate"])
        assert said.poor and not said.good


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "name", "form", "share"),
    [
        ("kodcode_demo", "rl.jsonl", code.kodcode, 1),
        ("mbpp", "mbpp.jsonl", code.mbpp, 0.999),
        ("ilf_code", "outside_mbppplus.jsonl", code.ilf, 1),
    ],
)
def test_all_real_solutions_pass_their_tests(folder, name, form, share):
    examples = [
        example
        for example in map(form, rows_of(folder, name))
        if isinstance(example, tasks.Example)
    ]
    passed = [code.score(example, example.reference)["pass"] for example in examples]
    assert sum(passed) / len(passed) >= share
