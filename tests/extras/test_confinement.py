"""What a hostile program cannot reach: files, connections, other processes and its own rights.

A program that kills or deletes checks first that it cannot hit anything real.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from extras.code import sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")


@pytest.fixture
def confined(sandboxed):
    """Runs programs on a machine that has all protections."""
    missing = set(sandbox.PROTECTIONS) - set(sandbox.protections())
    if missing:
        pytest.skip(f"this machine cannot guarantee {', '.join(missing)}")
    return sandboxed


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


def test_the_environment_stays_outside(sandboxed, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert "secret" not in sandboxed("import os\nprint(os.environ)").stdout


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
