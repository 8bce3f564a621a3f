"""Runs one program cut off from the machine. sandbox.py starts this file as a script.

It reads a job as JSON from stdin and writes a verdict as JSON to stdout. Three processes take part:
the launcher enters namespaces; the guard, process 1 in them, waits, kills what is left and writes
the verdict; the third gives up its rights and runs the program under the eyes of witness.py.
Nothing else of the project is imported, so that a program cannot meet it. Why each layer exists:

    namespaces     no file, network or process but the program's own; needs user namespaces or root
    Landlock       limits files where containers forbid namespaces, needing no rights
    seccomp        closes what Landlock leaves: sockets, io_uring, chmod, System V objects, keys
    another user   signals and process limits would otherwise concern whoever started us
    rlimits        bound memory, processor time, file size and processes of a hostile program
    the guard      must outlive the program, to judge it and to kill its daemons
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
MAX_FILE_MB, MAX_FILES = 16, 4096  # of a file; with namespaces of all files, and their number
MAX_OUTPUT = 65536  # bytes that are kept of stdout and of stderr, the last ones
GRACE = 0.2  # seconds from the timeout, when stderr receives the program's stack, to the kill
USERS = range(61184, 65520)  # ids that systemd reserves for short-lived users
LIBRARIES = {"/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache"}
PYTHON = sorted({sys.base_prefix, sys.prefix, *LIBRARIES}, key=len)  # outer folders first

# From the kernel's headers; the numbers of the two system calls are the same on all machines
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
BIND_RECURSIVE, PRIVATE_RECURSIVE, NOSUID_NODEV, DETACH = 0x5000, 0x44000, 6, 2
PDEATHSIG, KEEPCAPS, SECCOMP, SUBREAPER, NO_NEW_PRIVS = 1, 8, 22, 36, 38
MOUNT_SETATTR, LANDLOCK = 442, 444
libc = ctypes.CDLL(None, use_errno=True)


def call(function, *args):
    """Calls a function of the C library, and raises OSError if it returns -1."""
    result = function(*(arg.encode() if isinstance(arg, str) else arg for arg in args))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{function.__name__}: {os.strerror(ctypes.get_errno())}")
    return result


def prctl(option, value, pointer=0):
    call(libc.prctl, option, value, pointer, 0, 0)


def main():
    import witness  # noqa: F401  loaded here, because the program's process cannot read its file

    sys.path.pop(0)
    job = json.load(sys.stdin)
    job["user"] = USERS[os.getpid() % len(USERS)]  # limits and signals then concern this run only
    prctl(PDEATHSIG, SIGKILL)  # the jail dies with the process that started it
    outputs = [open(f"{job['box']}/{name}", "w+b") for name in ("stdout", "stderr")]
    for file in outputs:
        os.unlink(file.name)
    if job["kind"] == "namespaces":
        enter_namespaces(job["box"])
    elif os.getuid() == 0:
        with contextlib.suppress(OSError):  # some containers have no other user
            os.chown(job["box"], job["user"], job["user"])
    else:
        job["others"] = threads_of_this_user()
    guard(job, outputs)


def threads_of_this_user() -> int:
    """Counts the threads that the limit on the user's processes includes besides the program's."""
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
            if os.stat(f"/proc/{pid}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{pid}/task"))
    return count


# ---- isolation -----------------------------------------------------------------------------------


def enter_namespaces(root):
    """Mounts a file system with nothing but Python at root, and leaves network and processes."""
    user, group = os.getuid(), os.getgid()
    call(libc.unshare, NEWNS | NEWIPC | NEWPID | NEWNET | (NEWUSER if user else 0))
    if user:
        maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
        for name, line in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    guard = os.fork()
    if guard:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(guard, 0)[1]) & 255)
    prctl(PDEATHSIG, SIGKILL)
    call(
        libc.mount, None, "/", None, PRIVATE_RECURSIVE, None
    )  # mounts below stay invisible outside
    size = f"size={MAX_FILE_MB}m,nr_inodes={MAX_FILES},mode=755"
    call(libc.mount, "tmpfs", root, "tmpfs", NOSUID_NODEV, size)
    for path in PYTHON:
        show(path, root)
    for name in ("null", "zero", "urandom"):
        show(f"/dev/{name}", root, read_only=False)
    for folder in (f"{root}/box", f"{root}/tmp", f"{root}/dev/shm"):
        os.makedirs(folder, exist_ok=True)  # /tmp may exist already, with Python in it
        os.chmod(folder, 0o1777)
    os.chdir(root)
    call(libc.pivot_root, ".", ".")
    call(libc.umount2, ".", DETACH)  # the old file system


def show(path, root, read_only=True):
    """Makes path of the machine visible at the same place under root."""
    place = root + path
    if os.path.lexists(place) or not os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(path):
        return os.symlink(os.readlink(path), place)
    os.mkdir(place) if os.path.isdir(path) else open(place, "x").close()
    call(libc.mount, path, place, None, BIND_RECURSIVE, None)
    if read_only:  # MOUNT_ATTR_RDONLY | NOSUID | NODEV, AT_RECURSIVE
        flags, size = pack("QQQQ", 7, 0, 0, 0), ctypes.c_size_t(32)
        call(libc.syscall, MOUNT_SETATTR, -100, place, 0x8000, flags, size)


def restrict_by_landlock(box):
    """Allows Python's files, to read, and the program's folder; no signals out (Linux 6.12)."""
    abi = call(libc.syscall, LANDLOCK, None, ctypes.c_size_t(0), 1)
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1  # all that this kernel knows
    size = 24 if abi >= 6 else 8
    rules = pack("QQQ", rights, 0, 3 if abi >= 6 else 0)[:size]
    rules = call(libc.syscall, LANDLOCK, rules, ctypes.c_size_t(size), 0)
    read_folder, read_file, read_write = 13, 5, 6  # read_folder: execute, read, list
    allowed = {"/dev/null": read_write, "/dev/urandom": 4, box: rights}
    for path in filter(os.path.exists, PYTHON):
        allowed[path] = read_folder if os.path.isdir(path) else read_file
    for path, right in allowed.items():
        folder = os.open(path, os.O_PATH)
        call(libc.syscall, LANDLOCK + 1, rules, 1, pack("=Qi", right, folder), 0)
        os.close(folder)
    prctl(NO_NEW_PRIVS, 1)
    call(libc.syscall, LANDLOCK + 2, rules, 0)
    refuse_calls()


def refuse_calls():
    """Installs a seccomp filter against the system calls that Landlock does not cover.

    They are socket and chmod; shmget, semget, msgget, mq_open and the three for keys, whose objects
    outlive the run; fchmodat2; and io_uring's three, which can do what socket does.
    """
    machines = {  # architecture, then the numbers of the calls
        "x86_64": (0xC000003E, 41, 90, 91, 268, 29, 64, 68, 240, 248, 249, 250, 452, 425, 426, 427),
        "aarch64": (0xC00000B7, 198, 52, 53, 194, 190, 186, 180, 217, 218, 219, 452, 425, 426, 427),
    }
    numbers = machines.get(os.uname().machine)
    if not numbers:
        return
    last = len(numbers) + 4  # the step that refuses; a jump counts the steps to skip
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    steps = [(load, 0, 0, 4), (equal, 0, last - 2, numbers[0])]  # built for another machine?
    steps += [(load, 0, 0, 0), (at_least, last - 4, 0, 0x40000000)]  # x32's numbers?
    steps += [(equal, last - 1 - at, 0, number) for at, number in enumerate(numbers[1:], 4)]
    steps += [(answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050001)]  # allow; refuse with EPERM
    program = ctypes.create_string_buffer(b"".join(pack("HBBI", *step) for step in steps))
    prctl(SECCOMP, 2, pack("HxxxxxxQ", len(steps), ctypes.addressof(program)))


def give_up_rights(job):
    """Becomes another user without capabilities, and sets limits for each process."""
    kept = 0
    if os.getuid() == 0:
        if job["kind"] == "landlock":
            kept = 4  # CAP_DAC_READ_SEARCH: Python may lie in root's home; Landlock limits it
        prctl(KEEPCAPS, 1)
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(job["user"], job["user"], job["user"])
            os.setresuid(job["user"], job["user"], job["user"])
    call(libc.capset, pack("Ii", 0x20080522, 0), pack("6I", kept, kept, 0, 0, 0, 0))
    prctl(NO_NEW_PRIVS, 1)
    limits = {
        resource.RLIMIT_CPU: int(job["timeout_s"] + GRACE) + 2,
        resource.RLIMIT_AS: job["memory_mb"] * 2**20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: MAX_FILE_MB * 2**20,
        resource.RLIMIT_NPROC: MAX_PROCESSES + job.get("others", 0),
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


# ---- the guard -----------------------------------------------------------------------------------


def guard(job, outputs):
    """Waits for the program or its timeout, kills what is left of it, and writes the verdict."""
    prctl(SUBREAPER, 1)  # processes whose parent has died become our children
    verdict, pipe = os.pipe()
    start, pause, ended, status = time.monotonic(), 0.001, 0, 0
    pid = os.fork()
    if not pid:
        run_program(job, outputs, pipe)
    os.close(pipe)
    token = os.read(verdict, 16)  # sent before the program starts; empty if it cannot start
    while not ended and time.monotonic() < start + job["timeout_s"] + GRACE:
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
        ended, status = os.waitpid(pid, os.WNOHANG)
    seconds = time.monotonic() - start
    kill_all(job)
    os.set_blocking(verdict, False)
    try:
        message = os.read(verdict, MAX_OUTPUT)
    except BlockingIOError:
        message = b""
    if not token:
        sys.exit(1)
    result = {"passed": message == token, "reason": "", "seconds": seconds}
    if message != token:
        result["reason"] = failure(message, ended, status, job["timeout_s"])
    for name, file in zip(("stdout", "stderr"), outputs):
        file.seek(max(0, file.seek(0, 2) - MAX_OUTPUT))
        result[name] = file.read().decode(errors="replace")
    print(json.dumps(result))


def failure(message, ended, status, timeout_s) -> str:
    if not ended:
        return f"timeout after {timeout_s:g} s"
    if message or os.WIFEXITED(status):
        return message.decode(errors="replace") or "it ended before its last line"
    return f"killed by signal {os.WTERMSIG(status)}"


def kill_all(job):
    """Kills every process that the program has left, including those in sessions of their own."""
    if os.getpid() == 1:
        return  # the guard ends next, and the kernel then kills the whole namespace
    if os.getuid() == 0 and not os.fork():
        try:
            os.setresuid(job["user"], job["user"], job["user"])
            os.kill(-1, SIGKILL)  # all processes of that user at once, except this one
        finally:
            os._exit(0)
    try:
        while True:
            with open(f"/proc/self/task/{os.getpid()}/children") as children:
                for pid in map(int, children.read().split()):
                    os.kill(pid, SIGKILL)
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass


def run_program(job, outputs, pipe):
    """Runs the program in this process, which does not return."""
    if job["kind"] == "landlock":
        restrict_by_landlock(job["box"])
    give_up_rights(job)
    prctl(PDEATHSIG, SIGKILL)
    os.listdir(os.path.dirname(os.__file__))  # fails here if the new user may not read Python
    os.setsid()
    os.chdir(os.environ["HOME"])
    for name, text in job["files"].items():
        with open(name, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    sys.path.insert(0, os.getcwd())
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    for fd, file in enumerate(outputs, 1):
        os.dup2(file.fileno(), fd)
    os.dup2(pipe, 3)
    os.closerange(4, 1024)
    faulthandler.dump_traceback_later(job["timeout_s"], file=2)
    sys.modules.pop("witness").start(job["program"], job["files"])
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
