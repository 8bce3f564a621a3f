"""Plans a run of train_ppo.py before there is a GPU: memory, FLOP, seconds, and what makes it fit.

    python -m extras.scale.plan 8xH100-80 --policy meta-llama/Llama-3.1-8B-Instruct --critic rule

No weights are loaded: a microbatch runs on fake tensors, which have shapes and no values, and the
bytes that are alive at once are counted. Weights, optimiser, cache and FSDP's gathers are
arithmetic. Responses and critiques count with their maximum length. Seconds, for GPUs alone, are a
lower bound without communication, kernel launches, and critics that are programs or servers.
"""

import copy
import json
import os
import re
import sys
import weakref
from types import SimpleNamespace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import train_ppo
from t2g import adapters, dist, policy
from t2g.cache import positions
from t2g.cli import fail, friendly_errors
from t2g.rollout import Rollout
from t2g.score import score_microbatch

GIB = 2**30
GPUS = {  # from data sheets: GiB, TFLOP/s in bf16 and in fp32 (no TF32, no sparsity), GB/s
    "A100-40": (40, 312, 19.5, 1555), "A100-80": (80, 312, 19.5, 2039),
    "H100-80": (80, 989, 67, 3350), "H200-141": (141, 989, 67, 4800),
    "L4-24": (24, 121, 30, 300), "RTX4090-24": (24, 165, 83, 1008),
}  # fmt: skip
OF_PEAK, OF_BANDWIDTH = 0.4, 0.6  # shares that matrix products and decoding are assumed to reach
USABLE = 0.92  # share of the memory; the rest is lost to fragmentation and NCCL
SAVERS = {"bf16": True, "gradient_checkpointing": True, "per_device_train_batch_size": 1}
SAVERS |= {"lora_r": 16}  # flags that save memory, the cheapest first; then --cpu_offload


@friendly_errors()
def main():
    name = sys.argv.pop(1) if len(sys.argv) > 1 else "nothing"
    count, machine = parse_machine(name)
    _, args = train_ppo.parse_args()
    args.max_prompt_length = args.max_prompt_length or 512
    print("this takes up to a minute", flush=True)
    plan = estimate(args, count, machine)
    print(f"{name}, prompts of {args.max_prompt_length} tokens; for each process:")
    titles = {"memory": "GiB that stay", "peak": "GiB that a phase adds", "seconds": "seconds"}
    for part, title in titles.items():
        rows = [f"  {key:34}{value:10.2f}\n" for key, value in plan[part].items() if value]
        print(f"{title}\n{''.join(rows)}" if rows else "", end="")
    print(f"a step costs {plan['flops']:.1e} FLOP: rollout, critique, scores and update")
    plan["fits_with"] = [] if plan["fits"] else flags_that_fit(args, count, machine)
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
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return int(match[1]), GPUS.get(match[2], (memory / int(match[1]), 0, 0, 0))


def estimate(args, processes, machine) -> dict:
    """The plan of one process.

    Returns: {"memory": GiB that stay, "peak": GiB that each phase adds, "gib": their highest sum,
    "fits", "seconds" of a step ({} on a CPU), "parameters", "flops" of a step}.
    """
    (gib, _, _, bandwidth), sharded = machine, processes > 1 or args.cpu_offload
    config = load_config(args.policy, "--policy")
    keep_gradients = not sharded and args.gradient_accumulation_steps == 1
    step, critic = fake_step(args, config, sharded, keep_gradients), None
    if args.critic == "rm":
        config = load_config(args.reward_model or args.policy, "--reward_model")
        critic = fake_step(args, config, sharded)
    share = 0 if args.cpu_offload else 1 / processes
    frozen = (2 if args.bf16 else 4) if sharded and args.replicate_frozen else 4 * share
    memory = {  # the process: CUDA's context, or Python and its libraries
        "process": (0.5 if bandwidth else 0.55) * GIB,
        "weights": 4 * step.parameters * share,
        "gradients": 0 if keep_gradients else 4 * step.trainable * share,
        "optimiser, two moments": 8 * step.trainable * share,
        "reference": 0 if args.lora_r else frozen * step.parameters,
        "reward model": frozen * critic.parameters if critic else 0,
    }
    peak = phase_memory(args, sharded, step, critic)
    highest = (sum(memory.values()) + max(peak.values())) / GIB
    # Of N weights, about 2N a token in a forward pass (rollout, policy and reference, change of
    # log pi) and 6N in an epoch.
    flops = 4 * step.forward_flops + args.num_ppo_epochs * step.update_flops
    if critic:
        length = args.max_prompt_length + args.response_length
        flops += critic.forward_flops * (1 + args.critique_length / length)
    return {
        "memory": {name: size / GIB for name, size in memory.items()},
        "peak": {name: size / GIB for name, size in peak.items()},
        "gib": highest,
        "fits": highest <= gib * USABLE,
        "seconds": phase_seconds(args, machine, step, critic) if bandwidth else {},
        "parameters": step.parameters,
        "flops": args.batch_size * flops,
    }


def phase_memory(args, sharded, step, critic) -> dict:
    """Bytes that each phase of a step adds at its highest."""
    length, size = args.max_prompt_length + args.response_length, 2 if args.bf16 else 4
    rows = max(args.batch_size, min(args.eval_samples, 64))  # evaluation samples 64 at a time
    rollout = step.cache * length * rows * size + rows * step.prefill_peak
    critique, score, update = 0, step.score_peak, step.update_peak
    if critic:
        critique = critic.cache * (length + args.critique_length) * 64 * size
        critique += 64 * critic.prefill_peak * length / args.max_prompt_length
    if sharded or args.bf16:  # FSDP gathers the weights for sampling; autocast keeps a copy
        rollout += size * step.parameters
        critique += size * critic.parameters if critic and not args.replicate_frozen else 0
    if sharded:  # two blocks and the rest are gathered for a pass; sums of gradients are in fp32
        score += size * (2 * step.block + step.rest * (1 if args.lora_r else 2))
        update += size * (2 * step.block + step.rest)
        update += 0 if args.lora_r else (size + 4) * (step.block + step.rest)
    return {"rollout": rollout, "critique": critique, "score": score, "update": update}


def phase_seconds(args, machine, step, critic) -> dict:
    """Seconds at the assumed shares of peak FLOP/s, and of the bandwidth that reads the weights."""
    _, bf16, fp32, bandwidth = machine
    peak = (bf16 if args.bf16 else fp32) * 1e12 * OF_PEAK
    read = bandwidth * 1e9 * OF_BANDWIDTH / (2 if args.bf16 else 4)  # weights a second
    batch, prompt = args.batch_size, args.max_prompt_length
    length = prompt + args.response_length

    def decode(model, prompt, new):
        one = batch * model.forward_flops / length / peak  # a token of each response
        return prompt * one + new * max(model.parameters / read, one)

    seconds = {
        "rollout": decode(step, prompt, args.response_length),
        "critique": decode(critic, length, args.critique_length) if critic else 0.0,
        "score, and the change of log pi": batch * step.forward_flops * 3 / peak,
        "update": args.num_ppo_epochs * batch * step.update_flops / peak,
    }
    return seconds | {"a step": sum(seconds.values())}


def fake_step(args, config, sharded, keep_gradients=False):
    """A model's sizes, the bytes that a microbatch adds, and the FLOP of one response."""
    rows = args.per_device_train_batch_size
    dtype = torch.bfloat16 if sharded and args.bf16 else torch.float32  # the copies that FSDP makes
    with torch.device("meta"):
        model, reference = (AutoModelForCausalLM.from_config(config, dtype=dtype) for _ in range(2))
        if not dist.blocks(model):
            fail(f"there is no plan for {type(model).__name__}: it does not name its blocks")
        parameters, block = count(model.parameters()), count(dist.blocks(model)[0].parameters())
        actor = policy.Policy(adapters.added(model, args)).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        nn.ModuleList([actor, reference]).to_empty(device="cpu")
        model.tie_weights()
        reference.tie_weights()
        if args.gradient_checkpointing:
            dist.recompute_blocks(actor.model)
        trainable = [weights for weights in actor.parameters() if weights.requires_grad]
        for weights in () if keep_gradients else trainable:
            weights.register_post_accumulate_grad_hook(lambda w: setattr(w, "grad", None))
        prompt = torch.zeros(rows, args.max_prompt_length, dtype=torch.long)
        response = torch.zeros(rows, args.response_length, dtype=torch.long)
        rollout = Rollout(prompt, prompt == 0, response, response == 0, None, [""] * rows)
        passes = measure_passes(args, actor, None if args.lora_r else reference, rollout)
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sizes = dict(parameters=parameters, block=block, trainable=count(trainable))
    sizes["rest"] = parameters - text.num_hidden_layers * block
    sizes["cache"] = 2 * text.num_hidden_layers * heads * head  # numbers of a token
    return SimpleNamespace(**sizes, **passes)


def count(weights) -> int:
    return sum(tensor.numel() for tensor in weights)


def measure_passes(args, actor, reference, rollout) -> dict:
    """The highest bytes alive in prefill, scoring and update, and the FLOP of a response."""
    rows = len(rollout)
    names = ("old_logprobs", "advantages", "old_values", "returns")
    batch = {name: torch.zeros(rollout.response.shape) for name in names} | {"mask": rollout.mask}

    def prefill():
        mask = rollout.prompt_mask
        inputs = dict(attention_mask=mask.long(), position_ids=positions(mask))
        actor.model(rollout.prompt, use_cache=True, logits_to_keep=1, **inputs)

    def score():
        score_microbatch(actor, reference, rollout, args)

    def update():
        train_ppo.microbatch_loss(actor, rollout, batch, torch.tensor(1), args)[0].backward()
        actor.zero_grad()

    def measure(work, grad=False):
        with torch.set_grad_enabled(grad):
            with Alive() as alive:
                work()
            # A second pass, because the counter would keep what checkpointing frees.
            with FlopCounterMode(display=False) as counter:
                work()
        return alive.peak, counter.get_total_flops() / rows

    measured = {"prefill_peak": measure(prefill)[0] / rows}
    measured["score_peak"], score_flops = measure(score)
    measured["update_peak"], measured["update_flops"] = measure(update, grad=True)
    return measured | {"forward_flops": score_flops / 2}  # of the policy and of the reference


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are created within it: those alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.known.update(storages_of((args, kwargs)))  # created before, such as weights
        out = function(*args, **(kwargs or {}))
        for storage in storages_of(out):
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, size):
        self.now -= size


def storages_of(tree) -> set:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return {tensor.untyped_storage() for tensor in tensors}


def flags_that_fit(args, processes, machine) -> list[str]:
    """The first of SAVERS that make the run fit, all together; [] if they do not."""
    flags, args = [], copy.copy(args)
    responses = args.per_device_train_batch_size * args.gradient_accumulation_steps
    savers = SAVERS | ({"cpu_offload": True} if machine[-1] else {})
    for name, value in savers.items():
        if getattr(args, name) == value:
            continue
        setattr(args, name, value)
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        if name == "per_device_train_batch_size":  # the batch stays the same
            args.gradient_accumulation_steps = responses
            flags += ["--gradient_accumulation_steps", str(responses)]
        if estimate(args, processes, machine)["fits"]:
            return flags
    return []


def load_config(path, flag: str):
    """The configuration of a model, without its weights."""
    if not path:
        fail(f"a plan needs {flag}: a hub id or a folder, of which only config.json is read")
    path = str(policy.latest_checkpoint(path) or path)
    source, gguf = policy.pretrained(path)
    try:
        return AutoConfig.from_pretrained(source, **gguf)
    except (OSError, ValueError) as error:
        fail(f"no model configuration could be read from {path!r}: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
