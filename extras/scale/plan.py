"""Plans a stage before there is a GPU: memory, hours, FLOP, and the flags that make it fit.

    python -m extras.scale.plan 8xH100-80 --task summarize --policy HUB_ID --critic rule
    python -m extras.scale.plan 8xH100-80 train_rm.py --task summarize --model HUB_ID --bf16
    python -m extras.scale.plan 8xH100-80 extras.baselines.dpo --task summarize --policy HUB_ID

The flags are those of train_ppo.py or of the script that is named: a training stage, annotate.py,
eval.py, or a module of extras. `python -m extras.reproduce --plan MACHINE` plans a whole recipe.

passes.py measures the passes on fake tensors; weights, optimiser, cache and FSDP's gathers are
arithmetic. Everything has its maximum length: responses, critiques, and training texts with
--max_length. Prompts have --max_prompt_length or 512 tokens. Hours, for GPUs alone, are a lower
bound without communication, kernel launches, loading, and critics that are programs or servers.
"""

import argparse
import copy
import importlib
import json
import math
import re
import sys
from unittest import mock

from extras.scale.stages import GIB, STAGES, Stage, prompt_length
from t2g import cpu, dist, tasks
from t2g.cli import fail, friendly_errors

GPUS = {  # from data sheets: GiB, TFLOP/s in bf16 and in fp32 (no TF32, no sparsity), GB/s
    "A100-40": (40, 312, 19.5, 1555), "A100-80": (80, 312, 19.5, 2039),
    "H100-80": (80, 989, 67, 3350), "H200-141": (141, 989, 67, 4800),
    "L4-24": (24, 121, 30, 300), "RTX4090-24": (24, 165, 83, 1008),
}  # fmt: skip
USABLE = 0.92  # share of the memory; the rest is lost to fragmentation and NCCL


@friendly_errors()
def main():
    name = sys.argv.pop(1) if len(sys.argv) > 1 else "nothing"
    count, machine = parse_machine(name)
    named = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    script = sys.argv.pop(1) if named else "train_ppo.py"
    task, args = parse_stage(script, sys.argv[1:])
    use_new_model(task, args)
    print("planning takes up to a minute", flush=True)
    plan = estimate(args, count, machine, script)
    print(f"{name}, prompts of {prompt_length(args)} tokens; for each process:")
    titles = {"memory": "GiB that stay", "peak": "GiB that a phase adds", "hours": "hours"}
    for part, title in titles.items():
        rows = [f"  {key:34}{value:10.2f}\n" for key, value in plan[part].items() if value]
        print(f"{title}\n{''.join(rows)}" if rows else "", end="")
    print(f"the run costs {plan['flops']:.1e} FLOP in each process")
    plan["fits_with"] = [] if plan["fits"] else flags_that_fit(args, count, machine, script)
    remedy = " ".join(plan["fits_with"]) or "more or larger machines"
    verdict = "it fits" if plan["fits"] else f"it does not fit; it does with {remedy}"
    print(f"{plan['gib']:.1f} GiB of {machine[0]:.0f} GiB ({USABLE:.0%} usable): {verdict}")
    print(json.dumps(plan))


def parse_machine(name) -> tuple[int, tuple]:
    """The number of processes and a row of GPUS, from a text such as 8xH100-80 or 1xcpu."""
    match = re.fullmatch(r"([1-9][0-9]*)x(.+)", name)
    if not match or match[2] not in (*GPUS, "cpu"):
        known = ", ".join((*GPUS, "cpu"))
        fail(f"{name}: give processes and a machine, such as 8xH100-80; known: {known}")
    return int(match[1]), GPUS.get(match[2], (cpu.memory_gib() / int(match[1]), 0, 0, 0))


class Parsed(BaseException):
    """Ends a script as soon as its flags are parsed."""


def parse_stage(script, words) -> tuple:
    """The task and the arguments of a script's command line; the task is None if it has none."""
    if script not in STAGES:
        fail(f"there is no plan for {script}; there is one for {', '.join(STAGES)}")
    parse, parse_args = tasks.parse, argparse.ArgumentParser.parse_args

    def stop(*args, **options):
        raise Parsed(*parse(*args, **options))

    def stop_without_task(parser):
        raise Parsed(None, parse_args(parser))

    with (
        mock.patch.object(sys, "argv", [script, *words]),
        mock.patch.object(tasks, "parse", stop),
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop_without_task),
    ):
        try:
            importlib.import_module(script.removesuffix(".py")).main()
        except Parsed as parsed:
            return parsed.args


def use_new_model(task, args):
    """Plans the model that the task makes, if none is named."""
    for name in ("policy", "model"):
        if hasattr(args, name) and not getattr(args, name) and hasattr(task, "new_model"):
            setattr(args, name, task.new_model(0)[1].config)


def estimate(args, processes, machine, script="train_ppo.py") -> dict:
    """The plan of one process.

    Returns: {"memory": GiB that stay, "peak": GiB that each phase adds, "gib": their highest sum,
    "fits", "hours" of each phase ({} on a CPU), "parameters", "flops" of the run}.
    """
    args = copy.copy(args)
    if not machine[-1] and hasattr(args, "bf16"):
        args.bf16 = dist.in_bf16(args.bf16)
    stage = Stage(args, processes, machine)
    STAGES[script](stage, args)
    highest = (sum(stage.memory.values()) + max(stage.peak.values(), default=0)) / GIB
    hours = {phase: seconds / 3600 for phase, seconds in stage.seconds.items()}
    return {
        "memory": {name: size / GIB for name, size in stage.memory.items()},
        "peak": {name: size / GIB for name, size in stage.peak.items()},
        "gib": highest,
        "fits": highest <= machine[0] * USABLE,
        "hours": hours | {"all": sum(hours.values())} if hours else {},
        "parameters": stage.parameters,
        "flops": stage.flops,
    }


def flags_that_fit(args, processes, machine, script="train_ppo.py", available=1) -> list[str]:
    """The shortest prefix of savers() with which the run fits; [] if none does."""
    flags, args = [], copy.copy(args)
    for flag, changed in savers(args, processes, machine, available):
        flags += flag
        processes = changed.pop("processes", processes)
        vars(args).update(changed)
        if estimate(args, processes, machine, script)["fits"]:
            return flags
    return []


def savers(args, processes, machine, available):
    """Yields what saves memory, the cheapest first: flags, and the arguments that they change."""
    trains, changed = hasattr(args, "gradient_accumulation_steps"), {}
    if available > processes:
        if trains:  # the step stays the same, if it can be divided
            rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
            rows = max(1, rows * processes // available)
            size = math.gcd(rows, args.per_device_train_batch_size)
            changed["per_device_train_batch_size"] = size
            changed["gradient_accumulation_steps"] = rows // size
        flags = [f"torchrun --nproc_per_node {available}", *flags_of(changed)]
        yield flags, changed | {"processes": available}
    emulated = not machine[-1] and not dist.in_bf16(True)
    for name in ("gradient_checkpointing",) if emulated else ("bf16", "gradient_checkpointing"):
        if not getattr(args, name, True):
            yield [f"--{name}"], {name: True}
    if trains and args.per_device_train_batch_size > 1:
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        changed = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows}
        yield flags_of(changed), changed
    if not getattr(args, "lora_r", True):
        yield ["--lora_r", "16"], {"lora_r": 16}
    if machine[-1] and not getattr(args, "cpu_offload", True):
        yield ["--cpu_offload"], {"cpu_offload": True}


def flags_of(changed) -> list[str]:
    return [word for name, value in changed.items() for word in (f"--{name}", str(value))]


if __name__ == "__main__":
    main()
