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
import tempfile
import time
from pathlib import Path

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


def in_two(script, flags, prepare=None, seconds=600) -> tuple[list, list]:
    """Runs a script in two ranks, each after prepare(rank). Returns exit codes and stderr of both."""
    with tempfile.TemporaryDirectory() as folder:
        errors = [f"{folder}/{rank}" for rank in (0, 1)]
        codes = run_ranks(run_rank, script, flags, prepare, errors, seconds=seconds, joined=False)
        return codes, [Path(file).read_text() for file in errors]


def run_rank(script, flags, prepare, errors):
    rank = int(os.environ["RANK"])
    if prepare:
        prepare(rank)
    main(script, flags, errors=errors[rank])


def run_ranks(function, *args, seconds=600, joined=True) -> list:
    """Two ranks that call a function, joined by torchrun's session. Returns their exit codes."""
    port = free_port()
    call = joined, function, *args
    return exit_codes([started(as_rank, rank, port, *call) for rank in (0, 1)], seconds)


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


def as_rank(rank, port, joined, function, *args):
    """Calls a function in torchrun's environment of one of two processes."""
    from t2g import torchrun

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    with torchrun.session() if joined else contextlib.nullcontext():
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
