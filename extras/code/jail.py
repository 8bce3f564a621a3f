"""What runs in the sandbox's own process: cut it off from the machine, run the program, say how it ended.

t2g/sandbox.py starts this file as a script, with a task as JSON on stdin, and reads a verdict as JSON on stdout. Three
processes: the launcher makes the namespaces, the guard (process 1 in them) waits and kills, the last one gives up its rights and
runs the program, watched by t2g/witness.py. Nothing else of ours is imported: a program shall not meet it.
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

MAX_PROCESSES = 64  # at once, threads too
MAX_FILE_MB, MAX_FILES = 16, 4096  # of a file; in namespaces of all files, and their number
MAX_OUTPUT = 65536  # bytes that are kept of stdout and of stderr, the last ones
GRACE = (
    0.2  # seconds between the timeout, when the program's stack is written to stderr, and the kill
)
USERS = range(61184, 65520)  # ids that systemd sets aside for users of a moment
FOLDERS = sorted(
    {sys.base_prefix, sys.prefix, "/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache"}, key=len
)  # what Python needs
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
MOUNT_SETATTR, LANDLOCK = 442, 444  # numbers of system calls, the same on all machines
libc = ctypes.CDLL(None, use_errno=True)


def call(function, *args):
    """A function of the C library that returns -1 where it fails."""
    result = function(*(arg.encode() if isinstance(arg, str) else arg for arg in args))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{function.__name__}: {os.strerror(ctypes.get_errno())}")
    return result


def main():
    import witness  # noqa: F401  beside this script; there will be no such folder later

    sys.path.pop(0)
    task = json.load(sys.stdin)
    task["user"] = USERS[
        os.getpid() % len(USERS)
    ]  # one of its own, so that limits and signals are those of this run
    call(libc.prctl, 1, SIGKILL)  # PR_SET_PDEATHSIG: who started us shall not die alone
    outputs = [open(f"{task['box']}/{name}", "w+b") for name in ("stdout", "stderr")]
    for file in outputs:
        os.unlink(file.name)
    if task["kind"] == "namespaces":
        namespaces(task["box"])
    elif os.getuid() == 0:
        with contextlib.suppress(OSError):  # in some containers there is no other user
            os.chown(task["box"], task["user"], task["user"])
    else:
        task["others"] = threads_of_this_user()
    guard(task, outputs)


def threads_of_this_user() -> int:
    """The limit on processes counts these too, unless we have a namespace or a user id of our own."""
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError):  # it ended meanwhile
            count += (
                len(os.listdir(f"/proc/{pid}/task"))
                if os.stat(f"/proc/{pid}").st_uid == os.getuid()
                else 0
            )
    return count


# ---- ways to be cut off ----------------------------------------------------------------------------------------------------


def namespaces(root):
    """A file system of its own with nothing but Python in it, read-only; no network; no process but the program's."""
    user = os.getuid()
    call(libc.unshare, NEWNS | NEWIPC | NEWPID | NEWNET | (NEWUSER if user else 0))
    if user:
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{os.getgid()} {os.getgid()} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    if guard := os.fork():
        os._exit(os.waitstatus_to_exitcode(os.waitpid(guard, 0)[1]) & 255)
    call(libc.prctl, 1, SIGKILL)
    call(
        libc.mount, None, "/", None, 0x44000, None
    )  # MS_REC | MS_PRIVATE: what is mounted here is seen here only
    call(
        libc.mount, "tmpfs", root, "tmpfs", 6, f"size={MAX_FILE_MB}m,nr_inodes={MAX_FILES},mode=755"
    )  # 6: MS_NOSUID | MS_NODEV
    for path in FOLDERS:  # in this order, for /usr may hold Python's own
        show(path, root)
    for name in ("null", "zero", "urandom"):
        show(f"/dev/{name}", root, read_only=False)
    for folder in (
        f"{root}/box",
        f"{root}/tmp",
        f"{root}/dev/shm",
    ):  # Python's own folders may lie in /tmp
        os.makedirs(folder, exist_ok=True)
        os.chmod(folder, 0o1777)
    os.chdir(root)
    call(libc.pivot_root, ".", ".")
    call(libc.umount2, ".", 2)  # MNT_DETACH: the old file system is gone


def show(path, root, read_only=True):
    """Lets path of the machine be seen at the same place under root."""
    place = root + path
    if os.path.lexists(place) or not os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(path):
        return os.symlink(os.readlink(path), place)
    os.mkdir(place) if os.path.isdir(path) else open(place, "x").close()
    call(libc.mount, path, place, None, 0x5000, None)  # MS_BIND | MS_REC
    if read_only:  # MOUNT_ATTR_RDONLY | NOSUID | NODEV, AT_RECURSIVE
        call(
            libc.syscall,
            MOUNT_SETATTR,
            -100,
            place,
            0x8000,
            pack("QQQQ", 7, 0, 0, 0),
            ctypes.c_size_t(32),
        )


def landlock(box):
    """No file but Python's, to read, and the program's folder; no signal to others (Linux 6.12); no call of refuse_calls()."""
    abi = call(libc.syscall, LANDLOCK, None, ctypes.c_size_t(0), 1)
    rights = (
        1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)
    ) - 1  # to files, as many as this kernel knows
    rules = pack("QQQ", rights, 0, 3 if abi >= 6 else 0)[: 24 if abi >= 6 else 8]
    rules = call(libc.syscall, LANDLOCK, rules, ctypes.c_size_t(len(rules)), 0)
    read_folder, read_file = 13, 5  # execute, read files, list folders
    allowed = {
        path: read_folder if os.path.isdir(path) else read_file
        for path in FOLDERS
        if os.path.exists(path)
    }
    for path, right in (allowed | {"/dev/null": 6, "/dev/urandom": 4, box: rights}).items():
        folder = os.open(path, os.O_PATH)
        call(libc.syscall, LANDLOCK + 1, rules, 1, pack("=Qi", right, folder), 0)
        os.close(folder)
    call(libc.prctl, 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    call(libc.syscall, LANDLOCK + 2, rules, 0)
    refuse_calls()


def refuse_calls():
    """A seccomp filter: what Landlock allows and must not be fails, where we know its number.

    socket() and chmod(); shmget(), semget(), msgget(), mq_open() and the three calls for keys, for what they make outlives the run;
    io_uring, which does what socket() does.
    """
    machines = {
        "x86_64": (0xC000003E, 41, 90, 91, 268, 29, 64, 68, 240, 248, 249, 250, 452, 425, 426, 427),
        "aarch64": (0xC00000B7, 198, 52, 53, 194, 190, 186, 180, 217, 218, 219, 452, 425, 426, 427),
    }
    if not (numbers := machines.get(os.uname().machine)):
        return
    refused = (
        len(numbers) + 4
    )  # the place of the last step; a jump says how many steps it leaps over
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    steps = [(load, 0, 0, 4), (equal, 0, refused - 2, numbers[0])]  # made for another machine?
    steps += [(load, 0, 0, 0), (at_least, refused - 4, 0, 0x40000000)]  # numbered in another way?
    steps += [
        (equal, refused - 1 - place, 0, number) for place, number in enumerate(numbers[1:], 4)
    ]
    steps += [(answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050001)]  # allowed; refused, as EPERM
    filter_ = ctypes.create_string_buffer(b"".join(pack("HBBI", *step) for step in steps))
    call(
        libc.prctl, 22, 2, pack("HxxxxxxQ", len(steps), ctypes.addressof(filter_))
    )  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def give_up_rights(task):
    """Another user, no capability and no way to get one, and limits that hold for each process and for their number."""
    kept = 0
    if os.getuid() == 0:
        kept = (
            4 if task["kind"] == "landlock" else 0
        )  # CAP_DAC_READ_SEARCH: Python may lie in root's home; Landlock limits it
        call(libc.prctl, 8, 1)  # PR_SET_KEEPCAPS
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(*3 * [task["user"]])
            os.setresuid(*3 * [task["user"]])
    call(libc.capset, pack("Ii", 0x20080522, 0), pack("6I", kept, kept, 0, 0, 0, 0))
    call(libc.prctl, 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    seconds, mib = int(task["timeout_s"] + GRACE) + 2, 2**20
    for limit, value in (
        (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, task["memory_mb"] * mib), (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, MAX_FILE_MB * mib), (resource.RLIMIT_NPROC, MAX_PROCESSES + task.get("others", 0)),
    ):  # fmt: skip
        resource.setrlimit(limit, (value, value))


# ---- the guard -----------------------------------------------------------------------------------------------------------


def guard(task, outputs):
    """Waits for the program or for the end of its time, kills what is left of it, and writes the verdict."""
    call(
        libc.prctl, 36, 1, 0, 0, 0
    )  # PR_SET_CHILD_SUBREAPER: a process whose parent dies becomes our child
    verdict, pipe = os.pipe()
    start, pause, ended = time.monotonic(), 0.001, 0
    if not (pid := os.fork()):
        be_the_program(task, outputs, pipe)
    os.close(pipe)
    token = os.read(
        verdict, 16
    )  # sent before the program starts; nothing means that it could not start
    while not ended and time.monotonic() < start + task["timeout_s"] + GRACE:
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
        ended, status = os.waitpid(pid, os.WNOHANG)
    seconds = time.monotonic() - start
    kill_all(task)
    os.set_blocking(verdict, False)
    try:
        said = os.read(verdict, MAX_OUTPUT)
    except BlockingIOError:
        said = b""
    if not token:
        sys.exit(1)
    if passed := said == token:
        reason = ""
    elif not ended:
        reason = f"timeout after {task['timeout_s']:g} s"
    elif said or os.WIFEXITED(status):
        reason = said.decode(errors="replace") or "it ended before its last line"
    else:
        reason = f"killed by signal {os.WTERMSIG(status)}"
    texts = []
    for file in outputs:
        file.seek(max(0, file.seek(0, 2) - MAX_OUTPUT))
        texts.append(file.read().decode(errors="replace"))
    print(
        json.dumps(
            {
                "passed": passed,
                "reason": reason,
                "stdout": texts[0],
                "stderr": texts[1],
                "seconds": seconds,
            }
        )
    )


def kill_all(task):
    """Every process that the program left, those in sessions of their own too."""
    if os.getpid() == 1:
        return  # we end next, and the kernel kills all that lives in our namespace
    if os.getuid() == 0 and not os.fork():
        try:
            os.setresuid(*3 * [task["user"]])
            os.kill(-1, SIGKILL)  # all processes of that user at once, this one excepted
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


# ---- the program ---------------------------------------------------------------------------------------------------------


def be_the_program(task, outputs, pipe):
    if task["kind"] == "landlock":
        landlock(task["box"])
    give_up_rights(task)
    call(libc.prctl, 1, SIGKILL)
    os.listdir(
        os.path.dirname(os.__file__)
    )  # if Python lies where its new user may not read, say so now
    os.setsid()
    os.chdir(os.environ["HOME"])
    for name, text in task["files"].items():
        with open(name, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    sys.path.insert(0, os.getcwd())
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    for fd, file in enumerate(outputs, 1):
        os.dup2(file.fileno(), fd)
    os.dup2(pipe, 3)
    os.closerange(4, 1024)
    faulthandler.dump_traceback_later(task["timeout_s"], file=2)
    sys.modules.pop("witness").start(task["program"], task["files"])
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
