"""What makes a CPU fast: matrix products through oneDNN, and freed memory that is kept. What each gives: docs/RESULTS.md.

oneDNN uses AVX-512 wherever a CPU has it, torch's own fp32 products do so on Intel alone. Under autocast products are in bf16 and
all between them stays in fp32, attention as well, whose bf16 kernel is the slower one. Left out: GPUs, CPUs without AVX-512.
"""

import ctypes
import os
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def use(model):
    """The same model; where it pays, its linear layers take products from oneDNN."""
    if not pays():
        return model
    keep_freed_memory()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == "sdpa":
        AttentionInterface.register("sdpa_fp32", attention)
        AttentionMaskInterface.register("sdpa_fp32", sdpa_mask)
        model.set_attn_implementation("sdpa_fp32")
    return model


def pays() -> bool:
    return (
        torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def keep_freed_memory():
    """glibc gives large blocks back to the system when they are freed, and each page that is asked for again costs a fault: not so
    from here on. Its own variables, such as MALLOC_MMAP_THRESHOLD_=262144 for the least memory, go before."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and not any(name.startswith("MALLOC_") for name in os.environ):
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            libc.mallopt(option, 2**31 - 1)


def product(x, weight, bias=None):
    """x W^T + b in fp32, the sums of products in the weight's dtype. torch takes bf16 from oneDNN by itself, strides and all."""
    x = x.to(weight.dtype)
    if weight.dtype == torch.float32 or weight.is_mkldnn:
        y = torch.ops.mkldnn._linear_pointwise(
            x, weight, None, "none", [], ""
        ).float()  # not every torch has it
    else:
        y = F.linear(x, weight).float()
    return y if bias is None else y.add_(bias)


def precision() -> torch.dtype:
    """Of products: autocast's, fp32 without it."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


class Linear(nn.Linear):
    packed = None

    def forward(self, x):
        elsewhere = x.dtype != torch.float32 or x.device.type != "cpu"
        if (
            elsewhere or not x.numel()
        ):  # oneDNN knows no product of no rows, such as those of an expert that got no token
            return F.linear(x, self.weight, self.bias)
        if self.packed is not None:
            return product(x, self.packed, self.bias)
        return Product.apply(x, self.weight, self.bias, precision())


class Product(torch.autograd.Function):
    """y = x W^T + b, for x (..., K), W (N, K), b (N,) or None, all in fp32; the products themselves in dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        x, weight = x.to(dtype), weight.to(dtype)
        of_x, of_weight, *_ = ctx.needs_input_grad
        ctx.dtype = dtype
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        grad = grad.to(ctx.dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        of_x = None if weight is None else product(grad, weight.t())
        of_weight = None if x is None else product(rows.t(), x.reshape(-1, x.shape[-1]).t())
        return of_x, of_weight, of_bias, None


@contextmanager
def packed(model):
    """Within it weights also lie as products of a few rows read them fastest. For sampling, where no weight changes."""
    layers = [
        module
        for module in model.modules()
        if type(module) is Linear and module.weight.device.type == "cpu"
    ]
    for layer in layers:
        layer.packed = torch.ops.mkldnn._reorder_linear_weight(
            layer.weight.detach().to(precision())
        )
    try:
        yield
    finally:
        for layer in layers:
            del layer.packed


def attention(*args, **kwargs):
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(*args, **kwargs)
