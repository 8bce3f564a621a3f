"""Hostile programs, and that the next program runs unaffected after each of them.

They run on shared machines: a bomb bounds itself, and a program that kills or deletes checks first
that it cannot hit anything real.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from extras.code import sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")


@pytest.fixture(params=[True, False], ids=["namespaces", "container"])
def namespaces(request):
    """With namespaces, if this machine has them, and without, as in most containers."""
    if request.param and not sandbox.has_namespaces():
        pytest.skip("this machine has no namespaces")
    return request.param


@pytest.fixture
def run(namespaces):
    """Runs programs; afterwards another program must pass as usual, and soon."""

    def launch(program, timeout_s=3, memory_mb=512, files=None):
        return sandbox.launch(program, timeout_s, memory_mb, files or {}, namespaces)

    yield launch
    start = time.monotonic()
    assert launch("import os\nassert os.listdir() == [] and sum(range(10)) == 45").passed
    assert time.monotonic() - start < 2


# ---- what programs can do ------------------------------------------------------------------------


def test_a_program_that_reaches_its_end_passes_and_others_have_a_reason(run):
    result = run("import sys\nprint('out')\nprint('err', file=sys.stderr)\nassert 1 + 1 == 2")
    assert result == (True, "", "out\n", "err\n", result.seconds) and result.seconds < 2
    result = run("def f(x):\n    return 1 / x\nf(0)")
    assert not result.passed and result.reason == "ZeroDivisionError: division by zero"
    assert 'File "program.py", line 2, in f\n    return 1 / x\n' in result.stderr
    assert run("assert 1 == 2, 'no'").reason == "AssertionError: no"
    assert run("f(").reason.startswith("SyntaxError: '(' was never closed")
    assert "null bytes" in run("a = '\0'").reason
    assert run("input()").reason.startswith("EOFError")


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


def test_usual_programs_work(run):
    """Files beside them, threads, event loops, other processes, libraries, deep recursion."""
    result = run(USUAL, files={"solution.py": "x = 1"})
    assert result.passed, result.reason


def test_the_seed_of_hashes_is_fixed(run):
    program = "print(list({'a', 'b', 'c', 'd', 'e', 'f', 'g'}))"
    assert run(program).stdout == run(program).stdout


def test_a_machine_that_can_run_nothing_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "JAIL", tmp_path / "none.py")
    sandbox.protections.cache_clear()
    with pytest.raises(RuntimeError, match="No such file"):
        sandbox.run("pass", 1, 256)


def test_a_protection_that_does_not_hold_is_not_reported(monkeypatch):
    probe = sandbox.PROBE.replace("socket.socket", "socket.socketpair")
    monkeypatch.setattr(sandbox, "PROBE", probe)
    assert "no network" not in sandbox.protections.__wrapped__()


# ---- time, memory, files, processes --------------------------------------------------------------


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(60)", "import signal; signal.pause()"]
)
def test_the_clock_runs_out(run, program):
    start = time.monotonic()
    result = run(program, timeout_s=0.5)
    assert not result.passed and result.reason == "timeout after 0.5 s"
    assert time.monotonic() - start < 3
    assert 'File "program.py", line 1 in <module>' in result.stderr  # where it was


@pytest.mark.parametrize("size", [50 * 10**9, 300 * 2**20])
def test_memory_is_limited(run, size):
    assert run(f"a = bytearray({size})", memory_mb=256).reason == "MemoryError"


def test_endless_output_is_cut(run):
    result = run("while True: print('x' * 10_000)", timeout_s=5)
    assert not result.passed and len(result.stdout) <= 2**16


def test_a_huge_file_is_not_written(run):
    result = run("file = open('big', 'wb')\nwhile True: file.write(b'x' * 10**6)", timeout_s=5)
    assert not result.passed and ("too large" in result.reason or "No space" in result.reason)


def test_many_files_do_not_fill_the_disk(run, namespaces):
    program = "for n in range(40): open(f'{n}', 'wb').write(b'x' * 10**6)"
    assert run(program).passed != namespaces  # containers limit each file alone


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


def test_a_fork_bomb_stays_small(run):
    """The bomb forks at most 200 times, each child for at most 5 seconds."""
    result = run(FORK_BOMB, timeout_s=5)
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
def test_a_daemon_dies_with_the_program(run, end):
    """It leaves its group and its session, under a name that no other process has."""
    mark = f"t2g-daemon-{os.getpid()}-{time.monotonic_ns()}"
    program = DAEMON.replace("MARK", repr(mark)) + end
    assert run(program, timeout_s=0.5).passed == (not end)
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


# ---- the rest of the machine ---------------------------------------------------------------------


@pytest.fixture
def confined(run):
    """Runs programs on a machine that has all protections."""
    missing = set(sandbox.PROTECTIONS) - set(sandbox.protections())
    if missing:
        pytest.skip(f"this machine cannot guarantee {', '.join(missing)}")
    return run


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


INTRUDER = """
import os
done = []
def attempt(action, *args):
    try:
        action(*args)
        done.append((action, args))
    except OSError:
        pass
attempt(open, CANARY)
attempt(open, CANARY, "w")
attempt(open, CANARY + "3", "w")
attempt(os.remove, CANARY)
attempt(os.rename, CANARY, CANARY + "2")
attempt(os.link, CANARY, "mine")
attempt(os.chmod, CANARY, 0)
attempt(os.listdir, os.path.dirname(CANARY))
attempt(os.listdir, HOME + "/.config")
attempt(open, "/etc/passwd")
attempt(open, "/proc/1/environ")
attempt(open, "/proc/PID/environ")
attempt(open, "/proc/self/mem", "rb")
attempt(open, os.__file__, "a")
print(done)
"""


def test_files_outside_are_neither_read_nor_written_nor_deleted(confined, canary):
    program = INTRUDER.replace("CANARY", repr(str(canary))).replace("PID", str(os.getpid()))
    program = program.replace("HOME", repr(os.path.expanduser("~")))
    assert confined(program).stdout == "[]\n"
    assert canary.read_text() == "alive" and list(canary.parent.iterdir()) == [canary]


def test_the_environment_stays_outside(run, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert "secret" not in run("import os\nprint(os.environ)").stdout


CONNECT = """
import socket
try:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.sendto(b"hello", ("127.0.0.1", UDP))
except OSError:
    pass
socket.create_connection(("127.0.0.1", TCP), timeout=1)
"""


def test_no_connection_reaches_the_machine(confined):
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        datagrams.bind(("127.0.0.1", 0))
        ports = server.getsockname()[1], datagrams.getsockname()[1]
        program = CONNECT.replace("TCP", str(ports[0])).replace("UDP", str(ports[1]))
        assert not confined(program).passed
        for receiver, receive in ((server, server.accept), (datagrams, lambda: datagrams.recv(5))):
            receiver.settimeout(0.2)
            with pytest.raises(TimeoutError):
                receive()


REFUSED = """
import ctypes, os
libc, me = ctypes.CDLL(None, use_errno=True), os.getpid()
calls = [(425, 4, ctypes.create_string_buffer(120)),
         (29, 0, 4096, 0o1600), (64, 0, 1, 0o1600), (68, 0, 0o1600),
         (240, b"t2g-test", 0o100 | 2, 0o600, None), (248, b"user", b"t2g", b"x", 1, -2),
         (249, b"user", b"t2g", None, -2), (250, 0, -2, 1),
         (76, b".", 0), (319, b"t2g", 0), (447, 0), (302, me, 7, None, None), (141, 0, me, 0)]
for call in calls:
    print(libc.syscall(*call), ctypes.get_errno())
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86_64")
def test_no_system_call_opens_a_way_round_or_leaves_something_behind(confined):
    """io_uring, System V's memory, semaphores and messages, a POSIX queue, keys; truncate, memory
    that is no process's, and the limits and the priority of other processes."""
    assert confined(REFUSED).stdout == "-1 1\n" * 13  # EPERM


KILL = """
import os, signal
for pid in (os.getppid(), BYSTANDER, TRAINER):
    try:
        if pid not in (0, os.getpid()): os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
if os.getuid() >= 61184:  # a user that no other process has
    try: os.kill(-1, signal.SIGKILL)
    except OSError: pass
print("alive")
"""


@pytest.fixture
def bystander():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    yield process
    process.kill()
    process.wait()


def test_signals_reach_no_other_process(confined, bystander):
    """SIGKILL to its parent, to a bystander and to the process of the tests."""
    program = KILL.replace("BYSTANDER", str(bystander.pid)).replace("TRAINER", str(os.getpid()))
    assert confined(program).stdout == "alive\n"
    assert bystander.poll() is None
    assert confined("import subprocess\nsubprocess.Popen(['sleep', '5']).kill()").passed


RIGHTS = """
import ctypes, os
libc = ctypes.CDLL(None)
header, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(header, rights) == 0 and set(rights) <= {0, 4}, list(rights)
assert os.getuid() != 0 and libc.prctl(39, 0, 0, 0, 0) == 1  # no new privileges
assert libc.mount(None, b"/", None, 0x1020, None) == -1  # not writable again
"""


def test_a_program_has_no_rights_to_win_back(confined):
    """At most CAP_DAC_READ_SEARCH, where Landlock says what may be read."""
    result = confined(RIGHTS)
    assert result.passed, result.reason
