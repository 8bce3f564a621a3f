r"""Runs programs that nobody has read: what a policy wrote, with the tests that judge it. Linux only, about 0.07 s a run.

    run("from solution import f\nassert f(2) == 4", timeout_s=5, memory_mb=512, files={"solution.py": "def f(x): return x * x"})

A program passes if it comes to its end; a token that it cannot know says that it did (t2g/witness.py). exit(0), os._exit(0), a
printed "OK", an exit handler, an assert library that is found patched at the end are no pass. Its process is t2g/jail.py. What
holds there:

- one clock for the program and all that it starts; all die with it, daemons too; at most 64 processes and threads at once
- limits on the memory of each process (memory_mb) and on files (16 MiB); of what it prints the last 64 KiB are kept
- no input, no environment, an empty folder for a home; the same seed of hashes each time
- no file but Python's and those under /usr and /lib, to read; no network; not root; no signal to other processes (PROTECTIONS)

Started by root, programs run as another user, who must be able to read the folder of Python's packages (a virtual environment).

The last line is made by namespaces where the kernel lets us make them, by Landlock and seccomp where not, and not at all where
there is neither; protections() says what a machine has. Under Landlock alone programs can ask whether a file exists, what they
start outlives us if we are killed, and before Linux 6.12 they can send signals to processes of their user. Never covered:

- The code under test shares an interpreter with the test that calls it. Answers that are equal to everything, expected values
  read from the caller's frame, libraries patched behind their public names or mended before the end, test classes that are
  rebound while an earlier test runs, memory read with ctypes: such a pass is faked.
- The memory of all processes together, 64 times the limit, and faults of the kernel itself: this is no virtual machine.

Tracing, profiling and the garbage collector's lists are forbidden to programs, and signal handlers cannot be set.
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
KINDS = ("namespaces", "landlock", "limits")  # from the strongest on
START_S = 10  # most seconds that Python and the kernel may take to start and to end a program
PROTECTIONS = (
    "no file but Python's, read-only",
    "no network",
    "no signal to other processes",
    "not root",
)
PROBE = """
import ctypes, os, socket
def refused(action, *args):
    try:
        action(*args)
    except OSError:
        return True
def ring():
    if ctypes.CDLL(None).syscall(425, 1, ctypes.create_string_buffer(120)) < 0:
        raise OSError
print(int(bool(refused(open, FILE))))
unreachable = refused(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 9)))
print(int(bool(unreachable and (not refused(socket.socket) or refused(ring)))))  # where socket() is refused, io_uring gives one
print(int(bool(refused(os.kill, PID, 0))))
print(int(os.getuid() != 0))
"""  # what each of the four is found by


class Result(NamedTuple):
    passed: bool  # it came to its end
    reason: str  # why not: the exception, "timeout after 5 s", "it ended before its last line", "killed by signal 9"
    stdout: str  # the last 64 KiB of what it printed
    stderr: str  # the same; a traceback, or the stack at the timeout
    seconds: float  # wall clock


def run(
    program: str, timeout_s: float = 10, memory_mb: int = 512, files: dict | None = None
) -> Result:
    """Runs a program, beside files of these names and texts that it can import.

    Raises: RuntimeError if this machine can run no program in this way.
    """
    kind = strongest()
    try:
        return launch(kind, program, timeout_s, memory_mb, files or {})
    except RuntimeError as error:  # it ran programs before, so this one is to blame
        return Result(False, f"the sandbox was broken: {error}", "", "", 0.0)


@cache
def protections() -> list[str]:
    """Which of PROTECTIONS hold on this machine, as a program finds when it tries. Limits and a watched end hold on all."""
    with tempfile.NamedTemporaryFile(prefix="t2g-") as secret:
        Path(secret.name).chmod(0o666)
        program = PROBE.replace("FILE", repr(secret.name)).replace("PID", str(os.getpid()))
        return [
            name
            for name, held in zip(PROTECTIONS, run(program, START_S, 256).stdout.split())
            if held == "1"
        ]


@cache
def strongest() -> str:
    """The strongest kind of confinement that this machine has, by trying."""
    if sys.platform != "linux":
        raise RuntimeError("programs are run on Linux only")
    broken = []
    for kind in KINDS:
        try:
            if launch(kind, "pass", START_S, 256, {}).passed:
                return kind
        except RuntimeError as error:
            broken.append(f"{kind}: {error}")
    raise RuntimeError("; ".join(broken))


def launch(kind, program, timeout_s, memory_mb, files) -> Result:
    box = tempfile.mkdtemp(prefix="t2g-")
    variables = {"HOME": "/box" if kind == "namespaces" else box, "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0",
                 "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # fmt: skip
    task = dict(
        kind=kind, box=box, program=program, timeout_s=timeout_s, memory_mb=memory_mb, files=files
    )
    command = [sys.executable, "-s", "-B", "-u", str(JAIL)]
    settings = dict(
        capture_output=True, env=variables, start_new_session=True, timeout=timeout_s + START_S
    )
    try:
        done = subprocess.run(command, input=json.dumps(task).encode(), **settings)
        return Result(**json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        raise RuntimeError("it did not end in time") from None
    except ValueError:
        raise RuntimeError(
            (done.stderr.decode(errors="replace").strip().splitlines() or ["it was killed"])[-1]
        ) from None
    finally:
        subprocess.run(["rm", "-rf", box])
