"""Hostile programs. Each test says what did not happen, and after each one the next program runs, unaffected and at once.

They run on shared machines: a bomb is bounded by itself, and what kills or deletes first looks that it cannot hit anything real.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from extras.code import sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def kind(request):
    """Each kind of confinement that this machine has."""
    try:
        sandbox.launch(request.param, "pass", 10, 256, {})
    except RuntimeError as error:
        pytest.skip(f"{request.param}: {error}")
    return request.param


@pytest.fixture
def run(kind):
    """Runs a program in that kind; afterwards another program must run as if nothing had been."""

    def launch(program, timeout_s=3, memory_mb=512, files=None):
        return sandbox.launch(kind, program, timeout_s, memory_mb, files or {})

    yield launch
    start = time.monotonic()
    assert launch("import os\nassert os.listdir() == [] and sum(range(10)) == 45").passed
    assert time.monotonic() - start < 2


# ---- what programs are told --------------------------------------------------------------------------------------------


def test_a_program_that_comes_to_its_end_passes_and_others_say_why_not(run):
    result = run("import sys\nprint('out')\nprint('err', file=sys.stderr)\nassert 1 + 1 == 2")
    assert (
        result.passed
        and result.reason == ""
        and (result.stdout, result.stderr) == ("out\n", "err\n")
        and result.seconds < 2
    )
    result = run("def f(x):\n    return 1 / x\nf(0)")
    assert not result.passed and result.reason == "ZeroDivisionError: division by zero"
    assert 'File "program.py", line 2, in f\n    return 1 / x\n' in result.stderr
    assert run("assert 1 == 2, 'no'").reason == "AssertionError: no"
    assert run("f(").reason.startswith("SyntaxError: '(' was never closed")
    assert "null bytes" in run("a = '\0'").reason
    assert run("input()").reason.startswith("EOFError")


def test_files_can_be_imported_and_nothing_else_is_there(run):
    files = {"solution.py": "def f(x): return x * x"}
    assert run(
        "import os\nfrom solution import f\nassert f(3) == 9 and os.listdir() == ['solution.py']",
        files=files,
    ).passed


def test_usual_programs_work(run):
    """Threads, event loops, other processes, libraries, deep recursion."""
    assert run(
        "import asyncio, collections, dataclasses, json, numpy, random, re, subprocess, sys, typing\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(4) as pool: assert sum(pool.map(lambda x: x, [1, 2])) == 3\n"
        "async def one(): return 1\n"
        "assert asyncio.run(one()) == 1\n"
        "assert collections.namedtuple('P', 'a b')(1, 2).b == 2 and numpy.ones(3).sum() == 3\n"
        "assert subprocess.run([sys.executable, '-c', 'print(7)'], capture_output=True).stdout == b'7\\n'\n"
        "sys.setrecursionlimit(10**6)\n"
        "def depth(n): return 0 if n == 0 else 1 + depth(n - 1)\n"
        "assert depth(50_000) == 50_000\n"
        "open('note', 'w').write('x')\n"
        "assert open('note').read() == 'x'\n"
        "import os\n"
        "os.remove('note')"
    ).passed


def test_programs_are_the_same_every_time(run):
    """The order of a set of texts depends on the seed of hashes."""
    program = "print(list({'a', 'b', 'c', 'd', 'e', 'f', 'g'}))"
    assert run(program).stdout == run(program).stdout


def test_the_protections_of_this_machine_are_found_by_trying():
    held = sandbox.protections()
    assert (
        set(held) <= set(sandbox.PROTECTIONS)
        and len(held) == {"namespaces": 4, "landlock": 4, "limits": 1}[sandbox.strongest()]
    )


# ---- a pass cannot be faked ----------------------------------------------------------------------------------------------

TEST = """
import math, unittest
from solution import f
assert f(2) == 4
assert all(f(x) == 2 * x for x in range(3))
unittest.TestCase().assertEqual(f(3), 6)
assert math.isclose(f(0.5), 1)
end = True
"""
TO_THE_BOTTOM = "import sys\nframe = sys._getframe()\nwhile frame.f_back: frame = frame.f_back\n"
HUNT = """
def hunt(*_):
    import gc
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
    "a thread that exits": "import os, threading, time\nthreading.Thread(target=lambda: os._exit(0)).start(); time.sleep(0.3)",
    "a printed OK": "print('OK\\n1 passed')\nimport os; os._exit(0)",
    "an exit handler": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)",
    "hooks": "import os, sys, threading\nsys.excepthook = threading.excepthook = lambda *_: os._exit(0)\n1 / 0",
    "a killed process": "import os\nos.kill(os.getpid(), 9)",
    "a guessed token": "import os\nfor fd in (1, 2, 3):\n    os.write(fd, b'x' * 16)\nos._exit(0)",
    "closed files": "import os\nos.closerange(0, 64)\ndef f(x): return 0",
    "all": "import builtins\nbuiltins.all = lambda _: True\ndef f(x): return 4",
    "all in the test": "import __main__\n__main__.all = lambda _: True\ndef f(x): return 2 * x",
    "the test's builtins": "import __main__ as m, builtins\nm.__builtins__ = vars(builtins) | {'all': any}\ndef f(x): return 2 * x",
    "AssertionError": "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\ndef f(x): return 4",
    "exit and print": "import builtins\nbuiltins.exit = builtins.print = lambda *_: None\ndef f(x): return 4",
    "sys.modules": "import sys, types\nsys.modules['math'] = types.SimpleNamespace(isclose=all)\ndef f(x): return 2 * x",
    "math.isclose": "import math\nmath.isclose = lambda *_: True\ndef f(x): return int(2 * x)",
    "unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *_: None\ndef f(x): return 7 if x == 3 else 2 * x",
    "a jump over the rest": """
import sys
def f(x):
    def jump(frame, event, arg):
        if frame.f_code.co_name == "<module>" and event == "line":
            frame.f_lineno = 8
        return jump
    sys._getframe(1).f_trace = jump
    sys.settrace(jump)
    return 4
""",
    "a watch that swallows errors": f"{TO_THE_BOTTOM}frame.f_globals['fail'] = lambda *_: None\n1 / 0",
    "a watch with another code": f"{TO_THE_BOTTOM}frame.f_globals['fail'].__code__ = (lambda *_: None).__code__\n1 / 0",
    "the token in memory": f"{HUNT}\nhunt()",
    "the token, from the main thread": f"{HUNT}\nimport signal, sys, threading, time\nsys.excepthook = hunt\n"
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
def test_an_answer_that_is_equal_to_everything_is_no_pass():
    equal = "class Equal(float):\n    def __eq__(self, other): return True\ndef f(x): return Equal(2 * x + 1e-12)"
    assert not sandbox.run(TEST, 5, 512, {"solution.py": equal}).passed


def test_patched_pytest_is_found():
    test = "import pytest\nfrom solution import f\nwith pytest.raises(ValueError):\n    f(-1)"
    honest = "def f(x): raise ValueError"
    fake = "import contextlib, pytest\npytest.raises = lambda *_: contextlib.nullcontext()\ndef f(x): return 1"
    assert sandbox.run(test, 10, 512, {"solution.py": honest}).passed
    assert (
        sandbox.run(test, 10, 512, {"solution.py": fake}).reason
        == "RuntimeError: it changed pytest.raises"
    )


# ---- time, memory, files, processes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(60)", "import signal; signal.pause()"]
)
def test_the_clock_runs_out(run, program):
    start = time.monotonic()
    result = run(program, timeout_s=0.5)
    assert (
        not result.passed
        and result.reason == "timeout after 0.5 s"
        and time.monotonic() - start < 3
    )
    assert 'File "program.py", line 1 in <module>' in result.stderr  # where it was


def test_memory_is_not_given_beyond_the_limit(run):
    assert run("a = bytearray(50 * 10**9)").reason == "MemoryError"
    assert run("a = bytearray(300 * 2**20)", memory_mb=256).reason == "MemoryError"


def test_endless_print_is_cut(run):
    result = run("while True: print('x' * 10_000)", timeout_s=5)
    assert not result.passed and len(result.stdout) <= 2**16


def test_huge_files_are_not_written(run):
    result = run("file = open('big', 'wb')\nwhile True: file.write(b'x' * 10**6)", timeout_s=5)
    assert not result.passed and ("too large" in result.reason or "No space" in result.reason)


def test_a_fork_bomb_stays_small(run):
    """The bomb forks at most 200 times, each child for at most 5 seconds."""
    program = """
import os, time
children = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        children += 1
    except OSError:
        pass
print(children)
"""
    result = run(program, timeout_s=5)
    assert result.passed and 10 < int(result.stdout) < 64


@pytest.mark.parametrize("end", ["", "time.sleep(60)"])
def test_a_daemon_dies_with_the_program(run, end):
    """It leaves its group and its session and would live 5 seconds, under a name that no other process has."""
    mark = f"t2g-daemon-{os.getpid()}-{time.monotonic_ns()}"
    program = f"""
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(5)", "{mark}"])
    os._exit(0)
os.wait()
time.sleep(0.2)
{end}
"""
    assert run(program, timeout_s=0.5).passed == (not end)
    assert (
        mark not in subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True).stdout
    )


def descendants(pid):
    lines = subprocess.run(
        ["ps", "-eo", "pid,ppid,stat"], capture_output=True, text=True
    ).stdout.splitlines()[1:]
    parents = {
        int(child): int(parent) for child, parent, state in map(str.split, lines) if state[0] != "Z"
    }
    found = [child for child, parent in parents.items() if parent == pid]
    return found + [grandchild for child in found for grandchild in descendants(child)]


def test_a_program_dies_with_whoever_runs_it(kind, tmp_path):
    trainer = f"from extras.code import sandbox; sandbox.launch({kind!r}, 'import time; time.sleep(20)', 20, 512, {{}})"
    here = dict(
        cwd=Path(__file__).parents[2], env={**os.environ, "TMPDIR": str(tmp_path)}
    )  # it cannot tidy up
    running = subprocess.Popen([sys.executable, "-c", trainer], **here)
    depth = {"namespaces": 3, "landlock": 2}[
        kind
    ]  # launcher, guard, program; here launcher and guard are one
    assert any(time.sleep(0.2) or len(descendants(running.pid)) == depth for _ in range(25))
    started = descendants(running.pid)
    running.kill()
    running.wait()
    assert any(
        time.sleep(0.1) or not any(Path(f"/proc/{pid}").exists() for pid in started)
        for _ in range(20)
    )


# ---- the rest of the machine ---------------------------------------------------------------------------------------------


@pytest.fixture
def canary(tmp_path):
    """A file that anybody may read, write and delete."""
    path = tmp_path / "canary"
    path.write_text("alive")
    path.chmod(0o666)
    for folder in (tmp_path, *list(tmp_path.parents)[:3]):
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o777 if folder == tmp_path else 0o755)
    return path


def test_files_outside_are_neither_read_nor_written_nor_deleted(run, kind, canary):
    program = f"""
import os
path = {str(canary)!r}
done = []
def attempt(name, action, *args):
    try:
        action(*args)
        done.append(name)
    except OSError:
        pass
attempt("read", lambda: open(path).read())
attempt("write", lambda: open(path, "w").write("dead"))
attempt("delete", os.remove, path)
attempt("rename", os.rename, path, path + "2")
attempt("link", os.link, path, "mine")
attempt("neighbour", lambda: open(path + "3", "w"))
attempt("list", os.listdir, os.path.dirname(path))
attempt("list home", os.listdir, {os.path.expanduser("~")!r} + "/.config")
attempt("passwd", open, "/etc/passwd")
attempt("environment of others", lambda: open("/proc/1/environ").read() or open("/proc/{os.getpid()}/environ").read())
attempt("own memory", open, "/proc/self/mem", "rb")
attempt("mode", os.chmod, path, 0)
attempt("Python", lambda: open(os.__file__, "a"))
print(done)
"""
    assert run(program).stdout == "[]\n"
    if kind == "namespaces":
        assert run("import os\nassert os.statvfs(os.__file__).f_flag & os.ST_RDONLY").passed
    assert canary.read_text() == "alive" and list(canary.parent.iterdir()) == [canary]


def test_the_environment_stays_outside(run, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert "secret" not in run("import os\nprint(os.environ)").stdout


def test_no_connection_reaches_the_machine(run):
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        datagrams.bind(("127.0.0.1", 0))
        server.settimeout(0.2)
        datagrams.settimeout(0.2)
        program = f"""
import socket
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"hello", ("127.0.0.1", {datagrams.getsockname()[1]}))
except OSError:
    pass
socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), timeout=1)
"""
        assert not run(program).passed
        for receive in (server.accept, lambda: datagrams.recv(5)):
            with pytest.raises(TimeoutError):
                receive()


def test_no_call_gets_round_what_is_refused_or_leaves_something_behind(kind):
    """Under Landlock: a ring of io_uring, System V's memory, semaphores, messages, a POSIX queue, keys."""
    if kind != "landlock" or os.uname().machine != "x86_64":
        pytest.skip("only Landlock needs the filter; the numbers are those of x86_64")
    program = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
calls = [(425, 4, ctypes.create_string_buffer(120)), (29, 0, 4096, 0o1600), (64, 0, 1, 0o1600), (68, 0, 0o1600),
         (240, b"t2g-test", 0o100 | 2, 0o600, None),
         (248, b"user", b"t2g", b"x", 1, -2), (249, b"user", b"t2g", None, -2), (250, 0, -2, 1)]
for call in calls:
    print(call[0], libc.syscall(*call), ctypes.get_errno())
"""
    said = sandbox.launch(kind, program, 3, 512, {}).stdout.split("\n")[:-1]
    assert len(said) == 8 and all(line.endswith(" -1 1") for line in said), said  # EPERM


def test_signals_reach_nobody_else(run):
    """SIGKILL to its parent and to a bystander; kill(-1) only where it is sure not to be root and to be alone or unprivileged."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        program = f"""
import os, signal
for pid in (os.getppid(), {bystander.pid}, {os.getpid()}):
    try:
        if pid not in (0, os.getpid()): os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
if os.getppid() == 1 and os.getuid() != 0:
    try: os.kill(-1, signal.SIGKILL)
    except OSError: pass
print("alive")
"""
        assert run(program).stdout == "alive\n"
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_program_has_no_rights_to_win_back(run, kind):
    """At most CAP_DAC_READ_SEARCH, where Landlock says what may be read."""
    program = f"""
import ctypes, os
libc = ctypes.CDLL(None)
header, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(header, rights) == 0 and set(rights) <= {{0, {4 if kind == "landlock" else 0}}}, list(rights)
assert os.getuid() != 0 and libc.prctl(39, 0, 0, 0, 0) == 1  # no new privileges
assert libc.mount(None, b"/", None, 0x1020, None) == -1  # not writable again
"""
    result = run(program)
    assert result.passed, result.reason


def test_a_machine_that_can_run_nothing_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "JAIL", tmp_path / "none.py")
    sandbox.strongest.cache_clear()
    with pytest.raises(RuntimeError, match="No such file"):
        sandbox.run("pass", 1, 256)
    sandbox.strongest.cache_clear()
