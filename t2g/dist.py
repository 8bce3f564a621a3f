"""Many processes as one: torchrun starts them, FSDP2 shards the models over them, and each knows the numbers of the whole batch.

    torchrun --nproc_per_node 8 train_ppo.py ...

The only file that knows torch.distributed. One process takes the same path as many, but has nothing to share: its model stays as
it is. What every process must do equally often, however its own samples turn out, is marked as collective.
"""

import atexit
import os
import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
from torch import distributed
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from t2g.cli import fail


def start(cpu_offload=False, first=None):
    """Joins the processes that torchrun started, if it did: NCCL between GPUs, gloo between CPUs. Only the first one prints.

    Before, the first one runs first(), and the others wait for it, for weeks if need be. Returns: what first() said, or None.
    """
    if cpu_offload and not ("WORLD_SIZE" in os.environ and torch.cuda.is_available()):
        fail("--cpu_offload takes weights off a GPU, under torchrun; leave it out")
    if "WORLD_SIZE" not in os.environ or distributed.is_initialized():
        return first() if first else None
    store, number, count = next(distributed.rendezvous("env://"))
    restart = os.environ.get(
        "TORCHELASTIC_RESTART_COUNT", "0"
    )  # what processes that died had written must not be read
    store = distributed.PrefixStore(f"start {restart}", store)
    said = first() if first and number == 0 else None
    if number == 0:
        store.set("first is done", "")
    store.wait(["first is done"], timedelta(weeks=4))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend, timeout = (
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        timedelta(hours=1),
    )
    distributed.init_process_group(
        backend, store=store, rank=number, world_size=count, timeout=timeout
    )
    atexit.register(distributed.destroy_process_group)
    warnings.filterwarnings(
        "ignore", message="FSDP2-wrapped module .* returned a view tensor"
    )  # nothing here is changed in place
    if number:
        sys.stdout = open(os.devnull, "w")
    return said


def processes() -> int:
    """How many torchrun started, known before start()."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def barrier():
    """Goes on when all processes are here. Collective."""
    if size() > 1:
        distributed.barrier()


def total(x):
    """The sum of a tensor over all processes. Collective."""
    if size() > 1:
        x = x.clone()
        distributed.all_reduce(x)
    return x


def totals(numbers: dict) -> dict:
    """The sums of numbers over all processes. Collective."""
    return dict(
        zip(
            numbers,
            total(
                torch.tensor(list(numbers.values()), dtype=torch.float64, device=device())
            ).tolist(),
        )
    )


def means(numbers: dict) -> dict:
    """The mean of numbers over all processes. Collective."""
    return {name: value / size() for name, value in totals(numbers).items()}


def gather(x):
    """The rows (B, T) of all processes, first to last: (size B, longest T), 0 behind shorter ones. Collective."""
    if size() == 1:
        return x
    longest = torch.tensor(x.shape[1], device=x.device)
    distributed.all_reduce(longest, distributed.ReduceOp.MAX)
    mine = F.pad(
        x.to(torch.uint8) if x.dtype == torch.bool else x, (0, int(longest) - x.shape[1])
    ).contiguous()
    rows = [torch.empty_like(mine) for _ in range(size())]
    distributed.all_gather(rows, mine)
    return torch.cat(rows).to(x.dtype)


def own(rows):
    """This process's part of what gather() made, or of a list that all processes have."""
    count = len(rows) // size()
    return rows[rank() * count : (rank() + 1) * count]


def add_flags(add):
    add(
        "--gradient_checkpointing",
        action="store_true",
        help="activations of a block are computed again, not kept: less memory",
    )
    add(
        "--cpu_offload",
        action="store_true",
        help="weights and optimiser state wait in the memory of the CPU; torchrun on GPUs",
    )
    add(
        "--replicate_frozen",
        action="store_true",
        help="reference and reward model whole on every GPU: faster, more memory",
    )


def shard(model, bf16=False, cpu_offload=False, recompute=False):
    """The same model on this process's device, its weights, gradients and optimiser state spread over all: FSDP2, a group of
    weights for each block of the transformer and one of the rest. Collective, and so is every forward and backward pass after it.

    Gradients are sums over all processes: a loss must be divided by the tokens of all of them, and not only of its own. With
    recompute, a block keeps its input alone and goes forward once more when its gradient is wanted.
    """
    if recompute:
        recompute_blocks(model)
    if size() == 1 and not cpu_offload:  # nothing to share: FSDP would only copy
        return model.to(device())
    options = {"offload_policy": CPUOffloadPolicy()} if cpu_offload else {}
    if bf16:  # products in bf16; the weights that the optimiser steps, and sums of gradients over processes, in fp32
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    for block in reversed(blocks(model)):  # what lies within another first
        fully_shard(block, **options)
    fully_shard(model, **options)
    for part in parts(model):
        part.set_reshard_after_forward(reshard_after_forward(part, model), recurse=False)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        if hasattr(part, "set_reduce_scatter_unused_params"):  # older versions of torch lack it
            part.set_reduce_scatter_unused_params(True)  # such as experts without a local token
    return model


def frozen(model, args):
    """A model that is not trained, ready to be asked: sharded as well, or whole in each process with --replicate_frozen."""
    if not (distributed.is_initialized() and (size() > 1 or args.cpu_offload)):
        return model.to(
            device()
        )  # autocast keeps bf16 copies only of weights that could have a gradient
    model.requires_grad_(False)
    if not args.replicate_frozen:
        return shard(model, args.bf16, args.cpu_offload)
    for weights in model.parameters() if args.bf16 else ():
        weights.data = weights.data.to(torch.bfloat16)  # as those of shard() are when they are read
    return model.to(device())


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def recompute_blocks(model):
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def blocks(model) -> list:
    """The transformer's blocks, as transformers names their class; none of a model that has no such name."""
    names = getattr(model, "_no_split_modules", None) or []
    return [module for module in model.modules() if type(module).__name__ in names]


def parts(model) -> list:
    """The modules that hold a group of sharded weights."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def whole(model):
    """Within it every process has all weights, and forward passes are its own affair: for sampling. Collective at both ends."""
    for part in parts(model):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts(model):
            part.set_reshard_after_forward(reshard_after_forward(part, model), recurse=False)
            part.reshard()
        # Without this FSDP records each forward pass until the next backward pass.
        root = parts(model) and model._get_fsdp_state()._is_root
        if root and hasattr(model, "reset_iter_state"):  # older versions of torch lack it
            model.reset_iter_state()


def reshard_after_forward(part, model) -> bool:
    """Whether a part's weights go after a forward pass. The root's stay for the backward pass that follows, if one does."""
    return part is not model or not any(weights.requires_grad for weights in model.parameters())


def plain(tensor):
    """The whole of a tensor that may be sharded. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    """This process's rows of a tensor that may be sharded, without copying them."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor, rows):
    """Rows of this process as a tensor that is sharded as `tensor` is, if it is."""
    made = torch.zeros_like(tensor)
    local(made).copy_(rows)
    return made


def own_chunk(tensor):
    """The rows that FSDP gives this process of a whole tensor."""
    chunks = tensor.chunk(size())
    return chunks[rank()] if rank() < len(chunks) else tensor[:0]


def whole_state(module, trained_only=False) -> dict:
    """The module's state on the CPU of the first process, {} elsewhere; weights that are one stay one. Collective."""
    left_out = {
        name
        for name, weights in module.named_parameters()
        if trained_only and not weights.requires_grad
    }
    state, seen = {}, {}
    for name, tensor in module.state_dict().items():
        if name in left_out:
            continue
        key, value = local(tensor).data_ptr(), plain(tensor)
        if rank() == 0 and key not in seen:
            seen[key] = value.cpu()
        if rank() == 0:
            state[name] = seen[key]
    return state
