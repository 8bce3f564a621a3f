"""Hostile programs, and that the next program runs unaffected after each of them.

They run on shared machines: a bomb bounds itself.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from extras.code import sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")


def test_a_program_that_reaches_its_end_passes_and_others_have_a_reason(sandboxed):
    result = sandboxed("import sys\nprint('out')\nprint('err', file=sys.stderr)\nassert 1 + 1 == 2")
    assert result == (True, "", "out\n", "err\n", result.seconds) and result.seconds < 2
    result = sandboxed("def f(x):\n    return 1 / x\nf(0)")
    assert not result.passed and result.reason == "ZeroDivisionError: division by zero"
    assert 'File "program.py", line 2, in f\n    return 1 / x\n' in result.stderr
    assert sandboxed("assert 1 == 2, 'no'").reason == "AssertionError: no"
    assert sandboxed("f(").reason.startswith("SyntaxError: '(' was never closed")
    assert "null bytes" in sandboxed("a = '\0'").reason
    assert sandboxed("input()").reason.startswith("EOFError")


USUAL = """
import asyncio, collections, json, numpy, random, re, subprocess, sys, tempfile, typing
import os, solution
assert solution.x == 1 and os.listdir() == ["solution.py"]
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    assert sum(pool.map(lambda x: x, [1, 2])) == 3
async def one():
    return 1
assert asyncio.run(one()) == 1
assert collections.namedtuple("P", "a b")(1, 2).b == 2 and numpy.ones(3).sum() == 3
seven = subprocess.run([sys.executable, "-c", "print(7)"], capture_output=True)
assert seven.stdout == b"7\\n"
sys.setrecursionlimit(10**6)
def depth(n):
    return 0 if n == 0 else 1 + depth(n - 1)
assert depth(50_000) == 50_000
with tempfile.NamedTemporaryFile("w+") as file:
    file.write("x")
    file.seek(0)
    assert file.read() == "x"
"""


def test_usual_programs_work(sandboxed):
    """Files beside them, threads, event loops, other processes, libraries, deep recursion."""
    result = sandboxed(USUAL, files={"solution.py": "x = 1"})
    assert result.passed, result.reason


def test_the_seed_of_hashes_is_fixed(sandboxed):
    program = "print(list({'a', 'b', 'c', 'd', 'e', 'f', 'g'}))"
    assert sandboxed(program).stdout == sandboxed(program).stdout


def test_a_machine_that_can_run_nothing_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "JAIL", tmp_path / "none.py")
    sandbox.protections.cache_clear()
    with pytest.raises(RuntimeError, match="No such file"):
        sandbox.run("pass", 1, 256)


def test_a_protection_that_does_not_hold_is_not_reported(monkeypatch):
    probe = sandbox.PROBE.replace("socket.socket", "socket.socketpair")
    monkeypatch.setattr(sandbox, "PROBE", probe)
    assert "no network" not in sandbox.protections.__wrapped__()


LIMITS = [  # a program, the limits of its time and memory, and why it ends
    ("while True: pass", 0.5, 512, "timeout after 0.5 s"),
    ("import time; time.sleep(60)", 0.5, 512, "timeout after 0.5 s"),
    ("import signal; signal.pause()", 0.5, 512, "timeout after 0.5 s"),
    (f"a = bytearray({50 * 10**9})", 3, 256, "MemoryError"),
    (f"a = bytearray({300 * 2**20})", 3, 256, "MemoryError"),
    ("while True: print('x' * 10_000)", 5, 512, ""),
    ("f = open('big', 'wb')\nwhile True: f.write(b'x' * 10**6)", 5, 512, "too large|No space"),
]


@pytest.mark.parametrize(("program", "seconds", "mebibytes", "reason"), LIMITS)
def test_time_memory_output_and_files_are_limited(sandboxed, program, seconds, mebibytes, reason):
    start = time.monotonic()
    result = sandboxed(program, seconds, mebibytes)
    assert not result.passed and re.search(reason, result.reason)
    assert time.monotonic() - start < seconds + 2.5 and len(result.stdout) <= 2**16
    if "timeout" in reason:  # it says where the program was
        assert 'File "program.py", line 1 in <module>' in result.stderr


def test_many_files_do_not_fill_the_disk(sandboxed, namespaces):
    program = "for n in range(40): open(f'{n}', 'wb').write(b'x' * 10**6)"
    assert sandboxed(program).passed != namespaces  # containers limit each file alone


FORK_BOMB = """
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


def test_a_fork_bomb_stays_small(sandboxed):
    """The bomb forks at most 200 times, each child for at most 5 seconds."""
    result = sandboxed(FORK_BOMB, timeout_s=5)
    assert result.passed and 10 < int(result.stdout) < 64


def processes() -> list[list[str]]:
    """Returns the id, parent, state and arguments of each process of this machine."""
    command = ["ps", "-ewwo", "pid=,ppid=,stat=,args="]
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    return [line.split(maxsplit=3) for line in listed.splitlines()]


DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(5)", MARK])
    os._exit(0)
os.wait()
time.sleep(0.2)
"""


@pytest.mark.parametrize("end", ["", "time.sleep(60)"])
def test_a_daemon_dies_with_the_program(sandboxed, end):
    """It leaves its group and its session, under a name that no other process has."""
    mark = f"t2g-daemon-{os.getpid()}-{time.monotonic_ns()}"
    program = DAEMON.replace("MARK", repr(mark)) + end
    assert sandboxed(program, timeout_s=0.5).passed == (not end)
    assert not any(mark in process[-1] for process in processes())


def test_a_program_dies_with_whoever_runs_it(namespaces, tmp_path):
    def descendants(pid):
        children = [int(p[0]) for p in processes() if p[1] == str(pid) and p[2][0] != "Z"]
        return children + [found for child in children for found in descendants(child)]

    def soon(condition):
        return any(condition() or time.sleep(0.1) for _ in range(50))

    trainer = "from extras.code import sandbox; sandbox.launch('while True: pass', 20, 512, {}, "
    trainer += f"{namespaces})"
    env = {**os.environ, "TMPDIR": str(tmp_path)}  # the trainer cannot tidy up
    root = Path(__file__).parents[2]
    running = subprocess.Popen([sys.executable, "-c", trainer], cwd=root, env=env)
    depth = 3 if namespaces else 2  # a launcher, the guard and the program
    assert soon(lambda: len(descendants(running.pid)) == depth)
    started = descendants(running.pid)
    running.kill()
    running.wait()
    assert soon(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))
