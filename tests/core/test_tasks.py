"""Data sets in their published forms, what the tasks make of them, and the test run as a critic."""

import argparse
import gzip
import json
import os
import signal
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from extras.code import sandbox, unit_tests
from extras.code import task as code
from t2g import cli, data, stages, tasks
from t2g.tasks import qa, summarize

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
linux = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")

SLF5K = {
    "id": "t3_1", "subreddit": "relationships", "title": "My dog left me", "post": "He is 7. I fed him well.\n",
    "summary_prompt": "Title: ...", "ideal_human_summary": "A dog of 7 left its owner.",
    "generated_summary_for_comparison_A": "A dog.", "generated_summary_for_comparison_B": "Dogs leave.",
    "comparison_preference": "Summary A", "generated_summary_for_feedback": "A dog of 8 left.", "feedback": "The dog is 7.",
    "feedback_class": "Accuracy",
}  # fmt: skip
TURNS = [
    {"content": "What is 2 + 2?", "role": "user"},
    {"content": "It is 4.", "role": "assistant"},
    {"content": "And 3?", "role": "user"},
    {"content": "9", "role": "assistant"},
]
H4 = {"prompt": "What is 2 + 2?", "prompt_id": "ab", "chosen": TURNS[:2], "rejected": TURNS[:1],
      "messages": TURNS[:2], "score_chosen": 8.5, "score_rejected": 6.0}  # fmt: skip
TRL = {"chosen": TURNS, "rejected": TURNS[:2], "score_chosen": 8.5, "score_rejected": 6.0}
TEXTS = {
    "prompt": "What is 2 + 2?",
    "chosen": "It is 4.",
    "rejected": "5",
    "metadata": {"score_chosen": 9.0},
}
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


def flags(task, path, *more):
    """The arguments of a script with --task, --data and more flags."""
    parser = argparse.ArgumentParser()
    tasks.add_flags(cli.flags(parser))
    return parser.parse_args(["--task", task, "--data", str(path), *map(str, more)])


def write(path, rows):
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(
            sys.modules["pyarrow"].Table.from_pylist(rows), path
        )
        return path
    text = json.dumps(rows) if ".json" in path.suffixes else "\n".join(map(json.dumps, rows)) + "\n"
    (gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w")).write(text)
    return path


@pytest.fixture
def refused(capsys):
    """The one sentence with which a call ends the program."""

    def call(function, *args):
        with pytest.raises(SystemExit) as stopped:
            function(*args)
        assert stopped.value.code == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        return sentence.removeprefix("error: ")

    return call


# ---- rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz", "a.json.gz"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    assert data.read_rows(str(write(tmp_path / name, [KODCODE, KODCODE]))) == [KODCODE, KODCODE]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", b"[{", "is no .json file"),
        ("a.jsonl.gz", b"{}", "is no .jsonl.gz file"),
        ("a.json.gz", gzip.compress(b"[1]")[:-9], "is no .json.gz file"),
        ("a.jsonl.gz", gzip.compress(b"{}\n{"), "is no .jsonl.gz file"),
        ("a.parquet", b"no", "is no .parquet file"),
        ("a.csv", b"a,b", "is no .jsonl, .json or .parquet file"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, refused, name, content, sentence):
    if "parquet" in name:
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    assert sentence in refused(data.read_rows, str(tmp_path / name))


def test_a_hub_id_is_loaded_through_datasets_with_its_split(monkeypatch):
    asked = []
    hub = types.SimpleNamespace(
        load_dataset=lambda name, split: asked.append((name, split)) or iter([H4])
    )
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert (
        data.read_rows("HuggingFaceH4/ultrafeedback_binarized:train_prefs")
        == data.read_rows("trl-lib/x")
        == [H4]
    )
    assert data.read_rows("trl-lib/x", "test") and asked == [
        ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"), ("trl-lib/x", "train"), ("trl-lib/x", "test"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Dataset scripts are no longer supported, but found SLF5K.py"),
        ValueError("a\nb"),
    ],
)
def test_a_data_set_that_does_not_load_is_one_sentence(monkeypatch, refused, error):
    def load_dataset(name, split):
        raise error

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    sentence = refused(data.read_rows, "JeremyAlain/SLF5K")
    assert str(error).splitlines()[0] in sentence and "a downloaded file will do" in sentence
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refused(data.read_rows, "JeremyAlain/SLF5K")


# ---- readers -------------------------------------------------------------------------------------------------------------


def test_slf5k_is_known_by_its_fields_and_keeps_what_people_said(tmp_path):
    rows = [SLF5K, {**SLF5K, "post": "Another.", "feedback": None}]
    ((a,), (b,)) = summarize.load(flags("summarize", write(tmp_path / "train.jsonl", rows)))
    a, b = sorted((a, b), key=lambda example: len(example.prompt), reverse=True)
    assert (
        a.facts["source"] == "My dog left me\n\nHe is 7. I fed him well."
        and a.facts["source"] in a.prompt
    )
    assert a.reference == "A dog of 7 left its owner."
    assert a.facts["candidate"] == "A dog of 8 left." and a.facts["feedback"] == "The dog is 7."
    assert set(b.facts) == {"source"}
    said = summarize.critique(a, a.facts["candidate"])
    assert "8" in said.poor[0]


def test_other_summaries_are_read_by_the_names_of_their_fields(tmp_path, capsys, refused):
    rows = [{"text": f"Ana is {n}.", "summary": str(n)} for n in range(10)] + [
        {"text": "Ana is 3.", "summary": "a"},
        {"text": " "},
        {},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    train, heldout = summarize.load(
        flags("summarize", path, "--source_field", "text", "--reference_field", "summary")
    )
    assert (
        len(train) == 8
        and len(heldout) == 2
        and not {e.prompt for e in train} & {e.prompt for e in heldout}
    )
    said = capsys.readouterr().out
    assert (
        "10 of 13 rows" in said
        and "1 (an earlier one has the same source)" in said
        and "2 (they lack a text)" in said
    )
    assert "has no field 'article'; it has text, summary" in refused(
        summarize.load, flags("summarize", path)
    )


def test_heldout_examples_of_their_own_are_not_trained_on(tmp_path, refused):
    rows = [{"prompt": str(n), "chosen": "x"} for n in range(10)]
    path, held = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:4])
    train, heldout = qa.load(flags("qa", path, "--heldout_data", held))
    assert [e.prompt for e in heldout] == list("0123") and [e.prompt for e in train] == list(
        "456789"
    )
    assert "is held out by" in refused(qa.load, flags("qa", held, "--heldout_data", path))


@pytest.mark.parametrize(
    "row",
    [H4, TRL, TEXTS, {"prompt": TURNS[:1], "chosen": TURNS[1:2]}],
    ids=["H4", "trl", "texts", "messages"],
)
def test_ultrafeedback_is_read_in_each_form(tmp_path, row):
    other = {"prompt": "Why?", "chosen": "So."}
    train, heldout = qa.load(flags("qa", write(tmp_path / "a.json", [row, other])))
    assert ("What is 2 + 2?", "It is 4.", {}) in train + heldout


def test_qa_has_scores_and_no_rule(refused):
    example = tasks.Example("?", "one two three four", {})
    assert qa.score(example, "one two three four") == {"rouge_l": 1, "words": 4, "repeated": 0}
    assert (
        qa.score(example, "a b c a b c")["repeated"] == 0.25 and qa.score(example, "")["words"] == 0
    )
    assert set(qa.METRICS) == set(qa.score(example, "x")) and not hasattr(qa, "critique")
    assert "no program that criticises" in refused(
        qa.check, argparse.Namespace(critic="rule"), "train_ppo"
    )
    qa.check(argparse.Namespace(critic="rm"), "train_ppo")


FORMS = {
    "kodcode": KODCODE,
    "demo": {**KODCODE, "test_code": KODCODE["test"]},
    "mbpp": MBPP,
    "sanitized": SANITIZED,
    "ilf": ILF,
}
FORMS["demo"].pop("test")


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
    train, heldout = code.load(flags("code", write(tmp_path / "a.jsonl", rows)))
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
    train, heldout = code.load(flags("code", write(tmp_path / "a.jsonl", rows)))
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


def test_rows_of_no_known_form_are_refused(tmp_path, refused):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}])
    assert "question, solution, test; " in refused(code.load, flags("code", path))
    assert "has no field 'chosen'; it has text" in refused(qa.load, flags("qa", path))


# ---- programs are not run unless that is allowed -------------------------------------------------------------------------


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
        ("annotate", {"critic": "tests", "model": None, "base_url": None}, True),
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
def test_what_protects_the_machine_and_what_does_not_is_said_where_programs_are_run(
    monkeypatch, capsys, refused
):
    allowed = argparse.Namespace(allow_code_execution=True)
    code.check(allowed, "train_ppo")
    assert "limits of time, memory" in capsys.readouterr().out
    monkeypatch.setattr(sandbox, "protections", lambda: ["not root"])
    code.check(allowed, "train_ppo")
    assert (
        "does not give its programs: no file but Python's, read-only, no network"
        in capsys.readouterr().out
    )

    def broken():
        raise RuntimeError("no fork")

    monkeypatch.setattr(sandbox, "protections", broken)
    assert refused(code.check, allowed, "train_ppo") == "no program can be run here: no fork"


@pytest.mark.parametrize(
    "number, ends_with", [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_ends_the_stage_that_is_run_first_too(tmp_path, number, ends_with):
    script, started = tmp_path / "stage.py", tmp_path / "pid"
    script.write_text(
        "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    )

    def stop():
        while not (started.exists() and started.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    def of_the_tests(*_):
        """Without it the process that runs the tests might end."""

    before = signal.signal(signal.SIGTERM, of_the_tests)
    threading.Thread(target=stop).start()
    with pytest.raises(ends_with) as stopped:
        stages.run("A stage", [str(script), str(started)])
    assert signal.signal(signal.SIGTERM, before) is of_the_tests
    assert number == signal.SIGINT or stopped.value.code == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_earlier_stages_are_given_the_same_flags(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(
        stages, "run", lambda title, command: commands.append(" ".join(command)) or 0.0
    )
    args = flags("qa", "a.jsonl", "--heldout_data", "b.jsonl", "--allow_code_execution", "--bf16")
    stages.ensure(["sft", "annotate"], args, tmp_path)
    assert (
        all(
            "--heldout_data b.jsonl" in c and "--allow_code_execution --bf16" in c for c in commands
        )
        and len(commands) == 2
    )


# ---- real data -----------------------------------------------------------------------------------------------------------


def rows_of(folder, name):
    path = DATA / folder / name
    if not path.is_file():
        pytest.skip(f"the real data is not here: {path}")
    return data.read_rows(str(path))


def test_real_answers_are_read():
    path = DATA / "ultrafeedback" / "train1000.jsonl"
    rows_of("ultrafeedback", "train1000.jsonl")
    train, heldout = qa.load(flags("qa", path))
    assert len(train) + len(heldout) > 990 and all(example.reference for example in train)


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
