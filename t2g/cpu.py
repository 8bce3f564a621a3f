"""Speed on a CPU: matrix products by oneDNN, packed weights for sampling, memory that is kept.

torch's own fp32 products use AVX-512 on Intel alone; oneDNN's use it wherever a CPU has it. Under
autocast products are in bf16 and everything else, attention included, stays in fp32, because bf16
attention is slower. docs/RESULTS.md has what each part gives. Left out: GPUs, and CPUs without
AVX-512, which keep torch's own path.
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
    """The same model, whose linear layers use oneDNN where the CPU has AVX-512."""
    if not is_faster():
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


def is_faster() -> bool:
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.backends.mkldnn.is_available() and has_avx512


def keep_freed_memory():
    """Stops glibc from returning freed pages to the system, for each costs a page fault again.

    A MALLOC_ variable of the user's, such as MALLOC_MMAP_THRESHOLD_=262144, takes precedence.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and not any(name.startswith("MALLOC_") for name in os.environ):
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            libc.mallopt(option, 2**31 - 1)


def product(x, weight, bias=None):
    """x W^T + b in fp32, with the products in the weight's dtype."""
    x = x.to(weight.dtype)
    if weight.dtype == torch.float32 or weight.is_mkldnn:
        y = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "").float()
    else:  # torch's own bf16 products use oneDNN
        y = F.linear(x, weight).float()
    return y if bias is None else y.add_(bias)


def precision() -> torch.dtype:
    """The dtype of products: autocast's, or fp32 without it."""
    enabled = torch.is_autocast_enabled("cpu")
    return torch.get_autocast_dtype("cpu") if enabled else torch.float32


class Linear(nn.Linear):
    packed = None

    def forward(self, x):
        on_other_path = x.dtype != torch.float32 or x.device.type != "cpu"
        if on_other_path or not x.numel():  # oneDNN has no product of 0 rows
            return F.linear(x, self.weight, self.bias)
        if self.packed is not None:
            return product(x, self.packed, self.bias)
        return Product.apply(x, self.weight, self.bias, precision())


class Product(torch.autograd.Function):
    """y = x W^T + b for x (..., K), W (N, K), b (N,) or None in fp32; products in dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        x, weight = x.to(dtype), weight.to(dtype)
        x_needs_grad, weight_needs_grad = ctx.needs_input_grad[:2]
        ctx.dtype = dtype
        saved = x if weight_needs_grad else None, weight if x_needs_grad else None
        ctx.save_for_backward(*saved)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        bias_grad = rows.sum(0) if ctx.needs_input_grad[2] else None
        grad, rows = grad.to(ctx.dtype), rows.to(ctx.dtype)
        x_grad = None if weight is None else product(grad, weight.t())
        weight_grad = None if x is None else product(rows.t(), x.reshape(-1, x.shape[-1]).t())
        return x_grad, weight_grad, bias_grad, None


@contextmanager
def packed(model):
    """Keeps the weights also in the layout that is fastest for a few rows; they must not change."""
    layers = [m for m in model.modules() if type(m) is Linear and m.weight.device.type == "cpu"]
    for layer in layers:
        weight = layer.weight.detach().to(precision())
        layer.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    try:
        yield
    finally:
        for layer in layers:
            del layer.packed


def attention(*args, **kwargs):
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(*args, **kwargs)
