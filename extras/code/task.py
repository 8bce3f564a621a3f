"""Write a program that passes unit tests: KodCode, MBPP, or records with tests of their own.

python annotate.py --task extras/code/task.py --data KodCode/KodCode-Light-RL-10K \\
    --policy HUB_ID --allow_code_execution
torchrun train_ppo.py --critic rule --task extras/code/task.py --data mbpp.jsonl \\
    --policy HUB_ID --allow_code_execution

--data is a file or a hub id; problems.py reads its rows. The critic is the run of the unit tests.
What the policy writes runs in a sandbox (sandbox.py), and only with --allow_code_execution.

The program is the last fenced block of a response that defines something, else its last block, else
the whole response. A block that is not closed goes to the end.

One or two lines are poor: the line that raised an exception, the line that is not Python, or the
loop in which time ran out; for a wrong answer, what the called function returns (its return
statements if there are at most MAX_SPANS of them, else its first line). A function that runs to its
end has a good first line, and good lines at the top of its body if some assertion held. If the
tests pass, its return statements are good, too.
"""

import ast
import re
import textwrap
from functools import lru_cache
from typing import NamedTuple

from extras.code import sandbox, unit_tests
from extras.code.problems import example_of_record, load, tests_of  # noqa: F401  parts of a task
from extras.code.witness import DEFINITIONS, FUNCTIONS, parsed
from t2g.align import without_space
from t2g.cli import fail
from t2g.critics import quote_of
from t2g.feedback import Feedback

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
    add("--allow_code_execution", False, "allow running the policy's programs, in a sandbox")


def check(args, script):
    """Asks for permission where programs run, and prints what protects the machine."""
    idle = ("train_sft", "train_rm", "scalar_rm", "extras.human.page", "be_the_critic.py")
    what = getattr(args, "what", None if script in idle else "policy")
    runs = what == "policy" or (what == "rm" and not args.annotations)
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
        if missing := [name for name in sandbox.PROTECTIONS if name not in active]:
            advice = "(use a container or a user without rights)"
            print("warning: this machine cannot guarantee", ", ".join(missing), advice)


# ---- the program of a response -------------------------------------------------------------------

FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n`]*\n", re.MULTILINE)
DEFINES = re.compile(r"^\s*(async def|def|class) ", re.MULTILINE)


class Program(NamedTuple):
    text: str
    tree: ast.Module  # empty if the text is not Python
    lines: list[tuple[int, int]]  # character range of each line in the response, without margins


@lru_cache(maxsize=512)  # critique, kinds, score and log of a response need the same program
def extract(response: str) -> Program:
    """Returns the program of a response, by the rule at the head of this file."""
    blocks = fenced_blocks(response)
    blocks = [block for block in blocks if DEFINES.search(response[slice(*block)])] or blocks
    start, end = blocks[-1] if blocks else (0, len(response))
    text, lines = textwrap.dedent(response[start:end]), []
    for line in response[start:end].split("\n"):
        lines.append(without_space(response, start, start + len(line)))
        start += len(line) + 1
    return Program(text, parsed(text), lines)


def extract_code(response: str) -> str:
    return extract(response).text


def fenced_blocks(response: str) -> list[tuple[int, int]]:
    """Returns the character range inside each pair of fences, which are ``` or ~~~ or longer.

    Docstrings may hold fences, too. A block therefore ends at the first closing fence that makes it
    valid Python; if none does, at the first one.

    >>> response = "~~~python\\nx = '''\\n~~~\\n'''\\n~~~"
    >>> [response[start:end] for start, end in fenced_blocks(response)]
    ["x = '''\\n~~~\\n'''\\n"]
    """
    blocks, position = [], 0
    while opening := FENCE.search(response, position):
        start = opening.end()
        closing = re.compile(rf"^[ \t]*{opening[1]}", re.MULTILINE)
        ends = [match.span() for match in closing.finditer(response, start)]
        ends.append((len(response), len(response)))
        valid = (end for end in ends if is_python(response[start : end[0]]))
        end, position = next(valid, ends[0])
        blocks.append((start, end))
    return blocks


def is_python(text: str) -> bool:
    return bool(parsed(textwrap.dedent(text)).body or not text.strip())


def outcome(example, response) -> sandbox.Result:
    return unit_tests.run(tests_of(example), extract_code(response))


# ---- the test run as a critic --------------------------------------------------------------------

FAULTS = (  # kind, critique, the sandbox's reason, whose group it quotes; the first match counts
    ("wrong answer", "It gives a wrong answer: {}.", r"(?:AssertionError|Failed):? ?(.*)"),
    ("syntax error", "It is not valid Python: {}.",
     r"(?:Syntax|Indentation|Tab)Error: (.*?)(?: \(solution.py, line \d+\))?"),
    ("missing name", "It does not define {}.",
     r"ImportError: cannot import name '(\w+)' from 'solution'.*"),
    ("timeout", "It does not end within {}.", r"timeout after (.*)"),
    ("early exit", "It ends the process before the tests are over: {}.",
     r"(it ended before its last line|SystemExit.*)"),
    ("tampering", "It tampers with what judges it: {}.",
     r"(?:forbidden: |RuntimeError: )?(sys\.\w+|gc\.\w+|it changed .*)"),
    ("crash", "It crashes: {}.", r"(killed by signal .*)"),
    ("error", "It fails with {}.", r"(.*)"),
)  # fmt: skip
FRAME = re.compile(r'File "(?:[^"]*/)?(solution|program)\.py", line (\d+)')
ON_IMPORT = re.compile(r'/solution\.py", line \d+, in <module>')


def critique(example, response: str) -> Feedback:
    return judge(example, response)[0]


def kinds(example, response: str) -> list[str]:
    """Returns the kind of each poor quote: one of FAULTS, or the type of the exception."""
    return judge(example, response)[1]


def judge(example, response) -> tuple[Feedback, list[str]]:
    """Returns the critique, and the kinds of its poor quotes."""
    program, result = extract(response), outcome(example, response)
    if not program.text.strip():
        return Feedback("It holds no program.", [], []), []
    if result.passed:
        definition = called(example, program)
        right = [*answers(definition), *lines_that_ran(definition, held=True)]
        return Feedback("It passes the tests.", quotes(response, program, right), []), []
    kind, sentence = explain(result.reason)
    frames = [(file, int(line)) for file, line in FRAME.findall(result.stderr)]
    failed = next((n for file, n in reversed(frames) if file == "program"), 0)  # in the tests
    definition = called(example, program, failed)
    wrong, right = lines_at_fault(program, definition, frames, kind), []
    if kind == "wrong answer" and ON_IMPORT.search(result.stderr):
        sentence += " An assertion of its own fails on import."
    elif kind == "wrong answer" and frames:
        nodes = ast.walk(unit_tests.tree_of(tests_of(example)))
        held = sum(isinstance(node, ast.Assert) and node.end_lineno < failed for node in nodes)
        right = lines_that_ran(definition, held > 0)
        sentence += f" It runs, and {held} assertions hold."
    poor = quotes(response, program, wrong)
    good = quotes(response, program, [lines for lines in right if lines not in wrong])
    return Feedback(sentence, good, poor), [kind] * len(poor)


def lines_that_ran(definition, held) -> list[tuple[int, int]]:
    """Returns a function's first line; if asserts held, also MAX_SPANS one-line statements."""
    if not isinstance(definition, FUNCTIONS):
        return []
    body = [node for node in definition.body if not isinstance(node, ast.Return)]
    lines = [(node.lineno, node.lineno) for node in body if node.lineno == node.end_lineno]
    return [head(definition), *(lines[:MAX_SPANS] if held else [])]


def explain(reason: str) -> tuple[str, str]:
    """Returns the kind of fault and the critique for a reason of the sandbox.

    >>> explain("ZeroDivisionError: division by zero")
    ('ZeroDivisionError', 'It fails with ZeroDivisionError: division by zero.')
    """
    for kind, sentence, pattern in FAULTS:
        if match := re.fullmatch(pattern, reason, re.DOTALL):
            detail = unit_tests.cut(" ".join(match[1].split())) or "an error without a message"
            exception = re.match(r"\w*", reason)[0] if kind == "error" else ""
            return exception or kind, sentence.format(detail)


def lines_at_fault(program, definition, frames, kind) -> list[tuple[int, int]]:
    """Returns ranges of line numbers, both ends included; frames: (file, line) of a traceback."""
    own = [line for file, line in frames if file == "solution"]
    if kind == "timeout" and own:
        return [loop(program, own[0])]  # the stack at the timeout starts with the last call
    if kind != "timeout" and frames and frames[-1][0] == "solution":
        return [(own[-1], own[-1])]
    return answers(definition) if kind == "wrong answer" else [head(definition)]


def called(example, program, line=0):
    """Returns the definition that this line of the tests calls, or any line, or the last one."""
    nodes = {node.name: node for node in ast.walk(program.tree) if isinstance(node, DEFINITIONS)}
    tests = unit_tests.tree_of(tests_of(example))
    for part in [*reversed(statements(tests, line)), tests]:  # the innermost statement first
        for node in ast.walk(part):
            if isinstance(node, ast.Call) and unit_tests.called_name(node) in nodes:
                return nodes[unit_tests.called_name(node)]
    return list(nodes.values())[-1] if nodes else None


def statements(tree, line) -> list[ast.stmt]:
    """Returns the statements that contain a line, outer ones first."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    return [node for node in nodes if node.lineno <= line <= node.end_lineno]


def answers(definition) -> list[tuple[int, int]]:
    """Returns the lines of a function's return statements if they are few, else its head."""
    if isinstance(definition, FUNCTIONS):
        nodes = unit_tests.reached(definition.body)  # without the functions inside it
        returns = [(n.lineno, n.end_lineno) for n in nodes if isinstance(n, ast.Return)]
        if 0 < len(returns) <= MAX_SPANS:
            return sorted(returns)
    return [head(definition)]


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
    """Returns a unique quote for each range of lines; an empty line stands for the one above."""
    written = [number for number, (start, end) in enumerate(program.lines, 1) if start < end]
    unique = []
    for first, last in ranges:
        first = max((number for number in written if number <= first), default=written[0])
        last = max(first, min(last, written[-1]))
        unique.append(quote_of(response, program.lines[first - 1][0], program.lines[last - 1][1]))
    return unique


def test_log(example, response: str) -> str:
    """Returns what annotators see of the test run: its end, and the traceback in the program."""
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
