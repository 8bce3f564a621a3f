"""Scripts in forked processes, for imports take seconds, in the test's own, and in new ones."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import time

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2")


def main(script, flags, file_size=None, errors=None):
    """Runs a script in this process; file_size limits each file, errors is a file for stderr."""
    import torch

    torch.set_num_threads(1)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if errors:
        sys.stderr = open(errors, "w", buffering=1)
    sys.argv = [f"{script}.py", *map(str, flags)]
    sys.exit(importlib.import_module(script).main())


def started(function, *args, **options):
    """A forked process that runs a function."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["annotate", "train_ppo"])
    process = context.Process(target=function, args=args, kwargs=options)
    process.start()
    return process


def forked(script, flags, **options):
    """A forked process that runs a script."""
    return started(main, script, flags, **options)


def two_ranks(prepare, flags, errors, script="train_ppo"):
    """Two processes that run a script together, each after prepare(rank); errors: two files."""
    port, ranks = free_port(), []
    for rank in (0, 1):
        call = train, prepare, script, flags, errors[rank], rank
        ranks.append(started(as_rank, rank, port, *call))
    return ranks


def train(prepare, script, flags, errors, rank):
    prepare(rank)
    main(script, flags, errors=errors)


def run_ranks(function, *args, seconds=600) -> list:
    """Two ranks that call a function. Returns their exit codes as exit_codes() does."""
    port = free_port()
    return exit_codes([started(as_rank, rank, port, function, *args) for rank in (0, 1)], seconds)


def exit_codes(processes, seconds=600) -> list:
    """The exit codes of processes, None of one that does not end within these seconds."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(end - time.monotonic(), 0.1))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def as_rank(rank, port, function, *args):
    """Calls a function in torchrun's environment of one of two processes."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    function(*args)


def python(*words, **options) -> str:
    """What Python prints in a process of its own, which must succeed."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-4000:]
    return done.stdout


def run(command, flags=()):
    """Runs a command, such as "eval rm", in this process. Returns its exit code and its output."""
    script, *words = command.split()
    before, printed, errors, code = sys.argv, io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            main(script, [*words, *flags])
    except SystemExit as stopped:
        code = stopped.code or 0
    finally:
        sys.argv = before
    return code, printed.getvalue() + errors.getvalue()


def output(command, *flags) -> str:
    """What a command prints that must succeed."""
    code, printed = run(command, flags)
    assert code == 0, printed
    return printed


def result_of(printed) -> dict:
    """The JSON object of the last printed line that is one."""
    return json.loads([line for line in printed.splitlines() if line.startswith("{")][-1])


def refusal(command, *flags) -> str:
    """The one sentence that a command prints before it ends with exit code 2."""
    code, printed = run(command, flags)
    assert code == 2 and "Traceback" not in printed, printed
    [sentence] = [line for line in printed.splitlines() if "error: " in line]
    return sentence.partition("error: ")[2]
