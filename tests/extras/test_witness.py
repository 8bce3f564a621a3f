"""What vouches for a pass: no solution can fake one, and an honest one passes."""

import sys

import pytest

from extras.code import sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")

TEST = """
import math, unittest
from solution import f
assert f(2) == 4
assert all(f(x) == 2 * x for x in range(3))
unittest.TestCase().assertEqual(f(3), 6)
assert math.isclose(f(0.5), 1)
end = True
"""
JUMP = """
import sys
def f(x):
    def jump(frame, event, arg):
        if frame.f_code.co_name == "<module>" and event == "line":
            frame.f_lineno = 8
        return jump
    sys._getframe(1).f_trace = jump
    sys.settrace(jump)
    return 4
"""
BOTTOM = """
import sys
nothing = lambda *_: None
frame, code = sys._getframe(), nothing.__code__
while frame.f_back: frame = frame.f_back
"""
HUNT = """
import gc, signal, sys, threading, time
def hunt(*_):
    for found in gc.get_objects():
        if type(found) is map:
            next(found, None)
"""
FAKES = {
    "os._exit when imported": "import os; os._exit(0)",
    "os._exit when called": "import os\ndef f(x): os._exit(0)",
    "sys.exit": "import sys\ndef f(x): sys.exit(0)",
    "SystemExit": "raise SystemExit",
    "exit": "def f(x): exit()",
    "a thread that exits": "import os, threading, time\n"
    "threading.Thread(target=lambda: os._exit(0)).start(); time.sleep(0.3)",
    "a printed OK": "print('OK\\n1 passed')\nimport os; os._exit(0)",
    "an exit handler": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): exit(0)",
    "hooks": "import os, sys, threading\n"
    "sys.excepthook = threading.excepthook = lambda *_: os._exit(0)\n1 / 0",
    "a killed process": "import os\nos.kill(os.getpid(), 9)",
    "a guessed token": "import os\nfor fd in 1, 2, 3: os.write(fd, b'x' * 16)\nos._exit(0)",
    "closed files": "import os\nos.closerange(0, 64)\ndef f(x): return 0",
    "all": "import builtins\nbuiltins.all = lambda _: True\ndef f(x): return 4",
    "all in the test": "import __main__\n__main__.all = lambda _: True\ndef f(x): return 2 * x",
    "the test's builtins": "import __main__, builtins\n"
    "__main__.__builtins__ = vars(builtins) | {'all': any}\ndef f(x): return 2 * x",
    "AssertionError": "import builtins\nbuiltins.AssertionError = KeyError\ndef f(x): return 4",
    "exit and print": "import builtins as b\nb.exit = b.print = lambda *_: 0\ndef f(x): return 4",
    "sys.modules": "import sys, types\n"
    "sys.modules['math'] = types.SimpleNamespace(isclose=all)\ndef f(x): return 2 * x",
    "math.isclose": "import math\nmath.isclose = lambda *_: True\ndef f(x): return int(2 * x)",
    "unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *_: None\n"
    "def f(x): return 7 if x == 3 else 2 * x",
    "a jump over the rest": JUMP,
    "a watch that swallows errors": f"{BOTTOM}frame.f_globals['fail'] = nothing\n1 / 0",
    "a watch with another code": f"{BOTTOM}frame.f_globals['fail'].__code__ = code\n1 / 0",
    "the token in memory": f"{HUNT}hunt()",
    "the token, from the main thread": f"{HUNT}sys.excepthook = hunt\n"
    "signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)\ntime.sleep(0.3)",
    "other threads' frames": "import sys\nsys._current_frames()\ndef f(x): return 2 * x",
    "a child that lives on": "import os\nif os.fork(): os._exit(0)\ndef f(x): return 4",
}


@pytest.mark.parametrize("fake", FAKES)
def test_a_pass_cannot_be_faked_by(fake):
    result = sandbox.run(TEST, 1, 512, {"solution.py": FAKES[fake]})
    assert not result.passed and result.reason


def test_the_honest_solution_of_that_test_passes():
    assert sandbox.run(TEST, 5, 512, {"solution.py": "def f(x): return 2 * x"}).passed


@pytest.mark.xfail(reason="not covered: code under test and test share an interpreter", strict=True)
def test_an_answer_that_equals_everything_is_no_pass():
    equal = "class Equal(float):\n    def __eq__(self, other): return True\n"
    equal += "def f(x): return Equal(2 * x + 1e-12)"
    assert not sandbox.run(TEST, 5, 512, {"solution.py": equal}).passed


def test_patched_pytest_is_found():
    test = "import pytest\nfrom solution import f\nwith pytest.raises(ValueError):\n    f(-1)"
    fake = "import contextlib, pytest\npytest.raises = lambda *_: contextlib.nullcontext()\n"
    honest, fake = "def f(x): raise ValueError", fake + "def f(x): return 1"
    assert sandbox.run(test, 10, 512, {"solution.py": honest}).passed
    result = sandbox.run(test, 10, 512, {"solution.py": fake})
    assert result.reason == "RuntimeError: it changed pytest.raises"
