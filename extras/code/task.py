"""Write a program that passes unit tests: KodCode, MBPP, human feedback on MBPP (ILF), or rows in one of their forms.

--data is a file or a hub id, KodCode/KodCode-Light-RL-10K say; see FORMS for the fields. The critic is the test run itself. What
the policy writes is run in the sandbox of t2g/sandbox.py, and only if --allow_code_execution is given.

The program is the last ``` block of a response that defines something, else its last block, else the whole response. A block that
is not closed goes to the end.

Poor is one line, or two: the line of the program at which an exception was raised; the line that is no Python; the loop in which
time ran out; and for a wrong answer, what the function that the failing test calls returns (its return statements if they are
not more than MAX_SPANS, else its first line). If the tests pass, the return statements of what they call are good, by the same
rule: the same tokens that a wrong answer is blamed on.
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
LOG_LENGTH = 2000  # characters of a test log, the last ones

CRITERIA = """\
The log of the unit tests says whether the program is right; explain it from the code. Good: the lines that carry the idea of a
right solution. Poor: the line that makes a test fail, at its cause and not where the error shows; a case that is not handled; work
that is done over and over. Quote code, whole expressions or lines, and not the prose around it. A program that passes has poor
lines only where it would fail on inputs that the problem allows."""
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
    """Programs are run where responses are judged; the other scripts only read."""
    what = getattr(args, "what", None)
    judges = script == "train_ppo" or what == "policy" or (what == "rm" and not args.annotations)
    if script == "annotate":
        judges = args.critic == "rule" or not (args.critic or args.model or args.base_url)
    if judges and not args.allow_code_execution:
        fail(
            "the task code runs what the policy writes, with the unit tests, in a sandbox: allow it by --allow_code_execution"
        )
    if args.allow_code_execution:
        try:
            held = sandbox.protections()
        except RuntimeError as error:
            fail(f"no program can be run here: {error}")
        missing = [name for name in sandbox.PROTECTIONS if name not in held]
        print(
            "programs are run in a sandbox:",
            ", ".join([*held, "limits of time, memory, files and processes"]),
        )
        if missing:
            print(
                "this machine does not give its programs:",
                ", ".join(missing),
                "(run them in a container or as a user of their own)",
            )


# ---- data ----------------------------------------------------------------------------------------------------------------


def kodcode(row):
    """KodCode and its demo: a question, a solution, and tests in pytest's form; test_info has the functions to write."""
    question, infos = data.text(row.get("question")), row.get("test_info") or []
    names = [
        data.text(info.get("function_declaration")) for info in infos if isinstance(info, dict)
    ]
    if any(names):
        question += (
            "\n\nWrite " + ", ".join(f"`{name.removesuffix(':')}`" for name in names if name) + "."
        )
    return example_of(question, row.get("solution"), row.get("test") or row.get("test_code"))


def mbpp(row):
    """MBPP, also its sanitised half: a text, code, and asserts, of which the first one shows the name to use."""
    question, asserts = (
        data.text(row.get("text") or row.get("prompt")),
        row.get("test_list") or [""],
    )
    tests = [*(row.get("test_imports") or []), row.get("test_setup_code") or "", *asserts]
    return example_of(
        question and f"{question}\n\nIt must pass `{asserts[0]}`.",
        row.get("code"),
        "\n".join(tests),
    )


def ilf(row):
    """People's feedback on programs for MBPP: a prompt that ends with the head of a function, a test, the mended program."""
    prompt, test = row.get("prompt") or "", row.get("test") or ""
    if not (names := re.findall(r"^def (\w+)", prompt, re.MULTILINE)):
        return None
    tests = (
        f"from solution import {names[-1]}\n"
        + re.sub(r"\bcandidate\b", names[-1], test)
        + f"\n\ncheck({names[-1]})"
    )
    said = {"candidate": row.get("original_model_completion"), "feedback": row.get("Feedback")}
    return example_of(
        f"Complete this program.\n\n{prompt}",
        row.get("unedited_annotator_completion"),
        test and tests,
        **said,
    )


FORMS = (  # the fields that tell a data set, and its reader
    (("question", "solution", "test"), kodcode),
    (("question", "solution", "test_code"), kodcode),
    (("text", "code", "test_list"), mbpp),
    (("prompt", "code", "test_list"), mbpp),
    (("prompt", "test", "unedited_annotator_completion"), ilf),
)


def example_of(question, solution, tests, **facts):
    solution, tests = data.text(solution).replace("\r\n", "\n"), data.text(tests)
    if not (question and solution and tests):
        return None
    builtin = [
        name
        for name in re.findall(r"^def (\w+)", solution, re.MULTILINE)
        if hasattr(builtins, name) and name in tests
    ]
    tests = "\n".join(
        [*(f"from solution import {name}" for name in builtin), tests]
    )  # sum(), say, where they mean the solution's
    example = Example(
        INSTRUCTION.format(question), f"```python\n{solution}\n```", {"tests": tests, **facts}
    )
    if not (obstacle := unit_tests.obstacle(tests)) and not unit_tests.uses(tests, solution):
        obstacle = "their tests use nothing of the solution, so that every program passes"
    return obstacle or example


def example_of_record(record) -> Example | None:
    """The example of a record that brings unit tests of its own."""
    if "tests" not in record:
        return None
    example = Example(record["prompt"], "", record)
    if obstacle := unit_tests.obstacle(tests_of(example)):
        fail(f"the unit tests of record {record['id']} cannot be run: {obstacle}")
    return example


def load(args):
    def reader(rows, name):
        for fields, form in FORMS:
            if data.has(rows, *fields):
                return form
        forms = "; ".join(", ".join(fields) for fields, _ in FORMS)
        fail(
            f"{name} has the fields {', '.join(rows[0])}; the task code reads one of these forms: {forms}"
        )

    return data.load(args, reader)


# ---- the test run as a critic ----------------------------------------------------------------------------------------------

FAULTS = {  # the sandbox's reason, the kind of fault that it tells, and what is said of it; {} is what matters of the reason
    r"(?:AssertionError|Failed):? ?(.*)": ("wrong answer", "It gives a wrong answer: {}."),
    r"(?:Syntax|Indentation|Tab)Error: (.*?)(?: \(solution.py, line \d+\))?": (
        "syntax error",
        "It is no Python: {}.",
    ),
    r"ImportError: cannot import name '(\w+)' from 'solution'.*": (
        "missing name",
        "It does not define {}.",
    ),
    r"timeout after (.*)": ("timeout", "It does not end within {}."),
    r"(it ended before its last line|SystemExit.*)": (
        "early exit",
        "It ends the process before the tests are over: {}.",
    ),
    r"(?:forbidden: |RuntimeError: )?(sys\.\w+|gc\.\w+|it changed .*)": (
        "tampering",
        "It reaches into what judges it: {}.",
    ),
    r"(killed by signal .*)": ("crash", "It crashes: {}."),
    r"(.*)": ("", "It fails with {}."),
}
FRAME = re.compile(r'File "(?:[^"]*/)?(solution|program)\.py", line (\d+)')
FUNCTIONS = unit_tests.FUNCTIONS
DEFINITIONS = FUNCTIONS | ast.ClassDef


class Program(NamedTuple):
    text: str
    tree: ast.Module  # empty if the text is no Python
    places: list[
        tuple[int, int]
    ]  # the characters of each line in the response, without the space around them


def extract(response: str) -> Program:
    """The program of a response, by the rule at the head of this file."""
    blocks = list(
        re.finditer(
            r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", response, re.DOTALL | re.MULTILINE
        )
    )
    defining = [
        block
        for block in blocks
        if re.search(r"^\s*(async def|def|class) ", block[1], re.MULTILINE)
    ]
    start, end = (defining or blocks)[-1].span(1) if blocks else (0, len(response))
    text, places = textwrap.dedent(response[start:end]), []
    for line in response[start:end].split("\n"):
        places.append(without_space(response, start, start + len(line)))
        start += len(line) + 1
    return Program(text, unit_tests.parsed(text), places)


def extract_code(response: str) -> str:
    return extract(response).text


def critique(example, response: str) -> Feedback:
    return judged(example, response)[0]


def kinds(example, response: str) -> list[str]:
    """The kind of each poor quote of critique(): one of those in FAULTS, or the type of the exception."""
    return judged(example, response)[1]


def judged(example, response) -> tuple[Feedback, list[str]]:
    """The critique, and the kinds of its poor quotes."""
    program, result = extract(response), outcome(example, response)
    if not program.text.strip():
        return Feedback("It holds no program.", [], []), []
    if result.passed:
        return Feedback(
            "It passes the tests.", quotes(response, program, answers(called(example, program))), []
        ), []
    matches = (
        (re.fullmatch(pattern, result.reason, re.DOTALL), *fault)
        for pattern, fault in FAULTS.items()
    )
    match, kind, said = next(found for found in matches if found[0])
    said = said.format(unit_tests.cut(" ".join(match[1].split())) or "a test fails")
    poor = quotes(response, program, lines_at_fault(example, program, result, kind))
    return Feedback(said, [], poor), [kind or re.match(r"\w*", result.reason)[0] or "error"] * len(
        poor
    )


def outcome(example, response) -> sandbox.Result:
    return unit_tests.run(tests_of(example), extract_code(response))


def tests_of(example) -> str:
    tests = example.facts["tests"]
    texts = [tests] if isinstance(tests, str) else tests
    if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        fail(f"unit tests are a text or a list of texts, not {unit_tests.cut(repr(tests), 60)}")
    return "\n".join(texts)


def lines_at_fault(example, program, result, kind) -> list[tuple[int, int]]:
    """Ranges of line numbers of the program, both ends included."""
    frames = [(file, int(line)) for file, line in FRAME.findall(result.stderr)]
    ours = [line for file, line in frames if file == "solution"]
    if kind == "timeout" and ours:
        return [loop(program, ours[0])]  # the stack at the timeout starts with the last call
    if kind != "timeout" and frames and frames[-1][0] == "solution":
        return [(ours[-1], ours[-1])]
    definition = called(example, program, frames[-1][1] if frames else 0)
    return answers(definition) if kind == "wrong answer" else [head(definition)]


def called(example, program, line=0):
    """The definition that the tests call at that line of theirs, or else anywhere; the last one if that is unclear."""
    found = {node.name: node for node in ast.walk(program.tree) if isinstance(node, DEFINITIONS)}
    tests = ast.parse(unit_tests.as_program(tests_of(example)))
    around = [
        node
        for node in ast.walk(tests)
        if isinstance(node, ast.stmt) and node.lineno <= line <= node.end_lineno
    ]
    for part in [*reversed(around), tests]:  # the innermost statement first
        for call in (node.func for node in ast.walk(part) if isinstance(node, ast.Call)):
            if (name := getattr(call, "id", getattr(call, "attr", ""))) in found:
                return found[name]
    return list(found.values())[-1] if found else None


def answers(definition) -> list[tuple[int, int]]:
    """The lines of its return statements if they are few, else its head."""
    if not isinstance(definition, FUNCTIONS):
        return [head(definition)]
    inner = [
        node
        for node in ast.walk(definition)
        if isinstance(node, DEFINITIONS) and node is not definition
    ]
    theirs = {node for function in inner for node in ast.walk(function)}
    returns = [
        node for node in ast.walk(definition) if isinstance(node, ast.Return) and node not in theirs
    ]
    few = 0 < len(returns) <= MAX_SPANS
    return sorted((node.lineno, node.end_lineno) for node in returns) if few else [head(definition)]


def head(definition) -> tuple[int, int]:
    """Its first line, or that of the program if there is no definition."""
    return (definition.lineno, definition.lineno) if definition else (1, 1)


def loop(program, line) -> tuple[int, int]:
    """The head of the innermost loop around a line, or of the function, or the line."""
    around = [
        node
        for node in ast.walk(program.tree)
        if isinstance(node, ast.stmt) and node.lineno <= line <= node.end_lineno
    ]
    for heads in (ast.For | ast.AsyncFor | ast.While, FUNCTIONS, ast.stmt):
        if lines := [node.lineno for node in around if isinstance(node, heads)]:
            return max(lines), max(lines)
    return line, line


def quotes(response, program, ranges) -> list[str]:
    """Lines of the program as they stand in the response, and in no other place. An empty line means the one before it."""
    written = [number for number, (start, end) in enumerate(program.places, 1) if start < end]
    found = []
    for first, last in ranges:
        first = max((number for number in written if number <= first), default=written[0])
        start, end = (
            program.places[first - 1][0],
            program.places[max(first, min(last, written[-1])) - 1][1],
        )
        found.append(quote_of(response, start, end))
    return found


def test_log(example, response: str) -> str:
    """What an annotator is shown of the test run: how it ended, and the program's part of the traceback."""
    result = outcome(example, response)
    if result.passed:
        return "The tests pass."
    trace = (
        result.stderr.partition("\n\nThread")[0] + "\n"
    )  # at a timeout, the program's thread comes first
    trace = re.sub(r'  File "(?:[^"]*/)?(?:program|jail|witness)\.py".*\n(?:    .*\n)*', "", trace)
    trace = re.sub(r'File "[^"]*/solution\.py"', 'File "solution.py"', trace)
    return f"The tests fail: {result.reason}\n{trace[-LOG_LENGTH:]}".strip()


def score(example, response: str) -> dict[str, float]:
    program, result = extract(response), outcome(example, response)
    return {
        "pass": float(result.passed),
        "parses": float(bool(program.tree.body)),
        "timeout": float(result.reason.startswith("timeout")),
        "lines": sum(start < end for start, end in program.places),
    }
