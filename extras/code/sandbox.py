r"""Runs programs that nobody has read: what a policy wrote, with the tests that judge it.

    run("from solution import f\nassert f(2) == 4", files={"solution.py": "def f(x): return x * x"})

A program passes if it reaches its end, and proves that with a token it cannot know (witness.py).
exit(0), os._exit(0), a printed "OK", an exit handler or a patched assert library is no pass. It
runs in a process of its own (jail.py), on Linux only, in about 0.07 s:

- One clock runs for the program and all that it starts. All of it is killed at the end, daemons
  too. At most 64 processes and threads exist at a time.
- Memory is limited per process (memory_mb), files are limited to 16 MiB, and the last 64 KiB of
  each output are kept.
- There is no input and no environment; the home is an empty folder; the hash seed is fixed.
- It reads no file but Python's and those under /usr and /lib, opens no network connection, reaches
  no other process, and is not root (PROTECTIONS).

The last line needs Landlock (Linux 5.13) and seccomp, which containers allow; protections() tries
what this machine has. Where the kernel also gives out namespaces, to root or to all users, the
files of a program share 16 MiB of memory, and those in /dev/shm as much again; its daemons die even
if we are killed. Without them, the limit holds for each file, multiprocessing has no locks, and
before Linux 6.12 a program can send signals to processes of its user. Programs run as the user who
starts them and can change timestamps of that user's files. Started by root, they run as an
unprivileged user, who must be able to read the folder of Python's packages.

Left out:

- The code under test and the test share an interpreter. These passes are faked: answers that equal
  everything, expected values read from the caller's frame, libraries patched behind their public
  names or restored before the end, test classes rebound while a test runs, memory read by ctypes.
- The memory of all processes together is not limited. A program can ask whether a file exists.
  Kernel bugs are not contained.
- Programs cannot use tracing, profiling, signal handlers and the garbage collector's lists.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

JAIL = Path(__file__).with_name("jail.py")
START_S = 10  # maximum seconds for Python and the kernel to start and to end a program
PROTECTIONS = (
    "no file but Python's, read-only",
    "no network",
    "no signal to other processes",
    "not root",
)
PROBE = """
import os, socket

def refused(action, *args):
    try:
        action(*args)
    except OSError:
        return True
    return False

print(refused(open, {file!r}), refused(socket.socket), refused(os.kill, {pid}, 0), os.getuid() != 0)
"""  # tries each of the four protections


class Result(NamedTuple):
    passed: bool  # the program reached its end
    reason: str  # why not: the exception, "timeout after 5 s", "killed by signal 9", ...
    stdout: str  # the last 64 KiB of its output
    stderr: str  # the same, with a traceback or the stack at the timeout
    seconds: float  # wall clock


def run(program: str, timeout_s: float = 10, memory_mb: int = 512, files=None) -> Result:
    """Runs a program; files {name: text} lie beside it for import.

    Raises RuntimeError if this machine cannot run programs at all.
    """
    protections()
    try:
        return launch(program, timeout_s, memory_mb, files or {}, has_namespaces())
    except RuntimeError as error:  # the machine has run programs before, so this one is to blame
        return Result(False, f"the sandbox was broken: {error}", "", "", 0.0)


@cache
def protections() -> list[str]:
    """Returns those of PROTECTIONS that a program on this machine meets when it tries.

    Raises RuntimeError if this machine cannot run programs at all.
    """
    if sys.platform != "linux":
        raise RuntimeError("programs run on Linux only")
    with tempfile.NamedTemporaryFile(prefix="t2g-") as secret:
        Path(secret.name).chmod(0o666)
        probe = PROBE.format(file=secret.name, pid=os.getpid())
        result = launch(probe, START_S, 256, {}, has_namespaces())
    if not result.passed:
        raise RuntimeError(result.reason)
    return [name for name, held in zip(PROTECTIONS, result.stdout.split()) if held == "True"]


@cache
def has_namespaces() -> bool:
    """Returns True if this machine gives programs namespaces of their own, by trying."""
    try:
        return launch("pass", START_S, 256, {}, namespaces=True).passed
    except RuntimeError:
        return False


def launch(program, timeout_s, memory_mb, files, namespaces) -> Result:
    """Starts jail.py on a program. Raises RuntimeError if the jail gives no verdict."""
    box = tempfile.mkdtemp(prefix="t2g-")
    job = dict(box=box, program=program, files=files, namespaces=namespaces)
    job |= dict(timeout_s=timeout_s, memory_mb=memory_mb)
    env = dict(HOME=box, PATH="/usr/bin:/bin", PYTHONHASHSEED="0", MALLOC_ARENA_MAX="1")
    env |= dict(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    command = [sys.executable, "-s", "-B", "-u", str(JAIL)]
    options = dict(capture_output=True, start_new_session=True, timeout=timeout_s + START_S)
    try:
        done = subprocess.run(command, input=json.dumps(job).encode(), env=env, **options)
        return Result(**json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        raise RuntimeError("it did not end in time") from None
    except ValueError:  # no verdict
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(lines[-1] if lines else "it was killed") from None
    finally:
        subprocess.run(["rm", "-rf", box])
