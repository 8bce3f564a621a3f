"""Write a program that passes unit tests: KodCode, MBPP, or ILF's human feedback on MBPP.

python annotate.py --task extras/code/task.py --data KodCode/KodCode-Light-RL-10K \\
    --policy HUB_ID --allow_code_execution
torchrun train_ppo.py --critic rule --task extras/code/task.py --data mbpp.jsonl \\
    --policy HUB_ID --allow_code_execution

--data is a file or a hub id; FORMS lists the fields of its rows. The critic is the run of the unit
tests. What the policy writes runs in a sandbox (sandbox.py), with --allow_code_execution only.

The program is the last ``` block of a response that defines something, else its last block, else
the whole response. A block that is not closed goes to the end.

Poor are one or two lines: the line that raised an exception, the line that is no Python, or the
loop in which time ran out; for a wrong answer, what the called function returns (its return
statements if there are at most MAX_SPANS of them, else its first line). If the tests pass, the same
rule makes the return statements good.
"""

import ast
import builtins
import re
import textwrap
from typing import NamedTuple

from extras.code import sandbox, unit_tests
from t2g import data
from t2g.align import without_space
from t2g.cli import fail
from t2g.critics import quote_of
from t2g.feedback import Feedback
from t2g.tasks import Example

INSTRUCTION = "Solve this problem with a program in Python, in one ```python block.\n\n{}"
MAX_SPANS = 2
STEP_END = r"\n"  # the steps of a program are its lines
LOG_LENGTH = 2000  # characters kept of a test log, the last ones

CRITERIA = """\
The log of the unit tests says whether the program is right; explain it from the code. Good: the
lines that carry the idea of a right solution. Poor: the line that makes a test fail, at its cause
and not where the error shows; a case that is not handled; work that is done over and over. Quote
code, whole expressions or lines, and not the prose around it. A program that passes has poor lines
only where it would fail on inputs that the problem allows."""
METRICS = {
    "pass": "1 if the program passes the unit tests, else 0: its mean is pass@1",
    "parses": "1 if it is Python",
    "timeout": "1 if the time ran out",
    "lines": "lines of the program that are not empty",
}
DEFAULTS = {
    "annotate": dict(response_length=256),
    "train_ppo": dict(learning_rate=1e-5, response_length=256, eval_samples=32),
    "eval": dict(response_length=256, eval_samples=32),
}


def add_flags(add):
    add("--allow_code_execution", False, "run in a sandbox what the policy writes")


def check(args, script):
    """Asks for permission where programs run, and prints what protects the machine."""
    what = getattr(args, "what", None)
    runs = script == "train_ppo" or what == "policy" or (what == "rm" and not args.annotations)
    if script == "annotate":
        runs = args.critic == "rule" or not (args.critic or args.model or args.base_url)
    if runs and not args.allow_code_execution:
        fail("this runs programs of the policy in a sandbox; allow it by --allow_code_execution")
    if args.allow_code_execution:
        try:
            active = sandbox.protections()
        except RuntimeError as error:
            fail(f"no program can run here: {error}")
        limits = "limits of time, memory, files and processes"
        print("programs run in a sandbox:", ", ".join([*active, limits]))
        missing = [name for name in sandbox.PROTECTIONS if name not in active]
        if missing:
            advice = "(use a container or a user without rights)"
            print("warning: this machine cannot guarantee", ", ".join(missing), advice)


# ---- data ----------------------------------------------------------------------------------------


def kodcode(row):
    """A question, a solution, and tests in pytest's form; test_info has the functions to write."""
    question, infos = data.text(row.get("question")), row.get("test_info") or []
    infos = [info for info in infos if isinstance(info, dict)]
    names = [data.text(info.get("function_declaration")) for info in infos]
    names = [f"`{name.removesuffix(':')}`" for name in names if name]
    if names:
        question += f"\n\nWrite {', '.join(names)}."
    return example_of(question, row.get("solution"), row.get("test") or row.get("test_code"))


def mbpp(row):
    """A text, code, and asserts, of which the first one shows the name to use."""
    question = data.text(row.get("text") or row.get("prompt"))
    asserts = row.get("test_list") or [""]
    tests = [*(row.get("test_imports") or []), row.get("test_setup_code") or "", *asserts]
    if question:
        question += f"\n\nIt must pass `{asserts[0]}`."
    return example_of(question, row.get("code"), "\n".join(tests))


def ilf(row):
    """A prompt that ends with the head of a function, a test, and a program that people mended."""
    prompt, test = row.get("prompt") or "", row.get("test") or ""
    names = re.findall(r"^def (\w+)", prompt, re.MULTILINE)
    if not names:
        return None
    name, solution = names[-1], row.get("unedited_annotator_completion")
    test = test and re.sub(r"\bcandidate\b", name, test) + f"\n\ncheck({name})"
    test = test and f"from solution import {name}\n{test}"
    facts = {"candidate": row.get("original_model_completion"), "feedback": row.get("Feedback")}
    return example_of(f"Complete this program.\n\n{prompt}", solution, test, **facts)


FORMS = (  # the fields that identify a data set, and its reader
    (("question", "solution", "test"), kodcode),
    (("question", "solution", "test_code"), kodcode),
    (("text", "code", "test_list"), mbpp),
    (("prompt", "code", "test_list"), mbpp),
    (("prompt", "test", "unedited_annotator_completion"), ilf),
)


def example_of(question, solution, tests, **facts):
    """Returns an Example, why its tests cannot be used, or None if a part is missing."""
    solution, tests = data.text(solution).replace("\r\n", "\n"), data.text(tests)
    if not (question and solution and tests):
        return None
    for name in reversed(re.findall(r"^def (\w+)", solution, re.MULTILINE)):
        if hasattr(builtins, name) and name in tests:  # sum(), say, means the solution's
            tests = f"from solution import {name}\n{tests}"
    obstacle = unit_tests.obstacle(tests)
    if not obstacle and not unit_tests.uses(tests, solution):
        obstacle = "their tests use nothing of the solution, so that every program passes"
    reference, facts = f"```python\n{solution}\n```", {"tests": tests, **facts}
    return obstacle or Example(INSTRUCTION.format(question), reference, facts)


def example_of_record(record) -> Example | None:
    """Returns the example of a record that brings unit tests of its own."""
    if "tests" not in record:
        return None
    example = Example(record["prompt"], "", record)
    obstacle = unit_tests.obstacle(tests_of(example))
    if obstacle:
        fail(f"the unit tests of record {record['id']} cannot run: {obstacle}")
    return example


def load(args):
    def reader(rows, name):
        for fields, form in FORMS:
            if data.has(rows, *fields):
                return form
        forms = "; ".join(", ".join(fields) for fields, _ in FORMS)
        fail(f"{name} has the fields {', '.join(rows[0])}; it needs those of one form: {forms}")

    return data.load(args, reader)


# ---- the program of a response -------------------------------------------------------------------

FUNCTIONS = unit_tests.FUNCTIONS
DEFINITIONS = FUNCTIONS | ast.ClassDef
BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
DEFINES = re.compile(r"^\s*(async def|def|class) ", re.MULTILINE)


class Program(NamedTuple):
    text: str
    tree: ast.Module  # empty if the text is no Python
    lines: list[tuple[int, int]]  # character range of each line in the response, without margins


def extract(response: str) -> Program:
    """Returns the program of a response, by the rule at the head of this file."""
    blocks = list(BLOCK.finditer(response))
    blocks = [block for block in blocks if DEFINES.search(block[1])] or blocks
    start, end = blocks[-1].span(1) if blocks else (0, len(response))
    text, lines = textwrap.dedent(response[start:end]), []
    for line in response[start:end].split("\n"):
        lines.append(without_space(response, start, start + len(line)))
        start += len(line) + 1
    return Program(text, unit_tests.parsed(text), lines)


def extract_code(response: str) -> str:
    return extract(response).text


def outcome(example, response) -> sandbox.Result:
    return unit_tests.run(tests_of(example), extract_code(response))


def tests_of(example) -> str:
    tests = example.facts["tests"]
    texts = [tests] if isinstance(tests, str) else tests
    if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        fail(f"unit tests are a text or a list of texts, not {unit_tests.cut(repr(tests), 60)}")
    return "\n".join(texts)


# ---- the test run as a critic --------------------------------------------------------------------

FAULTS = {  # kind: the sandbox's reason, whose group the critique mentions; the first match counts
    "wrong answer": r"(?:AssertionError|Failed):? ?(.*)",
    "syntax error": r"(?:Syntax|Indentation|Tab)Error: (.*?)(?: \(solution.py, line \d+\))?",
    "missing name": r"ImportError: cannot import name '(\w+)' from 'solution'.*",
    "timeout": r"timeout after (.*)",
    "early exit": r"(it ended before its last line|SystemExit.*)",
    "tampering": r"(?:forbidden: |RuntimeError: )?(sys\.\w+|gc\.\w+|it changed .*)",
    "crash": r"(killed by signal .*)",
    "error": r"(.*)",
}
CRITIQUES = {
    "wrong answer": "It gives a wrong answer: {}.",
    "syntax error": "It is no Python: {}.",
    "missing name": "It does not define {}.",
    "timeout": "It does not end within {}.",
    "early exit": "It ends the process before the tests are over: {}.",
    "tampering": "It reaches into what judges it: {}.",
    "crash": "It crashes: {}.",
    "error": "It fails with {}.",
}
FRAME = re.compile(r'File "(?:[^"]*/)?(solution|program)\.py", line (\d+)')


def critique(example, response: str) -> Feedback:
    return judge(example, response)[0]


def kinds(example, response: str) -> list[str]:
    """The kind of each poor quote: one of those in FAULTS, or the type of the exception."""
    return judge(example, response)[1]


def judge(example, response) -> tuple[Feedback, list[str]]:
    """Returns the critique, and the kinds of its poor quotes."""
    program, result = extract(response), outcome(example, response)
    if not program.text.strip():
        return Feedback("It holds no program.", [], []), []
    if result.passed:
        good = quotes(response, program, answers(called(example, program)))
        return Feedback("It passes the tests.", good, []), []
    kind, sentence = explain(result.reason)
    poor = quotes(response, program, lines_at_fault(example, program, result, kind))
    return Feedback(sentence, [], poor), [kind] * len(poor)


def explain(reason: str) -> tuple[str, str]:
    """Returns the kind of fault and the critique for a reason of the sandbox.

    >>> explain("ZeroDivisionError: division by zero")
    ('ZeroDivisionError', 'It fails with ZeroDivisionError: division by zero.')
    """
    matches = {kind: re.fullmatch(text, reason, re.DOTALL) for kind, text in FAULTS.items()}
    kind = next(kind for kind, match in matches.items() if match)
    detail = unit_tests.cut(" ".join(matches[kind][1].split())) or "a test fails"
    if kind == "error":
        kind = re.match(r"\w*", reason)[0] or "error"
    return kind, CRITIQUES.get(kind, CRITIQUES["error"]).format(detail)


def lines_at_fault(example, program, result, kind) -> list[tuple[int, int]]:
    """Returns ranges of the program's line numbers, both ends included."""
    frames = [(file, int(line)) for file, line in FRAME.findall(result.stderr)]
    own = [line for file, line in frames if file == "solution"]
    if kind == "timeout" and own:
        return [loop(program, own[0])]  # the stack at the timeout starts with the last call
    if kind != "timeout" and frames and frames[-1][0] == "solution":
        return [(own[-1], own[-1])]
    definition = called(example, program, frames[-1][1] if frames else 0)
    return answers(definition) if kind == "wrong answer" else [head(definition)]


def called(example, program, line=0):
    """Returns the definition that this line of the tests calls, or else any line of them.

    It is the program's last definition if they call none.
    """
    found = {node.name: node for node in ast.walk(program.tree) if isinstance(node, DEFINITIONS)}
    tests = ast.parse(unit_tests.as_program(tests_of(example)))
    for part in [*reversed(statements(tests, line)), tests]:  # the innermost statement first
        for node in ast.walk(part):
            if isinstance(node, ast.Call) and unit_tests.called_name(node) in found:
                return found[unit_tests.called_name(node)]
    return list(found.values())[-1] if found else None


def statements(tree, line) -> list[ast.stmt]:
    """Returns the statements that contain a line, outer ones first."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    return [node for node in nodes if node.lineno <= line <= node.end_lineno]


def answers(definition) -> list[tuple[int, int]]:
    """Returns the lines of a function's return statements if they are few, else of its head."""
    if not isinstance(definition, FUNCTIONS):
        return [head(definition)]
    nodes = list(ast.walk(definition))
    inner = [node for node in nodes[1:] if isinstance(node, DEFINITIONS)]
    nested = {node for function in inner for node in ast.walk(function)}
    returns = [node for node in nodes if isinstance(node, ast.Return) and node not in nested]
    few = 0 < len(returns) <= MAX_SPANS
    return sorted((node.lineno, node.end_lineno) for node in returns) if few else [head(definition)]


def head(definition) -> tuple[int, int]:
    """Returns the first line of a definition, or of the program if there is none."""
    return (definition.lineno, definition.lineno) if definition else (1, 1)


def loop(program, line) -> tuple[int, int]:
    """Returns the head of the innermost loop around a line, or of the function, or the line."""
    around = statements(program.tree, line)
    for heads in (ast.For | ast.AsyncFor | ast.While, FUNCTIONS, ast.stmt):
        lines = [node.lineno for node in around if isinstance(node, heads)]
        if lines:
            return max(lines), max(lines)
    return line, line


def quotes(response, program, ranges) -> list[str]:
    """Quotes lines of the program so that each quote is unique. An empty line is the one above."""
    written = [number for number, (start, end) in enumerate(program.lines, 1) if start < end]
    result = []
    for first, last in ranges:
        first = max((number for number in written if number <= first), default=written[0])
        last = max(first, min(last, written[-1]))
        result.append(quote_of(response, program.lines[first - 1][0], program.lines[last - 1][1]))
    return result


def test_log(example, response: str) -> str:
    """What an annotator sees of the test run: its end, and the program's part of the traceback."""
    result = outcome(example, response)
    if result.passed:
        return "The tests pass."
    trace = result.stderr.partition("\n\nThread")[0] + "\n"  # at a timeout, of all threads
    trace = re.sub(r'  File "(?:[^"]*/)?(?:program|jail|witness)\.py".*\n(?:    .*\n)*', "", trace)
    trace = re.sub(r'File "[^"]*/solution\.py"', 'File "solution.py"', trace)
    return f"The tests fail: {result.reason}\n{trace[-LOG_LENGTH:]}".strip()


def score(example, response: str) -> dict[str, float]:
    program, result = extract(response), outcome(example, response)
    return {
        "pass": float(result.passed),
        "parses": float(bool(program.tree.body)),
        "timeout": float(result.reason.startswith("timeout")),
        "lines": sum(start < end for start, end in program.lines),
    }
