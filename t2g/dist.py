"""Many processes as one: torchrun starts them, FSDP2 shards the models, all see the global batch.

One process takes the same path as many, with an unsharded model. Collective functions must be
called the same number of times on every rank.
"""

import os
from contextlib import contextmanager
from functools import partial

import torch
from torch import distributed
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from t2g import cpu
from t2g.loading import fill


def processes() -> int:
    """The number of processes that torchrun started; known before session()."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0)) if "WORLD_SIZE" in os.environ else 0


def batch_size(args) -> int:
    """The number of rows of an optimiser step; known before session()."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * processes()


def first_only():
    """Ends this process unless it is the first, which does alone what follows."""
    if rank():
        raise SystemExit


def size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def in_bf16(asked: bool) -> bool:
    """Whether products are in bf16: not on hardware that would emulate it, many times slower."""
    if device() == "cpu":
        return asked and not cpu.emulates_bf16()
    return asked and torch.cuda.is_bf16_supported(including_emulation=False)


def barrier():
    if size() > 1:
        distributed.barrier()


def total(x):
    """The sum of a tensor over all ranks. Collective."""
    if size() > 1:
        x = x.clone()
        distributed.all_reduce(x)
    return x


def totals(numbers: dict) -> dict:
    """The sums of numbers over all ranks, in double precision. Collective."""
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device())
    return dict(zip(numbers, total(values).tolist()))


def means(numbers: dict) -> dict:
    """The means of numbers over all ranks. Collective."""
    return {name: value / size() for name, value in totals(numbers).items()}


def gather(x):
    """The rows (B, T) of all ranks in order: (size B, longest T), padded with 0. Collective."""
    if size() == 1:
        return x
    longest = torch.tensor(x.shape[1], device=x.device)
    distributed.all_reduce(longest, distributed.ReduceOp.MAX)
    numbers = x.to(torch.uint8) if x.dtype == torch.bool else x
    mine = F.pad(numbers, (0, int(longest) - x.shape[1])).contiguous()
    rows = [torch.empty_like(mine) for _ in range(size())]
    distributed.all_gather(rows, mine)
    return torch.cat(rows).to(x.dtype)


def own(rows):
    """This rank's part of the rows that gather() returns, or of a list that all ranks have."""
    count = len(rows) // size()
    return rows[rank() * count : (rank() + 1) * count]


def share(rows: list) -> list:
    """Every size-th row of a list that all ranks have; repeats a few, so that each has as many."""
    count = -(-len(rows) // size())
    return [rows[(rank() + i * size()) % len(rows)] for i in range(count)]


def collect(rows: list, count: int) -> list:
    """The inverse of share(), on all ranks, for a list of count rows. Collective."""
    if size() == 1:
        return rows
    parts = [None] * size()
    distributed.all_gather_object(parts, rows)
    return [parts[i % size()][i // size()] for i in range(count)]


def add_flags(add):
    add("--gradient_checkpointing", False, "recompute activations in the backward pass")
    add("--cpu_offload", False, "keep weights and optimiser state in CPU memory; needs torchrun")


def shard(model, bf16=False, cpu_offload=False, recompute=False):
    """The model on this rank's device, its weights, gradients and optimiser state sharded by FSDP2.

    Gradients are *sums* over ranks, so a loss must be divided by the global token count. With
    recompute a block keeps only its input. Collective, as is every pass of the sharded model.
    """
    if recompute:
        recompute_blocks(model)
    if size() == 1 and not cpu_offload:
        return model.to(device())  # FSDP would only copy
    options = {"offload_policy": CPUOffloadPolicy()} if cpu_offload else {}
    if in_bf16(bf16):  # products in bf16; the optimiser's weights and the reduced gradients in fp32
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    for block in reversed(blocks(model)):  # inner blocks before those that contain them
        fully_shard(block, **options)
    fully_shard(model, **options)
    for part in parts(model):
        part.set_reshard_after_forward(reshard_after_forward(part, model), recurse=False)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        if hasattr(part, "set_reduce_scatter_unused_params"):  # torch 2.11 lacks it
            part.set_reduce_scatter_unused_params(True)  # an expert that got no token of this rank
    return fill(model, "cpu" if cpu_offload else device())


def frozen(model, args):
    """A model for inference alone: sharded too, or whole on each rank with --replicate_frozen."""
    if not (distributed.is_initialized() and (size() > 1 or args.cpu_offload)):
        return model.to(device())  # autocast caches bf16 copies only of weights that need gradients
    model.requires_grad_(False)
    if not args.replicate_frozen:
        return shard(model, args.bf16, args.cpu_offload)
    if in_bf16(args.bf16):  # buffers, such as of RoPE, stay in fp32
        for weights in model.parameters():
            weights.data = weights.data.to(torch.bfloat16)
    return fill(model, device()).to(device())


def recompute_blocks(model):
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def blocks(model) -> list:
    """The transformer's blocks, by the class names that transformers gives; [] if it gives none."""
    names = getattr(model, "_no_split_modules", None) or []
    return [module for module in model.modules() if type(module).__name__ in names]


def parts(model) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model):
    """Frees the whole weights that a forward pass may have left in place of the shards."""
    for part in parts(model):
        part.reshard()


@contextmanager
def whole(model):
    """All-gathers the weights, so that ranks generate independently. Collective on both ends."""
    for part in parts(model):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts(model):
            part.set_reshard_after_forward(reshard_after_forward(part, model), recurse=False)
            part.reshard()
        # Without this, FSDP keeps a note of every forward pass. torch 2.11 lacks it.
        root = parts(model) and model._get_fsdp_state()._is_root
        if root and hasattr(model, "reset_iter_state"):
            model.reset_iter_state()


def reshard_after_forward(part, model) -> bool:
    """Whether a group is freed after its forward pass. The root's stays for the backward pass."""
    trained = any(weights.requires_grad for weights in model.parameters())
    return part is not model or not trained


def plain(tensor):
    """The whole of a tensor that may be sharded. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    """This rank's rows of a tensor that may be sharded, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_chunk(tensor):
    """The rows that FSDP assigns to this rank of a whole tensor."""
    chunks = tensor.chunk(size())
    return chunks[rank()] if rank() < len(chunks) else tensor[:0]


def whole_state(module, trained_only=False) -> dict:
    """The module's state on the CPU of rank 0, {} elsewhere; tied weights stay one. Collective."""
    parameters = module.named_parameters()
    omitted = {name for name, p in parameters if trained_only and not p.requires_grad}
    state, seen = {}, {}
    for name, tensor in module.state_dict().items():
        if name in omitted:
            continue
        address, value = local(tensor).data_ptr(), plain(tensor)
        if rank() == 0:
            state[name] = seen.setdefault(address, value.cpu())
    return state
