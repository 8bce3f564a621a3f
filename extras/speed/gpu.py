"""Checks and times the project on a GPU, in at most nine minutes on one H100.

    python -m extras.speed.gpu --out DIR
    python -m extras.speed.gpu --out DIR --model SMOLLM2 --data defacto
    python -m extras.speed.gpu --out DIR --rehearse        # every part in tiny shapes, on a CPU

The parts run in order of importance, each in its own process with a time limit. After each part
DIR/gpu.json and DIR/gpu.md (a table for docs/RESULTS.md) are rewritten, so an interruption costs
one part at most, and the rows of that part are in DIR/PART.jsonl. The exit code is 1 if a part or
a check failed.

torch, transformers, peft, scipy, matplotlib and tqdm suffice. Only news also needs rouge-score and
sacrebleu, and human llguidance and rapidfuzz; without these they are skipped.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from t2g import checkpoint, cli
from t2g.log import read_jsonl, write_json, write_text

HERE = Path(__file__).resolve().parents[2]
NEWS, CRITIC = ("rouge_score", "sacrebleu"), ("llguidance", "rapidfuzz")
MARKS = {None: "", True: "passed", False: "**failed**"}


class Part(NamedTuple):
    """A part is a function of its name in a module: (arguments, report) -> None."""

    title: str
    module: str
    seconds: int  # its time box
    flags: tuple = ()  # what it cannot run without
    packages: tuple = ()


PARTS = {
    "agreement": Part("The CPU and the GPU take the same step", "gpu_agreement", 90),
    "toy": Part("The toy, with its rule as the critic", "gpu_jobs", 150),
    "speed": Part("Speed in bf16, random weights", "gpu_speed", 180),
    "peers": Part("Sampling by transformers' own functions", "gpu_speed", 90),
    "news": Part("SmolLM2 on news", "gpu_jobs", 400, ("model", "data"), NEWS),
    "human": Part("Critics against people's feedback", "gpu_jobs", 300, ("model", "data"), CRITIC),
}


def main() -> bool:
    """Runs the parts. Returns whether anything failed."""
    args = parse_args()
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.part:
        module = importlib.import_module(f"extras.speed.{PARTS[args.part].module}")
        return getattr(module, args.part)(args, partial(write_row, out / f"{args.part}.jsonl"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"CUDA": torch.version.cuda, "commit": checkpoint.commit()}
    end, parts = time.perf_counter() + args.seconds, {}
    result = {"rehearsal": args.rehearse, "device": {"name": device, **versions}, "parts": parts}
    for name in args.parts or PARTS:
        print(f"{name}: {PARTS[name].title}", flush=True)
        parts[name] = {"title": PARTS[name].title} | run_part(name, args, out, end)
        print(f"{name}: {parts[name]['state']} {parts[name]['note'][-200:]}", flush=True)
        write_json(out / "gpu.json", result)
        write_text(out / "gpu.md", markdown(result))
    print(f"table: {out / 'gpu.md'}\n{json.dumps(result)}")
    checks = [row["ok"] for part in parts.values() for row in part["rows"]]
    return False in checks or "failed" in [part["state"] for part in parts.values()]


def parse_args():
    parser = cli.parser(__doc__)
    add = cli.flags(parser)
    add("--out", None, "folder of gpu.json, gpu.md and the logs")
    add("--model", None, "news, human: a folder of SmolLM2-135M-Instruct")
    add("--data", None, "news, human: DeFacto's folder, with train.jsonl and val.jsonl")
    add("--seconds", 540, "time for all parts together")
    add("--rehearse", False, "run every part on a CPU in tiny shapes, to see that it works")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="run only these parts")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.out:
        cli.fail("--out is missing: the folder for gpu.json and gpu.md")
    return args


def write_row(path, what, measured, beside="", ok=None):
    """Appends a row of a part to a .jsonl file as soon as it is measured.

    beside: what to compare it with. ok: whether a check passed, None for a mere measurement.
    """
    row = {"what": what, "measured": measured, "beside": beside, "ok": ok}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def run_part(name, args, out, end) -> dict:
    """Runs a part in its own process. Returns its state, seconds, rows, and why it failed."""
    start, rows, note = time.perf_counter(), out / f"{name}.jsonl", why_not(name, args, end)
    if note:
        return {"state": "skipped", "seconds": 0.0, "rows": [], "note": note}
    rows.write_text("")
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if args.rehearse else {})
    command = [sys.executable, "-m", "extras.speed.gpu", *sys.argv[1:], "--part", name]
    with open(out / f"{name}.log", "w+", errors="replace") as log:
        how = dict(stdout=log, stderr=log, cwd=HERE, env=environment, start_new_session=True)
        process, code = subprocess.Popen(command, **how), None
        try:
            time_box = PARTS[name].seconds * (3 if args.rehearse else 1)  # a CPU is slower
            code = process.wait(min(time_box, end - start))
        except subprocess.TimeoutExpired:
            pass  # code stays None
        finally:
            with contextlib.suppress(ProcessLookupError):  # the group has ended
                os.killpg(process.pid, signal.SIGKILL)  # it may outlive its first process
            process.wait()
        log.seek(0)
        note = "" if code == 0 else log.read()[-1500:]
    state = {0: "done", None: "cut off"}.get(code, "failed")
    seconds = round(time.perf_counter() - start, 1)
    return {"state": state, "seconds": seconds, "rows": read_jsonl(rows), "note": note}


def why_not(name, args, end) -> str:
    """Why a part cannot run; "" if it can."""
    for flag in () if args.rehearse else PARTS[name].flags:
        if not getattr(args, flag):
            return f"--{flag} is not given"
    for package in PARTS[name].packages:
        if not importlib.util.find_spec(package):
            return f"the package {package} is missing"
    if not (torch.cuda.is_available() or args.rehearse):
        return "there is no GPU; see --rehearse"
    return "" if end - time.perf_counter() > 10 else "no time was left"


def run(script, *flags, python=sys.executable) -> str:
    """Runs a script of the project. Returns what it printed; its errors pass through."""
    command = [python, *script.split(), *map(str, flags)]
    done = subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with {done.returncode}; its error is above")
    return done.stdout


def markdown(result) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in result["device"].items())]
    if result["rehearsal"]:
        lines.insert(0, "**A rehearsal in tiny shapes: these numbers mean nothing.**\n")
    for part in result["parts"].values():
        lines += ["", f"**{part['title']}**: {part['state']}, {part['seconds']:.0f} s", ""]
        if part["note"]:
            lines += ["```", part["note"].strip(), "```", ""]
        if part["rows"]:
            lines += ["| what | measured | beside | |", "|---|---|---|---|"]
        for row in part["rows"]:
            number = row["measured"]
            number = f"{number:.4g}" if isinstance(number, float) else str(number)
            cells = row["what"], number, row["beside"], MARKS[row["ok"]]
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
