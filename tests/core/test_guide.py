"""docs/GUIDE.md shows what is: its code, the tour's output, and figures of the results."""

import ast
import re
from pathlib import Path
from textwrap import dedent

import pytest
import test_exercises
from forking import python

from t2g.log import METRICS
from t2g.tasks import toy

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "GUIDE.md").read_text(encoding="utf-8")
QUOTES = re.findall(
    r"^\[`([\w.]+)`, (\S+)\]\(\.\./\2\)\n```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL
)
OUTPUT = "\n".join(re.findall(r"^```text\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL))
PROSE = re.sub(r"^```.*?^```$|\$\$.*?\$\$|`[^`\n]*`", "", GUIDE, flags=re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"(?<![\d.])\d+\.\d+(?!\d)")


def source_of(path, name) -> list[str]:
    """The lines of a function, or of a method Class.name, in a file."""
    source = (ROOT / path).read_text(encoding="utf-8")
    scope = ast.parse(source)
    for part in name.split("."):
        (scope,) = (node for node in scope.body if getattr(node, "name", None) == part)
    return source.splitlines()[scope.lineno - 1 : scope.end_lineno]


def contains(lines, code) -> bool:
    """True if code is a run of these lines, up to a common indentation."""
    count = len(code.splitlines())
    runs = ("\n".join(lines[i : i + count]) for i in range(len(lines)))
    return any(dedent(code).rstrip() == dedent(run) for run in runs)


@pytest.mark.parametrize(("name", "file", "code"), QUOTES, ids=[name for name, *_ in QUOTES])
def test_quoted_code_stands_in_the_function_that_is_named(name, file, code):
    assert contains(source_of(file, name), code), f"{name} of {file} does not contain\n{code}"


def test_every_code_block_is_checked():
    assert len(QUOTES) == GUIDE.count("```python") > 10


def test_the_tour_prints_what_the_guide_shows(tmp_path):
    assert python(ROOT / "examples" / "tour.py", cwd=tmp_path) == OUTPUT


def test_figures_of_the_guide_stand_in_the_results_or_in_the_tour():
    results = [(ROOT / "docs" / name).read_text() for name in ("RESULTS.md", "DEVIATIONS.md")]
    healthy = re.findall(r"^\| .* → .*$", GUIDE, re.MULTILINE)
    known = FIGURE.findall("".join([*results, OUTPUT, *healthy, *(code for *_, code in QUOTES)]))
    assert set(FIGURE.findall(PROSE)) <= set(known)


def test_metrics_in_the_table_of_symptoms_exist():
    table = GUIDE[GUIDE.index("| what you see") :].split("\n\n")[0]
    cells = [row.split(" | ")[1] for row in table.splitlines()[2:]]
    metrics = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert len(metrics) > 10 and metrics <= {*METRICS, *toy.METRICS}


def test_every_question_has_its_solution():
    solutions = re.findall(r"test_(exercise_\d+[a-z]?)", " ".join(vars(test_exercises)))
    questions = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(exercise_\d+[a-z]?)`", questions)) == set(solutions)
