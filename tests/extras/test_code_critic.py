"""The test run as a critic: which line of a program is blamed for what."""

import sys
from pathlib import Path

import pytest

from extras.code import task as code
from extras.code import unit_tests
from t2g import tasks
from t2g.align import resolve
from t2g.feedback import quoted
from t2g.tasks import qa, summarize

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
linux = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")


# ---- the test run as a critic --------------------------------------------------------------------------------------------

PROBLEM = tasks.Example(
    "p",
    "",
    {
        "tests": "from solution import f\n\ndef test_f():\n    assert f(2, 3) == 5\n    assert f(1, 1) == 2"
    },
)


def judge(program, example=PROBLEM, before="Here it is, with x = 1:\n\n", after="\n\nThat is all."):
    """What is said of a program, in a response with prose around it, with each mark's place checked."""
    response = f"{before}```python\n{program}\n```{after}"
    said, kinds = code.critique(example, response), code.kinds(example, response)
    spans, counts = resolve(response, said)
    assert counts["exact"] == len(said.good) + len(said.poor) and counts["ambiguous"] == 0
    inside = range(response.index(program), response.index(program) + len(program) + 1)
    assert all(span.start in inside and span.end in inside for span in spans)
    assert len(kinds) == len(said.poor) and set(kinds) <= {kinds[0]} if kinds else not said.poor
    return said, [quoted(quote)[0] for quote in said.good + said.poor], (kinds or [""])[0]


@linux
def test_a_program_that_passes():
    said, marks, _ = judge("def f(a, b):\n    return a + b")
    assert said.critique == "It passes the tests." and marks == said.good == ["return a + b"]


@linux
def test_a_wrong_answer_is_blamed_on_what_the_function_returns():
    said, marks, kind = judge("def f(a, b):\n    if a == b:\n        return 2\n    return a * b")
    assert (
        said.critique == "It gives a wrong answer: f(2, 3) is 6, not 5." and kind == "wrong answer"
    )
    assert marks == ["return 2", "return a * b"] and not said.good
    many = "def f(a, b):\n    if a: return 1\n    if b: return 2\n    return 3"
    assert judge(many)[1] == ["def f(a, b):"]


@linux
def test_of_several_functions_the_one_that_the_failing_assert_calls_is_blamed():
    tests = "from solution import *\nassert one() == 1\nstack = Stack()\nassert stack.top() == 0"
    program = "class Stack:\n    def top(self):\n        return 9\n\ndef one():\n    return 1\n\ndef two():\n    return 2"
    assert judge(program, tasks.Example("p", "", {"tests": tests}))[1] == ["return 9"]


@linux
def test_an_exception_is_blamed_on_its_line():
    said, marks, kind = judge("def f(a, b):\n    c = a / 0\n    return c")
    assert (
        said.critique == "It fails with ZeroDivisionError: division by zero."
        and kind == "ZeroDivisionError"
    )
    assert marks == ["c = a / 0"]
    assert judge("import nothing\ndef f(a, b): pass")[1:] == (
        ["import nothing"],
        "ModuleNotFoundError",
    )


@linux
def test_a_call_that_does_not_fit_is_blamed_on_the_head_of_the_function():
    said, marks, kind = judge("def f(a):\n    return a")
    assert kind == "TypeError" and marks == ["def f(a):"] and "positional argument" in said.critique


@linux
def test_a_missing_function():
    said, marks, kind = judge("def g(a, b):\n    return a + b")
    assert (said.critique, marks, kind) == (
        "It does not define f.",
        ["def g(a, b):"],
        "missing name",
    )


@linux
def test_a_line_that_is_no_python():
    said, marks, kind = judge("def f(a, b)\n    return a + b")
    assert (
        said.critique == "It is no Python: expected ':'."
        and marks == ["def f(a, b)"]
        and kind == "syntax error"
    )
    assert judge("def f(a, b):\n    return (a + b")[1] == ["return (a + b"]
    assert judge("def f(a, b):")[1] == ["def f(a, b):"]  # cut off: Python misses what comes behind


@linux
def test_time_that_runs_out_is_blamed_on_the_loop(monkeypatch):
    monkeypatch.setattr(unit_tests, "TIMEOUT_S", 0.5)
    said, marks, kind = judge(
        "def f(a, b):\n    for i in range(3):\n        while a:\n            b += 1\n    return b"
    )
    assert (
        said.critique == "It does not end within 0.5 s."
        and marks == ["while a:"]
        and kind == "timeout"
    )
    assert judge("import time\n\ndef f(a, b):\n    time.sleep(9)")[1] == ["def f(a, b):"]


@linux
def test_faked_ends_are_named():
    assert judge("import os\n\ndef f(a, b):\n    os._exit(0)")[2] == "early exit"
    assert judge("import sys\n\ndef f(a, b):\n    sys.exit(0)")[1:] == (
        ["sys.exit(0)"],
        "early exit",
    )
    assert (
        judge("import builtins\nbuiltins.all = None\n\ndef f(a, b):\n    return a + b")[2]
        == "tampering"
    )
    assert judge("import os\nos.write(3, b'\\n\\n')\nos._exit(0)")[2] == "error"


@linux
def test_a_line_that_stands_twice_is_quoted_so_that_it_is_found():
    """judge() sees to it that the quote is unambiguous and lies in the program."""
    _, marks, _ = judge(
        "def f(a, b):\n    return a\n\ndef g(a, b):\n    return a", before="It says\nreturn a\n\n"
    )
    assert marks[0].endswith("return a")


@linux
def test_tests_may_be_a_list_and_need_not_import():
    example = tasks.Example(
        "p", "", {"tests": ["assert f(2) == 4", "assert sorted(f(x) for x in (2, 1)) == [2, 4]"]}
    )
    assert judge("def f(x):\n    return 2 * x", example)[0].good == ["return 2 * x"]


@linux
def test_classes_of_tests_and_pytest_are_run():
    tests = """
import unittest
class TestPlain:
    def setup_method(self, method):
        self.two = 2
    def test_two(self):
        assert f(self.two) == 4
class TestCase(unittest.TestCase):
    def setUp(self):
        self.three = 3
    def test_three(self):
        self.assertEqual(f(self.three), 6)
if __name__ == "__main__":
    unittest.main()
"""
    example = tasks.Example("p", "", {"tests": tests})
    assert judge("def f(x):\n    return 2 * x", example)[0].good
    assert (
        judge("def f(x):\n    return x + 2", example)[2]
        == judge("def f(x):\n    return x + 3", example)[2]
        == "wrong answer"
    )
    raises = tasks.Example(
        "p",
        "",
        {"tests": "import pytest\ndef test():\n    with pytest.raises(ValueError):\n        f(-1)"},
    )
    assert judge("def f(x):\n    raise ValueError", raises)[0].critique == "It passes the tests."
    assert judge("def f(x):\n    return x", raises)[1:] == (["return x"], "wrong answer")


IN_PYTEST = "from solution import f\ndef test_a():\n    assert f(2) == 4\ndef test_b():\n    assert f(3) == 9"
UNDO = "def f(x): return 4\nimport __main__\n"
FAKES = {
    "list() hidden and put back": UNDO
    + "def hidden(_):\n    del __main__.list\n    return []\n__main__.list = hidden",
    "globals() hidden and put back": UNDO
    + "def hidden():\n    del __main__.globals\n    return {}\n__main__.globals = hidden",
    "another code in a test": "import __main__\ndef f(x):\n    __main__.test_b.__code__ = (lambda: None).__code__\n    return 4",
    "another test": "import __main__\ndef f(x):\n    __main__.test_b = lambda: None\n    return 4",
}


@linux
@pytest.mark.parametrize("fake", FAKES)
def test_no_test_function_is_kept_from_running_by(fake):
    assert unit_tests.run(IN_PYTEST, "def f(x): return x * x").passed
    assert not unit_tests.run(IN_PYTEST, FAKES[fake]).passed


@linux
@pytest.mark.xfail(reason="not covered: what is patched is mended before the end", strict=True)
def test_an_assert_library_that_is_patched_and_mended_is_no_pass():
    tests = "import unittest\nclass TestF(unittest.TestCase):\n    def test_f(self):\n        self.assertEqual(f(2), 4)"
    fake = "import unittest\nC = unittest.TestCase\nwas = C.assertEqual\ndef fake(*_): C.assertEqual = was\nC.assertEqual = fake\n"
    assert not unit_tests.run(tests, fake + "def f(x): return 0").passed


CASE = "    def test_f(self):\n        self.assertEqual(f(2), 4)"


@linux
@pytest.mark.parametrize(
    "tests",
    [
        f"import unittest\nclass FTest(unittest.TestCase):\n{CASE}",
        f"from unittest import TestCase as Base\nclass Checks(Base):\n{CASE}",
        f"import unittest\nclass Mixin:\n{CASE}\nclass Last(Mixin, unittest.TestCase):\n    pass",
        "class TestF:\n    def setup_method(self):\n        self.two = 2\n    def test_f(self):\n        assert f(self.two) == 4",
        "if True:\n    def test_f():\n        assert f(2) == 4",
        "def check(g):\n    assert g(2) == 4\ncheck(f)",
        "import pytest\nwith pytest.raises(ZeroDivisionError):\n    1 / (f(2) - 4)",
    ],
)
def test_tests_of_any_name_and_form_are_run(tests):
    assert unit_tests.obstacle(tests) == ""
    assert (
        unit_tests.run(tests, "def f(x): return 2 * x").passed
        and not unit_tests.run(tests, "def f(x): return x").passed
    )


@linux
@pytest.mark.parametrize(
    "tests", ["", "from solution import f", "if __name__ == '__main__':\n    assert f(2) == 4"]
)
def test_tests_that_test_nothing_are_no_pass(tests):
    assert unit_tests.run(tests, "def f(x): return x").reason.endswith("no test was run")


@pytest.mark.parametrize("tests", [5, {"a": 1}, None, ["assert f(2) == 4", 5]])
def test_tests_that_are_no_text_are_refused_in_one_sentence(tests, capsys):
    with pytest.raises(SystemExit):
        code.critique(tasks.Example("p", "", {"tests": tests}), "def f(x): return x")
    assert "unit tests are a text or a list of texts, not " in capsys.readouterr().err


def test_the_program_is_the_last_block_that_defines_something():
    assert (
        code.extract_code("a\n```python\ndef f(): pass\n```\nb\n```python\nf()\n```")
        == "def f(): pass\n"
    )
    assert code.extract_code("```\ndef f(): 1\n```\n```py\ndef f(): 2\n```") == "def f(): 2\n"
    assert code.extract_code("So:\n```python\nx = 1\n```") == "x = 1\n"
    assert code.extract_code("```python\ndef f():\n    return 1") == "def f():\n    return 1"
    assert (
        code.extract_code("1. Thus\n   ```python\n   def f():\n       return 1\n   ```")
        == "def f():\n    return 1\n"
    )
    assert code.extract_code("def f(): return 1") == "def f(): return 1"


@linux
def test_a_response_without_a_program():
    said = code.critique(PROBLEM, "```python\n```")
    assert (
        said.critique == "It holds no program."
        and not said.poor
        and code.score(PROBLEM, "")["parses"] == 0
    )
    assert code.kinds(PROBLEM, "I would add them.") == ["syntax error"]


@linux
def test_the_log_shows_how_the_tests_ended_and_nothing_of_the_machine():
    assert code.test_log(PROBLEM, "def f(a, b): return a + b") == "The tests pass."
    log = code.test_log(PROBLEM, "def f(a, b):\n    return a / 0")
    assert (
        log.startswith("The tests fail: ZeroDivisionError")
        and 'File "solution.py", line 2, in f\n    return a / 0' in log
    )
    assert "program.py" not in log and "witness" not in log and "/tmp" not in log


def test_every_task_says_what_its_scores_mean_and_what_is_good():
    for task in (summarize, qa, code):
        assert 2 <= task.CRITERIA.count(".") <= 6
    assert set(code.METRICS) == {"pass", "parses", "timeout", "lines"}
