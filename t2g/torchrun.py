"""The start and the common end of the processes that torchrun starts."""

import os
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from torch import distributed

from t2g.cli import fail, friendly_errors
from t2g.dist import barrier


@contextmanager
def session(cpu_offload=False, run_first=None):
    """Joins the processes that torchrun started, if it did.

    Rank 0 calls run_first() while the others wait, and its result is yielded there. An error on
    one rank, SystemExit included, ends all of them: they would wait for it in a collective.
    """
    if cpu_offload and not ("WORLD_SIZE" in os.environ and torch.cuda.is_available()):
        fail("--cpu_offload needs a GPU and torchrun; start it with torchrun, or leave it out")
    if "WORLD_SIZE" not in os.environ or distributed.is_initialized():
        yield run_first() if run_first else None
        return
    gpus = torch.cuda.device_count()
    if gpus and int(os.environ["LOCAL_RANK"]) >= gpus:
        fail(f"this machine has {gpus} GPUs: lower --nproc_per_node to that")
    store, number, count = next(distributed.rendezvous("env://"))
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = distributed.PrefixStore(f"start {restart}", store)  # keys of earlier starts are stale
    finished = threading.Event()
    watcher = threading.Thread(target=end_with_others, args=(store.clone(), finished), daemon=True)
    watcher.start()
    try:
        with friendly_errors():
            yield join(store, number, count, run_first)
            barrier()  # until here another rank may fail
    except BaseException as error:
        finished.set()
        end_all(store, error)
    finished.set()
    watcher.join()  # a thread that waits in the store while Python ends would abort the process
    distributed.destroy_process_group()


def join(store, number, count, run_first):
    result = run_first() if run_first and number == 0 else None
    if number == 0:
        store.set("first is done", "")
    store.wait(["first is done"], timedelta(weeks=4))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    group = dict(store=store, rank=number, world_size=count, timeout=timedelta(hours=1))
    distributed.init_process_group(backend, **group)
    torch.manual_seed(torch.initial_seed() + number)  # so that ranks sample independently
    # Nothing here changes a view of sharded weights in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if number:
        sys.stdout = open(os.devnull, "w")
    return result


def end_all(store, error):
    """Ends this process as the error would, and tells the others to end with the same exit code.

    If another rank has failed before, the error here is a consequence and is not shown.
    """
    code = 1
    with suppress(distributed.DistError):  # the process that held the store may be gone
        if store.check(["exit code"]):
            end(int(store.get("exit code")))
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    elif error.code is None or isinstance(error.code, int):
        code = error.code or 0
    else:  # sys.exit("a message")
        print(error.code, file=sys.stderr)
    with suppress(distributed.DistError):
        store.set("exit code", str(code))
        time.sleep(1)  # if this process holds the store, the others must still read it
    end(code)


def end_with_others(store, finished):
    """Ends this process if another rank failed; in a thread, for the main one may hang."""
    try:
        while not finished.wait(0.3):
            if store.check(["exit code"]):
                end(int(store.get("exit code")))
    except distributed.DistError:  # the process that held the store is gone
        if not finished.wait(3):  # time to show an error of this rank
            end(1)


def end(code):  # destroying a process group would wait for ranks that never come
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
