"""Plans a run of train_ppo.py before there is a GPU: its memory, its seconds, and what makes it fit.

    python -m extras.scale.plan 8xH100-80 --policy meta-llama/Llama-3.1-8B-Instruct --critic rule ...

The first argument is the number of processes and what each has; the others are flags of train_ppo.py.
No weight is loaded: the forward and backward passes of a microbatch run on fake tensors, and all that
is alive at once is counted. Weights, optimiser, key-value cache and FSDP's gathers are arithmetic.
Responses and critiques count at their longest. Seconds are a lower bound: they leave out
communication, the launching of kernels, and critics that are programs or servers.
"""

import copy
import json
import os
import re
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import train_ppo
from t2g import adapters, cpu, dist, policy
from t2g.cli import fail
from t2g.policy import Policy
from t2g.rollout import Rollout

GIB = 2**30


class Machine(NamedTuple):
    """What one process has."""

    gib: float
    bf16: float  # peak of matrix products in TFLOP/s, without sparsity
    fp32: float  # the same with TF32 off
    bandwidth: float  # GB/s of the memory
    gpu: bool = True


MACHINES = {  # as their data sheets say
    "A100-40": Machine(40, 312, 19.5, 1555),
    "A100-80": Machine(80, 312, 19.5, 2039),
    "H100-80": Machine(80, 989, 67, 3350),
    "H200-141": Machine(141, 989, 67, 4800),
    "L4-24": Machine(24, 121, 30, 300),
    "RTX4090-24": Machine(24, 165, 83, 1008),
}
OF_PEAK, OF_BANDWIDTH = 0.4, 0.6  # shares that matrix products and decoding are assumed to reach
USABLE = 0.92  # share of the memory; the rest goes to fragmentation and NCCL
SAVERS = {  # what makes a run fit, in the order of what it costs
    "bf16": True,
    "gradient_checkpointing": True,
    "per_device_train_batch_size": 1,
    "lora_r": 16,
    "cpu_offload": True,
}


def main():
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        return print(__doc__)
    where = sys.argv.pop(1)
    count, machine = machine_of(where)
    _, args = train_ppo.parse_args()
    print(
        "Running the passes of a microbatch on fake tensors; this takes up to a minute.", flush=True
    )
    plan = estimate(args, count, machine)
    length = f"prompts of {prompt_length(args)} tokens, responses of {args.response_length}"
    print(f"\n{where}: {length}, per process\n")
    for name, unit in (("memory", "GiB"), ("peak", "GiB"), ("seconds", "s")):
        for key, value in plan[name].items():
            print(f"  {key:34}{value:10.2f} {unit}")
        print()
    plan["fits_with"] = [] if plan["fits"] else what_makes_it_fit(args, count, machine)
    verdict = "it fits" if plan["fits"] else "it does not fit; take more or larger machines"
    if plan["fits_with"]:
        verdict = f"it does not fit; it does with {' '.join(plan['fits_with'])}"
    print(f"{plan['gib']:.1f} GiB of {machine.gib:.0f} GiB ({USABLE:.0%} usable): {verdict}")
    print(json.dumps(plan))


def machine_of(where) -> tuple[int, Machine]:
    """The number of processes and what each has, from a text such as 8xH100-80 or 1xcpu."""
    match = re.fullmatch(r"([1-9][0-9]*)x(.+)", where)
    if not match or match[2] not in (*MACHINES, "cpu"):
        known = ", ".join((*MACHINES, "cpu"))
        fail(
            f"{where}: give a number of processes and a machine, such as 8xH100-80; known: {known}"
        )
    count = int(match[1])
    if match[2] != "cpu":
        return count, MACHINES[match[2]]
    return count, Machine(*(part / count for part in this_machine()), gpu=False)


def estimate(args, processes, machine) -> dict:
    """The plan of one process.

    Returns: {"memory": GiB that stay, "peak": GiB that each phase adds, "gib": their highest sum,
    "fits", "seconds" of a step, "parameters", "flops" of a step}.
    """
    sharded = processes > 1 or args.cpu_offload
    beside = Path(args.output_dir).parent / "sft"
    config = config_of(args.policy or (str(beside) if beside.exists() else None), "--policy")
    keep_gradients = not sharded and args.gradient_accumulation_steps == 1
    step = fake_step(args, config, sharded, keep_gradients)
    critic = None
    if args.critic in ("rm", "scalar"):
        config = config_of(args.reward_model or args.policy, "--reward_model")
        critic = fake_step(args, config, sharded)
    stays = memory_that_stays(args, processes, machine, step, critic)
    adds = memory_of_phases(args, sharded, step, critic)
    seconds = seconds_of_phases(args, machine, step, critic)
    highest = (sum(stays.values()) + max(adds.values())) / GIB
    update = args.num_ppo_epochs * step.update_flops
    return {
        "memory": {name: value / GIB for name, value in stays.items()},
        "peak": {name: value / GIB for name, value in adds.items()},
        "gib": highest,
        "fits": highest <= machine.gib * USABLE,
        "seconds": seconds | {"a step": sum(seconds.values())},
        "parameters": step.parameters,
        "flops": local_batch(args) * (3 * step.forward_flops + update),
    }


def memory_that_stays(args, processes, machine, step, critic) -> dict:
    """Bytes that a process holds all the time."""
    share = 0 if args.cpu_offload else 1 / processes
    whole = (processes > 1 or args.cpu_offload) and args.replicate_frozen
    frozen = cell(args) if whole else 4 * share
    of_critic = frozen if args.critic == "rm" else 4
    return {
        "process": (0.5 if machine.gpu else 0.3) * GIB,  # CUDA's context, or Python and libraries
        "weights": 4 * step.parameters * share,
        "gradients": 0 if step.kept_gradients else 4 * step.trainable * share,
        "optimiser, two moments": 8 * step.trainable * share,
        "reference": 0 if args.lora_r else frozen * step.parameters,
        "reward model": of_critic * critic.parameters if critic else 0,
    }


def memory_of_phases(args, sharded, step, critic) -> dict:
    """Bytes that each phase of a step adds at its highest."""
    length, size = prompt_length(args) + args.response_length, cell(args)
    rows = max(local_batch(args), min(args.eval_samples, 64))  # evaluation samples 64 at a time
    rollout = step.cache(length, rows, size) + rows * step.prefill_peak
    critique, score, update = 0, step.score_peak, step.update_peak
    if args.critic == "rm":
        prefill = 64 * critic.prefill_peak * length / prompt_length(args)
        critique = critic.cache(length + args.critique_length, 64, size) + prefill
    if sharded or args.bf16:  # FSDP gathers the weights for sampling; autocast keeps a copy
        rollout += size * step.parameters
        if args.critic == "rm" and not args.replicate_frozen:
            critique += size * critic.parameters
    if sharded:  # two blocks and the rest are gathered for a pass; sums of gradients are in fp32
        score += size * (2 * step.block + step.rest * (1 if args.lora_r else 2))
        update += size * (2 * step.block + step.rest)
        update += 0 if args.lora_r else (size + 4) * (step.block + step.rest)
    return {
        "rollout: cache, prefill": rollout,
        "critique: cache, prefill": critique,
        "score: logits, activations": score,
        "update: activations, logits": update,
    }


def seconds_of_phases(args, machine, step, critic) -> dict:
    """Seconds at a share of the peak of products, or of the bandwidth at which weights are read."""
    peak = (machine.bf16 if args.bf16 else machine.fp32) * 1e12 * OF_PEAK
    bandwidth = machine.bandwidth * 1e9 * OF_BANDWIDTH
    batch, prompt = local_batch(args), prompt_length(args)
    length = prompt + args.response_length

    def decode(model, prompt, new):
        flops = model.forward_flops / length  # of a token
        each = max(cell(args) * model.parameters / bandwidth, batch * flops / peak)
        return batch * prompt * flops / peak + new * each

    writes = args.critic == "rm"
    return {
        "rollout": decode(step, prompt, args.response_length),
        "critique": decode(critic, length, args.critique_length) if writes else 0.0,
        "score, and the change of log pi": batch * step.forward_flops * 3 / peak,
        "update": args.num_ppo_epochs * batch * step.update_flops / peak,
    }


def fake_step(args, config, sharded, keep_gradients=False):
    """Bytes beyond the weights that the passes of a microbatch need, and FLOPs of a sequence."""
    rows, T = args.per_device_train_batch_size, args.response_length
    dtype = torch.bfloat16 if sharded and args.bf16 else torch.float32  # the copies that FSDP makes
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        parameters = sum(weights.numel() for weights in model.parameters())
        if not dist.blocks(model):
            fail(f"there is no plan for {type(model).__name__}: it does not name its blocks")
        block = sum(weights.numel() for weights in dist.blocks(model)[0].parameters())
        reference = None
        if not args.lora_r:
            reference = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        actor = Policy(adapters.added(model, args)).eval()
    with FakeTensorMode():
        make_fake(actor)
        make_fake(reference)
        if args.gradient_checkpointing:
            dist.recompute_blocks(actor.model)
        trainable = [weights for weights in actor.parameters() if weights.requires_grad]
        for weights in () if keep_gradients else trainable:
            weights.register_post_accumulate_grad_hook(drop_gradient)
        prompt = torch.zeros(rows, prompt_length(args), dtype=torch.long)
        response = torch.zeros(rows, T, dtype=torch.long)
        rollout = Rollout(prompt, prompt == 0, response, response == 0, None, [""] * rows)
        measured = run_passes(args, actor, reference, rollout)
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    values = 2 * text.num_hidden_layers * heads * head  # keys and values of a token
    return SimpleNamespace(
        **measured,
        parameters=parameters,
        trainable=sum(weights.numel() for weights in trainable),
        block=block,
        rest=parameters - text.num_hidden_layers * block,
        kept_gradients=keep_gradients,
        cache=lambda length, rows, size: values * length * rows * size,
    )


def run_passes(args, actor, reference, rollout) -> dict:
    """Highest bytes alive and FLOPs of prefill, scoring and update, on fake tensors."""
    rows, config = len(rollout), actor.model.config
    names = ("old_logprobs", "advantages", "old_values", "returns")
    batch = {name: torch.zeros(rollout.response.shape) for name in names} | {"mask": rollout.mask}

    def prefill():
        where = dict(position_ids=policy.positions(rollout.prompt_mask), use_cache=True)
        ids, mask, past = rollout.prompt, rollout.prompt_mask.long(), DynamicCache(config=config)
        model = actor.model
        model(ids, attention_mask=mask, past_key_values=past, logits_to_keep=1, **where)

    def score():
        train_ppo.score_microbatch(actor, reference, rollout, args)

    def update():
        count = torch.tensor(1)
        train_ppo.microbatch_loss(actor, rollout, batch, count, args)[0].backward()
        for weights in actor.parameters():
            weights.grad = None

    with Alive() as prefill_memory, torch.no_grad():
        prefill()
    with Alive() as score_memory, torch.no_grad():
        score()
    with Alive() as update_memory:
        update()
    # FLOPs are counted apart: the counter would keep what checkpointing frees.
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        score()
    with FlopCounterMode(display=False) as both:
        update()
    return {
        "prefill_peak": prefill_memory.peak / rows,
        "score_peak": score_memory.peak,
        "update_peak": update_memory.peak,
        "forward_flops": forward.get_total_flops() / rows / 2,
        "update_flops": both.get_total_flops() / rows,
    }


def drop_gradient(weights):
    weights.grad = None


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within it: now, and at the highest."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in self.unknown((args, kwargs)):  # made before, such as weights
            self.known.add(storage)
        out = function(*args, **(kwargs or {}))
        for storage in self.unknown(out):
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage.nbytes())
        return out

    def unknown(self, tensors) -> list:
        tensors = [leaf for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return [storage for storage in storages if storage not in self.known]

    def freed(self, count):
        self.now -= count


def make_fake(model):
    """Puts fake tensors in the place of weights and buffers; tied ones stay one."""
    made = {}
    for module in model.modules() if model else ():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if tensors is module._parameters:
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    made[id(tensor)] = fake
                tensors[name] = made[id(tensor)]


def what_makes_it_fit(args, processes, machine) -> list[str]:
    """The first flags of SAVERS that suffice; [] if all together do not."""
    flags, args = [], copy.copy(args)
    responses = args.per_device_train_batch_size * args.gradient_accumulation_steps
    for name, value in SAVERS.items():
        if getattr(args, name) == value or (name == "cpu_offload" and not machine.gpu):
            continue
        setattr(args, name, value)
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        if name == "per_device_train_batch_size":
            args.gradient_accumulation_steps = responses
            flags += ["--gradient_accumulation_steps", str(responses)]
        if estimate(args, processes, machine)["fits"]:
            return flags
    return []


def config_of(path, flag):
    """The configuration of a model; nothing else of it is read."""
    if not path:
        fail(f"a plan needs {flag}: a hub id or a folder, of which only config.json is read")
    path = str(policy.latest_checkpoint(path) or path)
    source, gguf = policy.pretrained(path)
    try:
        return AutoConfig.from_pretrained(source, **gguf)
    except (OSError, ValueError) as error:
        fail(f"no model configuration could be read from {path!r}: {str(error).splitlines()[0]}")


def cell(args) -> int:
    """Bytes of a number in products and in the cache."""
    return 2 if args.bf16 else 4


def local_batch(args) -> int:
    """Responses of a process in a rollout."""
    microbatches = args.gradient_accumulation_steps * args.num_mini_batches
    return args.per_device_train_batch_size * microbatches


def prompt_length(args) -> int:
    return args.max_prompt_length or 512


@torch.no_grad()
def this_machine() -> tuple[float, float, float, float]:
    """Memory, peaks and bandwidth of this CPU, the last three measured by products and a copy."""

    def seconds(work, *args):
        work(*args)
        start = time.perf_counter()
        work(*args)
        return time.perf_counter() - start

    peaks = []
    for dtype in (torch.bfloat16, torch.float32):
        linear = cpu.use(nn.Linear(2048, 2048, bias=False, dtype=dtype))
        peaks.append(2 * 2048**3 / seconds(linear, torch.ones(2048, 2048, dtype=dtype)) / 1e12)
    big = torch.ones(2**26)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return memory, *peaks, 2 * big.nbytes / seconds(big.clone) / 1e9


if __name__ == "__main__":
    main()
