"""The folder of a run: one process at a time trains in it, and the same command resumes its run.

A finished run, or one of other flags, is moved aside to FOLDER.1, FOLDER.2, ... and kept.
"""

import itertools
import json
import math
import os
import shutil
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

from t2g import checkpoint, dist
from t2g.cli import fail, first_unused, fresh_folder, needed, try_lock
from t2g.log import METRICS, read_json, truncate, write_json
from t2g.policy import checkpoints, latest_checkpoint, step_of

RESUME_IGNORES = {  # flags that may differ between a run and its continuation
    *("argv", "launcher", "resume", "output_dir", "save_steps", "save_total_limit", "tensorboard"),
    *("eval_samples", "gradient_checkpointing", "cpu_offload", "replicate_frozen"),
}
BATCH_FACTORS = {"per_device_train_batch_size", "gradient_accumulation_steps"}


@contextmanager
def run_folder(args):
    """Yields the run's folder, locked: new, or as an unfinished run of the same flags left it.

    If args.resume is a checkpoint, the run goes back to it once: the same command again resumes
    what came of it. Collective.
    """
    folder = Path(args.output_dir).resolve()
    with ExitStack() as stack:
        if dist.rank() == 0:
            check_start(args, folder)
            folder.mkdir(parents=True, exist_ok=True)
            stack.callback(os.close, lock(folder))
            restarted = was_restarted(folder)
            resume = "auto" if restarted else getattr(args, "resume", "auto")
            if restarted and is_finished(folder):
                raise SystemExit(0)
            if resume == "none" or not resumable(folder, args, resume):
                if resume not in ("auto", "none"):
                    rewind(folder, Path(resume).resolve(), args.max_steps)
                elif any(folder.iterdir()):
                    stack.callback(os.close, lock(fresh_folder(folder)))
        dist.barrier()
        yield folder


def check_start(args, folder):
    """Refuses a starting model inside the run's folder, which may be moved aside."""
    for flag in ("policy", "model"):
        start = getattr(args, flag, None)
        if start and os.path.exists(start) and Path(start).resolve().is_relative_to(folder):
            fail(f"--{flag} {start} lies in --output_dir {folder}; choose another --output_dir")


def was_restarted(folder) -> bool:
    """Whether this process is a restart by torchrun, whose earlier start has begun the run."""
    config = folder / "config.json"
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0 or not config.is_file():
        return False
    return read_json(config).get("launcher") == os.getppid()


def resumable(folder, args, resume) -> bool:
    """Whether the folder holds an unfinished run of the same flags, and of the same --resume."""
    latest, config = latest_checkpoint(folder), folder / "config.json"
    stopped = latest and (latest / "state").is_dir() and not is_finished(folder)
    if not ((checkpoint.latest(folder, "state") or stopped) and config.is_file()):
        return False
    before, flags = read_json(config), json.loads(json.dumps(vars(args), default=str))
    ignored = RESUME_IGNORES | (BATCH_FACTORS if "batch_size" in flags else set())
    compared = (flags.keys() | before.keys()) - ignored
    if resume != "auto":
        compared.add("resume")
    changed = {name for name in compared if spelling(flags.get(name)) != spelling(before.get(name))}
    if changed and resume == "auto":
        names = ", ".join(sorted(changed))
        print(f"the unfinished run in {folder} had another {names}: it is moved aside and kept")
    return not changed


def spelling(value):
    """One spelling of a flag's value, if it is an existing path."""
    is_path = isinstance(value, str) and value and os.path.exists(value)
    return os.path.realpath(value) if is_path else value


def is_finished(folder) -> bool:
    return (folder / "result.json").is_file() and (folder / "page.html").is_file()


def rewind(folder, checkpoint, max_steps):
    """Makes a checkpoint the last of its run: moves later ones to left-N, and copies logs there."""
    if checkpoint not in checkpoints(folder):
        wanted = "name one of its folders checkpoint-STEP"
        fail(f"--resume {checkpoint} is no checkpoint of --output_dir {folder}: {wanted}")
    if step_of(checkpoint) > max_steps:
        fail(f"{checkpoint} has more steps than --max_steps {max_steps}: raise it")
    left = first_unused(folder / f"left-{n}" for n in itertools.count(1))
    left.mkdir()
    for path in [*folder.glob("*.json*"), *folder.glob("page.html")]:
        shutil.copy(path, left)
    (folder / "result.json").unlink(missing_ok=True)
    for path in checkpoints(folder):
        if step_of(path) > step_of(checkpoint):
            path.rename(left / path.name)


def lock(folder) -> int:
    """Locks a folder until the returned handle is closed or the process ends."""
    handle = os.open(folder, os.O_RDONLY)
    if not try_lock(handle):
        fail(f"another process trains in {folder}; wait for it or choose another --output_dir")
    return handle


def open_log(folder, args, more_metrics=(), tensorboard=False, keep_until=0):
    """Returns log(step, metrics), with which rank 0 appends a line to metrics.jsonl.

    more_metrics extends METRICS. A resumed run keeps the lines up to keep_until.
    """
    if dist.rank() > 0:
        return lambda step, metrics: None
    truncate(folder / "metrics.jsonl", keep_until)  # first, because it marks the folder as a run
    program = {"argv": sys.argv, "launcher": os.getppid()}
    write_json(folder / "config.json", program | vars(args))
    file, known = open(folder / "metrics.jsonl", "a", encoding="utf-8"), {*METRICS, *more_metrics}
    board = None
    if tensorboard:
        needed("tensorboard", "--tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(folder), purge_step=keep_until + 1)

    def log(step, metrics):
        if unknown := set(metrics) - known:
            raise KeyError(f"metrics that are not in the glossary: {sorted(unknown)}")
        if infinite := [name for name, value in metrics.items() if not math.isfinite(value)]:
            fail(f"no finite {', '.join(infinite)} in step {step}; lower --learning_rate")
        file.write(json.dumps({"step": step, **metrics}) + "\n")
        file.flush()
        for name, value in metrics.items() if board else ():
            board.add_scalar(name, value, step)

    return log
