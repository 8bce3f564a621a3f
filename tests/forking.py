"""Scripts in processes of their own, forked from one that has done the imports: to start Python anew takes seconds."""

import contextlib
import importlib
import io
import multiprocessing
import resource
import sys


def main(script, flags, file_size=None, errors=None):
    """A script in this process; file_size limits what it may write into one file, errors is a file for what it says of them."""
    import torch

    torch.set_num_threads(1)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if errors:
        sys.stderr = open(errors, "w", buffering=1)
    sys.argv = [f"{script}.py", *map(str, flags)]
    sys.exit(importlib.import_module(script).main())


def forked(script, flags, **options):
    """The same in a process of its own, which has started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["annotate", "train_ppo"])
    process = context.Process(target=main, args=(script, flags), kwargs=options)
    process.start()
    return process


def run(script, flags):
    """A script in this process: its exit code, and what it printed."""
    before, printed, errors, code = sys.argv, io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            main(script, flags)
    except SystemExit as stopped:
        code = stopped.code or 0
    finally:
        sys.argv = before
    return code, printed.getvalue() + errors.getvalue()
