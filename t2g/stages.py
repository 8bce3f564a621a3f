"""Runs the earlier stages that a script needs, if their output is missing.

runs/toy/sft  ->  runs/toy/annotations.jsonl  ->  runs/toy/rm  ->  runs/toy/ppo
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from t2g import dist, tasks
from t2g.folder import is_finished, spelling
from t2g.log import read_json
from t2g.policy import latest_checkpoint

STAGES = {  # name: what it makes, under which name, the script, the flag of its output
    "sft": ("starting policy", "sft", "train_sft.py", "--output_dir"),
    "annotate": ("annotations", "annotations.jsonl", "annotate.py", "--out"),
    "rm": ("reward model", "rm", "train_rm.py", "--output_dir"),
    "ppo": ("trained policy", "ppo", "train_ppo.py", "--output_dir"),
}
POLICY_FLAG = {"annotate": "--policy", "rm": "--model"}
HANDED_ON = {  # flags that a stage takes from the script that starts it, beside those of the data
    "annotate": ("response_length", "temperature"),
    "rm": ("lora_r", "lora_alpha", "gradient_checkpointing"),
}


def ensure(names, args, root, policy=None) -> dict[str, float]:
    """Runs the named stages whose output is missing under root, and returns the seconds of each.

    With a policy there is no stage "sft", and the others start from it.
    """
    seconds, flags = {}, tasks.data_flags(args)
    for name, (title, output, script, flag) in STAGES.items():
        output = Path(root) / output
        if name not in names or (name == "sft" and policy):
            continue
        finished = latest_checkpoint(output) and (name != "ppo" or is_finished(output))
        if output.is_file() or finished:
            config = output / "config.json"
            before = read_json(config) if config.is_file() else flags
            changed = [n for n in flags if spelling(before.get(n)) != spelling(flags[n])]
            note = f", made with another {', '.join(changed)}" if changed else ""
            print(f"using the {title} in {output}{note}; move it away for a new one", flush=True)
            continue
        handed_on = {n: getattr(args, n, None) for n in HANDED_ON.get(name, ())}
        command = [script, *words(flags | handed_on), flag, str(output)]
        if policy and name in POLICY_FLAG:
            command += [POLICY_FLAG[name], policy]
        seconds[name] = run(title, command)
    return seconds


def words(flags: dict) -> list[str]:
    line = []
    for name, value in flags.items():
        if value is not None and value is not False:
            line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def run(title: str, command: list[str]) -> float:
    """Runs a script of this project in a process of its own, and returns its seconds."""
    print(f"\nno {title} yet; running\n  python {shlex.join(command)}\n", flush=True)
    set_by_torchrun = r"(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC.*"
    if dist.processes() > 1:
        set_by_torchrun += "|OMP_NUM_THREADS"  # which it sets to 1; the stage runs alone
    env = {k: v for k, v in os.environ.items() if not re.fullmatch(set_by_torchrun, k)}
    script = Path(__file__).resolve().parent.parent / command[0]
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, script, *command[1:]], env=env) as stage:
        previous = signal.signal(signal.SIGTERM, lambda *_: stage.terminate())
        try:
            code = stage.wait()
        finally:
            stage.terminate()  # on Ctrl-C, so that no process is left behind
            stage.wait()
            signal.signal(signal.SIGTERM, previous)
    if code:
        raise SystemExit(code if code > 0 else 128 - code)
    return time.perf_counter() - start
