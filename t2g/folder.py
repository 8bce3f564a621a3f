"""The folder of a run: taken by one process at a time, and resumed where the same command stopped.

A run of the same flags that did not finish is resumed. A finished run, or one of other flags, is
moved aside to FOLDER.1, FOLDER.2, ... and nothing of it is lost.
"""

import fcntl
import itertools
import json
import os
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path

from t2g import dist
from t2g.cli import fail, first_unused, fresh_folder
from t2g.log import read_json
from t2g.policy import checkpoints, latest_checkpoint, step_of

STATE = "state.safetensors"  # of a supervised run that has not finished
RESUME_IGNORES = {  # flags that may differ between a run and its continuation
    *("argv", "resume", "output_dir", "save_steps", "save_total_limit", "tensorboard"),
    *("eval_samples", "gradient_checkpointing", "cpu_offload", "replicate_frozen"),
}
BATCH_FACTORS = {"per_device_train_batch_size", "gradient_accumulation_steps"}


@contextmanager
def run_folder(args, resume="auto"):
    """Yields the run's folder, new or as a stopped run of the same flags left it, and locks it.

    resume: "auto"; "none" to begin anew; or a checkpoint of this run, after which to go on.
    Collective.
    """
    folder = Path(args.output_dir).resolve()
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    resume = "auto" if restarted else resume  # the flag was obeyed at the first start
    with ExitStack() as stack:
        if dist.rank() == 0:
            locked = folder.is_dir() and folder.stat().st_ino
            if locked:
                stack.enter_context(lock(folder))
            if restarted and is_finished(folder):
                raise SystemExit(0)
            if resume not in ("auto", "none"):
                rewind(folder, Path(resume).resolve())
            elif resume == "none" or not resumable(folder, args):
                fresh = fresh_folder(folder).stat().st_ino
                if fresh != locked:
                    stack.enter_context(lock(folder))
        dist.barrier()
        yield folder


def resumable(folder, args) -> bool:
    """Whether the folder holds a run of the same flags that did not finish."""
    latest, config = latest_checkpoint(folder), folder / "config.json"
    stopped = latest and (latest / "state").is_dir() and not is_finished(folder)
    if not (((folder / STATE).is_file() or stopped) and config.is_file()):
        return False
    before, flags = read_json(config), json.loads(json.dumps(vars(args), default=str))
    ignored = RESUME_IGNORES | (BATCH_FACTORS if "batch_size" in flags else set())
    compared = (flags.keys() | before.keys()) - ignored
    changed = {name for name in compared if spelling(flags.get(name)) != spelling(before.get(name))}
    if changed:
        names = ", ".join(sorted(changed))
        print(
            f"the unfinished run in {folder} had another {names}; --resume CHECKPOINT continues it"
        )
    return not changed


def spelling(value):
    """One spelling of a flag's value, if it is an existing path."""
    is_path = isinstance(value, str) and value and os.path.exists(value)
    return os.path.realpath(value) if is_path else value


def is_finished(folder) -> bool:
    """Whether train_ppo.py wrote in this folder all that it writes."""
    return (folder / "result.json").is_file() and (folder / "page.html").is_file()


def rewind(folder, checkpoint):
    """Makes a checkpoint the last of its run; moves later ones and records to left-N."""
    if checkpoint not in checkpoints(folder):
        fail(
            f"--resume {checkpoint} is no checkpoint of --output_dir {folder}: name checkpoint-STEP"
        )
    later = [path for path in checkpoints(folder) if step_of(path) > step_of(checkpoint)]
    left = first_unused(folder / f"left-{n}" for n in itertools.count(1))
    left.mkdir()
    for path in [*folder.glob("*.json*"), folder / "page.html"]:
        if path.is_file():
            shutil.copy(path, left)
    (folder / "result.json").unlink(missing_ok=True)
    for path in later:
        path.rename(left / path.name)


@contextmanager
def lock(folder):
    """Holds a lock on a folder, at the latest until the process ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another process trains in {folder}; wait for it or choose another --output_dir")
        yield
    finally:
        os.close(handle)
