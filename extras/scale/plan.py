"""What a run of train_ppo.py will take, before there is a GPU: memory of a process, seconds of a step, and what makes it fit.

    python train_ppo.py --policy meta-llama/Llama-3.1-8B-Instruct --critic rule ... --plan 8xH100-80

No weight is loaded. The model is made of fake tensors, the very forward and backward passes of a microbatch run on them, and all
that is alive at once is counted; weights, optimiser, key-value cache and what FSDP gathers are arithmetic. Responses and critiques
count at their longest. Seconds are FLOPs over a share of the peak that such models reach, and reads of weights over bandwidth.
"""

import copy
import json
import os
import re
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from t2g import adapters, cpu, dist, policy
from t2g.cli import fail
from t2g.policy import Policy
from t2g.rollout import Rollout

GIB = 2**30
GPUS = {  # memory in GiB, bf16 and fp32 (TF32 off) peak in TFLOP/s, bandwidth in GB/s: the makers' data sheets
    "A100-40": (40, 312, 19.5, 1555), "A100-80": (80, 312, 19.5, 2039), "H100-80": (80, 989, 67, 3350),
    "H200-141": (141, 989, 67, 4800), "L4-24": (24, 121, 30, 300), "RTX4090-24": (24, 165, 83, 1008),
}  # fmt: skip
OF_PEAK, OF_BANDWIDTH = (
    0.4,
    0.6,
)  # what well-fed matrix products, and reads of weights in decoding, are counted at
USABLE = 0.92  # of the memory; the rest goes to fragments, to CUDA's context and to NCCL
PROCESS = {"cpu": 0.3, "gpu": 0.5}  # GiB of Python and its libraries; of CUDA's context


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within it: now, and at the highest."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in self.unknown((args, kwargs)):  # made before: weights
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
        found = (
            leaf.untyped_storage()
            for leaf in tree_leaves(tensors)
            if isinstance(leaf, torch.Tensor)
        )
        return [storage for storage in found if storage not in self.known]

    def freed(self, count):
        self.now -= count


def show(args):
    """Prints the plan of these flags of train_ppo.py for --plan, such as 8xH100-80 or 1xcpu; its last line is one JSON object."""
    found = re.fullmatch(r"([1-9][0-9]*)x(.+)", args.plan)
    if not found or found[2] not in (*GPUS, "cpu"):
        fail(
            f"--plan {args.plan}: give a number of processes and what each has, such as 8xH100-80; known: {', '.join(GPUS)}, cpu"
        )
    processes = int(found[1])
    machine = (
        tuple(part / processes for part in this_machine()) if found[2] == "cpu" else GPUS[found[2]]
    )
    print(
        "the passes of a microbatch on fake tensors; up to a minute, and again for each flag that is tried ...",
        flush=True,
    )
    plan = estimate(args, processes, machine)
    print(
        f"\n{args.plan}: prompts of {prompt_length(args)} tokens, responses of {args.response_length}, per process\n"
    )
    for name, unit in (("memory", "GiB"), ("peak", "GiB"), ("seconds", "s")):
        print(
            "\n".join(f"  {key:34}{value:10.2f} {unit}" for key, value in plan[name].items()), "\n"
        )
    plan["fits_with"] = [] if plan["fits"] else what_makes_it_fit(args, processes, machine)
    limit = f"{machine[0]:.0f} GiB, of which {USABLE:.0%} count"
    if plan["fits"]:
        print(f"{plan['gib']:.1f} GiB of {limit}: it fits")
    elif plan["fits_with"]:
        print(
            f"{plan['gib']:.1f} GiB of {limit}: it does not fit; it does with {' '.join(plan['fits_with'])}"
        )
    else:
        larger = "a machine with more memory" if found[2] == "cpu" else "more or larger GPUs"
        print(
            f"{plan['gib']:.1f} GiB of {limit}: it does not fit, whatever the flags; take {larger}"
        )
    print(
        "seconds are a lower bound: without communication, launches of kernels, and programs or servers as critics"
    )
    print(json.dumps(plan))


def estimate(args, processes, machine) -> dict:
    """Of one process: {"memory": what stays, "peak": what phases add, "gib": their highest sum, "fits", "seconds" of a step}."""
    gib, bf16_peak, fp32_peak, bandwidth = machine
    on_cpu = args.plan.endswith("cpu")
    sharded = processes > 1 or args.cpu_offload
    beside = Path(args.output_dir).parent / "sft"
    config = config_of(args.policy or (str(beside) if beside.exists() else None), "--policy")
    step = fake_step(
        args, config, sharded, keep_gradients=not sharded and args.gradient_accumulation_steps == 1
    )
    asked = args.critic in ("rm", "scalar")
    of_rm = (
        fake_step(args, config_of(args.reward_model or args.policy, "--reward_model"), sharded)
        if asked
        else None
    )
    cell = 2 if args.bf16 else 4  # bytes of a number in products, and in the cache
    share = 0 if args.cpu_offload else 1 / processes
    asleep = cell if sharded and args.replicate_frozen else 4 * share
    batch = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * args.num_mini_batches
    )
    length = prompt_length(args) + args.response_length
    most = max(
        batch, min(args.eval_samples, 64)
    )  # before and after, responses are sampled for 64 prompts at a time
    stays = {
        "process": PROCESS["cpu" if on_cpu else "gpu"] * GIB,
        "weights": 4 * step.parameters * share,
        "gradients": 4 * step.trainable * share * (not step.kept_gradients),
        "optimiser, two moments": 8 * step.trainable * share,
        "reference": 0 if args.lora_r else asleep * step.parameters,
        "reward model": (asleep if args.critic == "rm" else 4) * of_rm.parameters if of_rm else 0,
    }
    adds = {
        "rollout: cache, prefill": step.cache(length, most, cell) + most * step.prefill_peak,
        "critique: cache, prefill": 0,
        "score: logits, activations": step.score_peak,
        "update: activations, logits": step.update_peak,
    }
    if args.critic == "rm":
        written = length + args.critique_length
        adds["critique: cache, prefill"] = of_rm.cache(
            written, 64, cell
        ) + 64 * of_rm.prefill_peak * length / prompt_length(args)
    if sharded or args.bf16:  # what FSDP gathers for sampling; what autocast keeps
        adds["rollout: cache, prefill"] += cell * step.parameters
        adds["critique: cache, prefill"] += (
            cell * of_rm.parameters if args.critic == "rm" and not args.replicate_frozen else 0
        )
    if sharded:  # two blocks and the rest for a pass; and fp32 sums of gradients
        adds["score: logits, activations"] += cell * (
            2 * step.block + step.rest * (1 if args.lora_r else 2)
        )
        adds["update: activations, logits"] += cell * (2 * step.block + step.rest)
        adds["update: activations, logits"] += (
            0 if args.lora_r else (cell + 4) * (step.block + step.rest)
        )
    peak = (bf16_peak if args.bf16 else fp32_peak) * 1e12 * OF_PEAK
    read = bandwidth * 1e9 * OF_BANDWIDTH
    each = step.forward_flops / length  # of a token

    def decode(model, flops, prompt, new, rows):
        return rows * prompt * flops / peak + new * max(
            cell * model.parameters / read, rows * flops / peak
        )

    writes = args.critic == "rm"
    seconds = {
        "rollout": decode(step, each, prompt_length(args), args.response_length, batch),
        "critique": decode(of_rm, of_rm.forward_flops / length, length, args.critique_length, batch)
        if writes
        else 0.0,
        "score, and the change of log pi": batch * step.forward_flops * 3 / peak,
        "update": args.num_ppo_epochs * batch * step.update_flops / peak,
    }
    highest = (sum(stays.values()) + max(adds.values())) / GIB
    return {
        "memory": {name: value / GIB for name, value in stays.items()},
        "peak": {name: value / GIB for name, value in adds.items()},
        "gib": highest,
        "fits": highest <= gib * USABLE,
        "seconds": seconds | {"a step": sum(seconds.values())},
        "parameters": step.parameters,
        "flops": batch * (3 * step.forward_flops + args.num_ppo_epochs * step.update_flops),
    }


def fake_step(args, config, sharded, keep_gradients=False):
    """What the passes of one microbatch need beyond weights, in bytes at the highest, and FLOPs of a sequence."""
    from train_ppo import microbatch_loss, score_microbatch  # not above: it is the script that asks

    rows, T = args.per_device_train_batch_size, args.response_length
    dtype = (
        torch.bfloat16 if sharded and args.bf16 else torch.float32
    )  # FSDP's copies; autocast's own are counted below
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        parameters = sum(weights.numel() for weights in model.parameters())
        if not dist.blocks(model):
            fail(
                f"{type(model).__name__} does not say in _no_split_modules what its blocks are, so there is no plan for it"
            )
        block = sum(weights.numel() for weights in dist.blocks(model)[0].parameters())
        reference = (
            None if args.lora_r else AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        )
        actor = Policy(adapters.added(model, args)).eval()
    with FakeTensorMode():
        make_fake(actor)
        make_fake(reference)
        if args.gradient_checkpointing:
            dist.recompute_blocks(actor.model)
        trainable = [weights for weights in actor.parameters() if weights.requires_grad]
        for weights in () if keep_gradients else trainable:
            weights.register_post_accumulate_grad_hook(
                lambda weights: setattr(weights, "grad", None)
            )
        prompt, response = (
            torch.zeros(rows, prompt_length(args), dtype=torch.long),
            torch.zeros(rows, T, dtype=torch.long),
        )
        rollout = Rollout(prompt, prompt == 0, response, response == 0, None, [""] * rows)
        names = ("old_logprobs", "advantages", "old_values", "returns")
        batch = {name: torch.zeros(rows, T) for name in names} | {"mask": rollout.mask}

        def update():
            microbatch_loss(actor, rollout, batch, torch.tensor(1), args)[0].backward()
            for weights in trainable:
                weights.grad = None

        with Alive() as prefill_memory, torch.no_grad():
            at = dict(
                position_ids=policy.positions(rollout.prompt_mask),
                past_key_values=DynamicCache(config=config),
            )
            model(
                input_ids=prompt,
                attention_mask=rollout.prompt_mask.long(),
                use_cache=True,
                logits_to_keep=1,
                **at,
            )
        del at
        with Alive() as score_memory, torch.no_grad():
            score_microbatch(actor, reference, rollout, args)
        with Alive() as update_memory:
            update()
        with (
            FlopCounterMode(display=False) as forward,
            torch.no_grad(),
        ):  # apart, for it would keep what checkpointing lets go
            score_microbatch(actor, reference, rollout, args)
        with FlopCounterMode(display=False) as both:
            update()
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = heads * (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    )
    return SimpleNamespace(
        parameters=parameters, trainable=sum(weights.numel() for weights in trainable), block=block, vocabulary=text.vocab_size,
        rest=parameters - text.num_hidden_layers * block, prefill_peak=prefill_memory.peak / rows, score_peak=score_memory.peak,
        update_peak=update_memory.peak, forward_flops=forward.get_total_flops() / rows / 2,
        update_flops=both.get_total_flops() / rows, kept_gradients=keep_gradients,
        cache=lambda length, rows, cell: 2 * text.num_hidden_layers * width * length * rows * cell,
    )  # fmt: skip


def make_fake(model):
    """Puts fake tensors in the place of weights and buffers, one for those that are one."""
    made = {}
    for module in model.modules() if model else ():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = (
                        nn.Parameter(fake, tensor.requires_grad)
                        if tensors is module._parameters
                        else fake
                    )
                if tensor is not None:
                    tensors[name] = made[id(tensor)]


def what_makes_it_fit(args, processes, machine) -> list[str]:
    """The first flags that are enough, in the order of what they cost; [] where all together are not."""
    tried, args = [], copy.copy(args)
    per_process = args.per_device_train_batch_size * args.gradient_accumulation_steps
    for name, value in (
        ("bf16", True), ("gradient_checkpointing", True), ("per_device_train_batch_size", 1), ("lora_r", 16), ("cpu_offload", True),
    ):  # fmt: skip
        if getattr(args, name) == value or (name == "cpu_offload" and args.plan.endswith("cpu")):
            continue
        setattr(args, name, value)
        tried += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        if name == "per_device_train_batch_size":
            args.gradient_accumulation_steps = per_process
            tried += ["--gradient_accumulation_steps", str(per_process)]
        if estimate(args, processes, machine)["fits"]:
            return tried
    return []


def config_of(path, flag):
    if not path:
        fail(f"a plan needs {flag}: a hub id or a folder; its config.json is all that is read")
    path = str(policy.latest_checkpoint(path) or path)
    source, gguf = policy.pretrained(path)
    try:
        return AutoConfig.from_pretrained(source, **gguf)
    except (OSError, ValueError) as error:
        fail(
            f"no configuration of a model could be read from {path!r}: {str(error).splitlines()[0]}"
        )


def prompt_length(args) -> int:
    return args.max_prompt_length or 512


def this_memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def this_machine() -> tuple[float, float, float, float]:
    """A row of GPUS for this CPU, its peaks and bandwidth measured by a product and a copy."""

    @torch.no_grad()
    def seconds(work):
        work()
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    peaks = []
    for dtype in (torch.bfloat16, torch.float32):
        linear, x = (
            cpu.use(nn.Linear(2048, 2048, bias=False, dtype=dtype)),
            torch.ones(2048, 2048, dtype=dtype),
        )
        peaks.append(2 * 2048**3 / seconds(lambda linear=linear, x=x: linear(x)) / 1e12)
    big = torch.ones(2**26)
    return this_memory(), *peaks, 2 * big.nbytes / seconds(big.clone) / 1e9
