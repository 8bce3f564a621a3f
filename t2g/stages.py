"""The order of the scripts: which earlier stage a script needs, and how to run it when it is missing.

runs/toy/sft  ->  runs/toy/annotations.jsonl  ->  runs/toy/rm  ->  runs/toy/ppo
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from t2g import checkpoint, dist, tasks
from t2g.policy import latest_checkpoint


def ensure(names, args, root, policy=None) -> dict[str, float]:
    """Runs those of the named stages whose output is missing under root, having said so. Returns the seconds of each.

    A policy that the user named is a starting policy already: stage 0 falls away and the others build on it.
    """
    root, data = Path(root), tasks.data_flags(args)
    stages = {
        "sft": (
            "The starting policy",
            root / "sft",
            ["train_sft.py", *data, "--output_dir", f"{root}/sft"],
        ),
        "annotate": (
            "The annotations",
            root / "annotations.jsonl",
            ["annotate.py", *data, "--out", f"{root}/annotations.jsonl"],
        ),
        "rm": (
            "The reward model",
            root / "rm",
            ["train_rm.py", *data, "--output_dir", f"{root}/rm"],
        ),
        "ppo": (
            "The trained policy",
            root / "ppo",
            ["train_ppo.py", *data, "--output_dir", f"{root}/ppo"],
        ),
    }
    if policy:
        del stages["sft"]
        stages["annotate"][2].extend(["--policy", policy])
        stages["rm"][2].extend(["--model", policy])
    seconds = {}
    for name, (title, output, command) in stages.items():
        if name not in names:
            continue
        finished = latest_checkpoint(output) and (name != "ppo" or checkpoint.finished(output))
        if output.is_file() or finished:
            print(f"{title}: {output} (made before; move it away to make it anew)", flush=True)
        else:
            seconds[name] = run(title, command)
    return seconds


def run(title: str, command: list[str]) -> float:
    print(f"\n{title}: missing, made first by\n  python {shlex.join(command)}\n", flush=True)
    folder = Path(__file__).resolve().parent.parent
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if dist.processes() > 1:
        ours += ("OMP_NUM_THREADS",)  # torchrun's, for processes beside each other
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ours and not key.startswith("TORCHELASTIC")
    }
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, str(folder / command[0]), *command[1:]], env=env
    ) as stage:
        before = signal.signal(signal.SIGTERM, lambda *_: stage.terminate())
        try:
            code = stage.wait()
        finally:
            stage.terminate()  # after Ctrl-C: it saves what it has, and nothing stays behind
            stage.wait()
            signal.signal(signal.SIGTERM, before)
    if code:
        raise SystemExit(code if code > 0 else 128 - code)
    return time.perf_counter() - start
