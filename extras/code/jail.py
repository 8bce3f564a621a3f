"""Runs one program cut off from the machine. sandbox.py starts this file as a script.

It reads a job as JSON from stdin and writes a verdict as JSON to stdout. This process is the guard:
it forks the program, waits for it or for the timeout, kills what is left and writes the verdict.
It imports nothing else of the project, so that a program cannot reach it. The program's process
gives up its rights in layers:

    namespaces     a small disk in memory and processes of its own, where containers allow it
    Landlock       allows Python's files and the program's folder, and no signals to others
    seccomp        refuses what Landlock does not cover: sockets, io_uring, chmod, shared memory
    another user   keeps limits and signals apart from the user who started us, if that is root
    rlimits        bound memory, processor time, file size and processes
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import resource
import sys
import time
from signal import SIGKILL
from struct import pack

MAX_PROCESSES = 64  # of a program at a time, threads included
MAX_FILE_MB, MAX_FILES = 16, 4096  # size of a file; with namespaces, total size and number
MAX_OUTPUT = 65536  # bytes that are kept of stdout and of stderr, the last ones
GRACE = 0.2  # seconds from the timeout, when stderr receives the program's stack, to the kill
USERS = range(61184, 65520)  # ids that systemd reserves for short-lived users
PYTHON = {sys.base_prefix, sys.prefix, "/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache"}

# From the kernel's headers; the numbers of Landlock's calls are the same on all machines.
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
PRIVATE_RECURSIVE, NOSUID_NODEV = 0x44000, 6
PDEATHSIG, KEEPCAPS, SECCOMP, SUBREAPER, NO_NEW_PRIVS = 1, 8, 22, 36, 38
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
READ_FILE, READ_WRITE, READ_FOLDER = 5, 6, 13  # a folder's files can also be executed and listed
CAP_DAC_READ_SEARCH = 4
# Calls to refuse, by machine: its architecture; prlimit64, for other processes; then socket, chmod,
# fchmod, fchmodat, fchmodat2; shmget, semget, msgget, mq_open, add_key, request_key, keyctl, whose
# objects outlive the run; the three of io_uring, which can do what socket does; truncate, which
# Landlock allows before Linux 6.2; memfd_create and memfd_secret, whose memory no limit counts; and
# setpriority, sched_setparam, _setscheduler, _setaffinity, _setattr and ioprio_set, which take the
# id of any process of the user.
REFUSED = {
    "x86_64": (
        0xC000003E, 302, 41, 90, 91, 268, 452, 29, 64, 68, 240, 248, 249, 250, 425, 426, 427, 76,
        319, 447, 141, 142, 144, 203, 314, 251,
    ),
    "aarch64": (
        0xC00000B7, 261, 198, 52, 53, 452, 194, 190, 186, 180, 217, 218, 219, 425, 426, 427, 45,
        279, 447, 140, 118, 119, 122, 274, 30,
    ),
}  # fmt: skip
libc = ctypes.CDLL(None, use_errno=True)


def call(function, *args):
    """Calls a function of the C library, and raises OSError if it returns -1."""
    result = function(*args)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{function.__name__}: {os.strerror(ctypes.get_errno())}")
    return result


def prctl(option, value, pointer=0):
    call(libc.prctl, option, value, pointer, 0, 0)


def main():
    import witness  # noqa: F401  loaded here, because the program's process cannot read its file

    sys.path.pop(0)
    job = json.load(sys.stdin)
    job["user"] = USERS[os.getpid() % len(USERS)]
    job["threads"] = MAX_PROCESSES
    prctl(PDEATHSIG, SIGKILL)  # the guard dies with the process that started it
    if job["namespaces"]:
        enter_namespaces(job["box"])
    prctl(SUBREAPER, 1)  # processes whose parent has died become our children
    if os.getuid() == 0:
        with contextlib.suppress(OSError):  # some containers have no other user
            os.chown(job["box"], job["user"], job["user"])
    elif not job["namespaces"]:
        job["threads"] += threads_of_this_user()
    outputs = [os.memfd_create(name) for name in ("stdout", "stderr")]
    verdict = guard(job, outputs)
    for name, file in zip(("stdout", "stderr"), outputs):
        size = os.fstat(file).st_size
        text = os.pread(file, MAX_OUTPUT, max(0, size - MAX_OUTPUT))
        verdict[name] = text.decode(errors="replace")
    print(json.dumps(verdict))


def enter_namespaces(box):
    """Continues as process 1 of new namespaces, with a small disk in memory and no network."""
    user, group = os.getuid(), os.getgid()
    call(libc.unshare, NEWNS | NEWIPC | NEWPID | NEWNET | (NEWUSER if user else 0))
    if user:
        maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
        for name, line in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    call(libc.mount, None, b"/", None, PRIVATE_RECURSIVE, None)  # mounts stay invisible outside
    size = f"size={MAX_FILE_MB}m,nr_inodes={MAX_FILES}".encode()
    for folder in (box, "/dev/shm"):
        call(libc.mount, b"tmpfs", folder.encode(), b"tmpfs", NOSUID_NODEV, size)
    guard = os.fork()
    if guard:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(guard, 0)[1]) & 255)
    prctl(PDEATHSIG, SIGKILL)


def threads_of_this_user() -> int:
    """Counts the threads that the limit on the user's processes includes besides the program's."""
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
            if os.stat(f"/proc/{pid}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{pid}/task"))
    return count


# ---- the guard -----------------------------------------------------------------------------------


def guard(job, outputs) -> dict:
    """Waits for the program or its timeout, kills what is left of it, and returns the verdict."""
    receiver, sender = os.pipe()
    start, pause, ended, status = time.monotonic(), 0.001, 0, 0
    pid = os.fork()
    if not pid:
        run_program(job, outputs, sender)
    os.close(sender)
    token = os.read(receiver, 16)  # sent before the program starts; empty if it cannot start
    while not ended and time.monotonic() < start + job["timeout_s"] + GRACE:
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
        ended, status = os.waitpid(pid, os.WNOHANG)
    seconds = time.monotonic() - start
    kill_all()
    if not token:
        sys.exit(1)
    message = os.read(receiver, MAX_OUTPUT)
    passed = message == token
    reason = "" if passed else failure(message, ended, status, job["timeout_s"])
    return {"passed": passed, "reason": reason, "seconds": seconds}


def failure(message, ended, status, timeout_s) -> str:
    if not ended:
        return f"timeout after {timeout_s:g} s"
    if message or os.WIFEXITED(status):
        return message.decode(errors="replace") or "it ended before its last line"
    return f"killed by signal {os.WTERMSIG(status)}"


def kill_all():
    """Kills every process that the program has left, including those in sessions of their own."""
    with contextlib.suppress(ChildProcessError, ProcessLookupError):  # none is left
        while True:
            for pid in [-1] if os.getpid() == 1 else children():
                os.kill(pid, SIGKILL)
            os.waitpid(-1, 0)


def children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


# ---- the program's process -----------------------------------------------------------------------


def run_program(job, outputs, sender):
    """Runs the program in this process, which does not return."""
    prctl(NO_NEW_PRIVS, 1)
    landlock = restrict_files([job["box"], "/dev/shm"] if job["namespaces"] else [job["box"]])
    refuse_calls()
    # Python may lie in root's home, so its files must stay readable where Landlock lists them.
    give_up_rights(job["user"], CAP_DAC_READ_SEARCH if landlock and os.getuid() == 0 else 0)
    prctl(PDEATHSIG, SIGKILL)  # a change of user would clear it
    limits = {
        resource.RLIMIT_CPU: int(job["timeout_s"] + GRACE) + 2,
        resource.RLIMIT_AS: job["memory_mb"] * 2**20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: MAX_FILE_MB * 2**20,
        resource.RLIMIT_NPROC: job["threads"],
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    os.listdir(os.path.dirname(os.__file__))  # fails here if the new user may not read Python
    os.setsid()
    os.chdir(job["box"])
    for name, text in job["files"].items():
        with open(name, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    sys.path.insert(0, job["box"])
    for fd, source in enumerate((os.open("/dev/null", os.O_RDONLY), *outputs, sender)):
        os.dup2(source, fd)
    os.closerange(4, 1024)
    faulthandler.dump_traceback_later(job["timeout_s"], file=2)
    sys.modules.pop("witness").start(job["program"], job["files"])
    while True:
        time.sleep(60)


def restrict_files(folders) -> bool:
    """Allows Python's files, to read, and the program's folders; no signals out (Linux 6.12).

    Returns False if this kernel has no Landlock.
    """
    try:
        abi = call(libc.syscall, CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    except OSError:
        return False
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1  # all that this kernel knows
    size = 24 if abi >= 6 else 8
    rules = pack("QQQ", rights, 0, 3)[:size]  # 3: no signals and no abstract sockets
    rules = call(libc.syscall, CREATE_RULESET, rules, ctypes.c_size_t(size), 0)
    allowed = {"/dev/null": READ_WRITE, "/dev/urandom": READ_FILE, **dict.fromkeys(folders, rights)}
    for path in filter(os.path.exists, PYTHON):
        allowed[path] = READ_FOLDER if os.path.isdir(path) else READ_FILE
    for path, right in allowed.items():
        place = os.open(path, os.O_PATH)
        call(libc.syscall, ADD_RULE, rules, 1, pack("=Qi", right, place), 0)
        os.close(place)
    call(libc.syscall, RESTRICT_SELF, rules, 0)
    os.close(rules)
    return True


def refuse_calls():
    """Installs a seccomp filter against the calls in REFUSED.

    The filter is a program for the kernel: (operation, steps to skip if true, if false, operand).
    """
    machine = os.uname().machine
    if machine not in REFUSED:
        return
    architecture, prlimit, *numbers = REFUSED[machine]
    last = len(numbers) + 8  # the step that refuses
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    steps = [(load, 0, 0, 4), (equal, 0, last - 2, architecture)]  # built for another machine?
    steps += [(load, 0, 0, 0), (at_least, last - 4, 0, 0x40000000)]  # the numbers of x32?
    steps += [(equal, 0, 2, prlimit), (load, 0, 0, 16), (equal, last - 8, last - 7, 0)]  # its own?
    steps += [(equal, last - 1 - at, 0, number) for at, number in enumerate(numbers, 7)]
    steps += [(answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050001)]  # allow; refuse with EPERM
    program = ctypes.create_string_buffer(b"".join(pack("HBBI", *step) for step in steps))
    prctl(SECCOMP, 2, pack("HxxxxxxQ", len(steps), ctypes.addressof(program)))


def give_up_rights(user, kept):
    """Becomes another user, if this is root, and drops all capabilities but kept."""
    if os.getuid() == 0:
        prctl(KEEPCAPS, 1)
        with contextlib.suppress(OSError):  # some containers have no other user
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
    call(libc.capset, pack("Ii", 0x20080522, 0), pack("6I", kept, kept, 0, 0, 0, 0))


if __name__ == "__main__":
    main()
