"""Reads published problems with unit tests: KodCode and MBPP, or records with tests of their own.

Rows whose tests cannot run here, or test nothing of the solution, are dropped and counted.
"""

import builtins
import re

from extras.code import unit_tests
from t2g import data
from t2g.cli import fail
from t2g.tasks import Example

INSTRUCTION = "Solve this problem with a program in Python, in one ```python block.\n\n{}"


def kodcode(row):
    """Reads a question, a solution and pytest's tests; test_info lists the functions to write."""
    question, infos = data.text(row.get("question")), row.get("test_info") or []
    infos = [info for info in infos if isinstance(info, dict)]
    names = [data.text(info.get("function_declaration")) for info in infos]
    names = ", ".join(f"`{name.removesuffix(':')}`" for name in names if name)
    if names:
        question += f"\n\nWrite {names}."
    return example_of(question, row.get("solution"), row.get("test") or row.get("test_code"))


def mbpp(row):
    """Reads a text, code and asserts; the first assert shows the name to use."""
    question = data.text(row.get("text") or row.get("prompt"))
    asserts = row.get("test_list") or [""]
    parts = [*(row.get("test_imports") or []), row.get("test_setup_code") or "", *asserts]
    tests = "\n".join(part for part in parts if isinstance(part, str))
    if question:
        question += f"\n\nIt must pass `{asserts[0]}`."
    return example_of(question, row.get("code"), tests)


def example_of(question, solution, tests):
    """Returns an Example, why its tests cannot be used, or None if a part is missing."""
    solution, tests = data.text(solution).replace("\r\n", "\n"), data.text(tests)
    if not (question and solution and tests):
        return None
    for name in reversed(re.findall(r"^def (\w+)", solution, re.MULTILINE)):
        if hasattr(builtins, name) and name in tests:  # sum(), say, means the solution's
            tests = f"from solution import {name}\n{tests}"
    reference = f"```python\n{solution}\n```"
    example = Example(INSTRUCTION.format(question), reference, {"tests": tests})
    return unit_tests.obstacle(tests, solution) or example


def tests_of(example) -> str:
    tests = example.facts["tests"]
    texts = [tests] if isinstance(tests, str) else tests
    if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        fail(f"unit tests must be a text or a list of texts, not {unit_tests.cut(repr(tests), 60)}")
    return "\n".join(texts)


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
        if data.has(rows, "question", "solution"):
            return kodcode
        if data.has(rows, "code", "test_list"):
            return mbpp
        needed = "question, solution, test or text, code, test_list"
        fail(f"{name} has the fields {', '.join(rows[0])}; it needs {needed}")

    return data.load(args, reader)
