"""Speeds up a CPU: freed memory is kept and, with AVX-512, oneDNN multiplies the matrices.

torch's own fp32 products use AVX-512 on Intel alone; oneDNN's use it wherever a CPU has it. Under
autocast only products are in bf16, because bf16 attention is slower. CPUs without AVX-512 keep
torch's own products, and nothing here changes a computer with a GPU.
"""

import ctypes
import os
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def use(model):
    """Speeds up a model on a computer without a GPU, in place, and returns it.

    The process keeps freed memory if memory is ample; with AVX-512, linear layers use oneDNN.
    """
    if torch.cuda.is_available():
        return model
    keep_freed_memory()
    if not is_faster():
        return model
    if sum(weight.numel() for weight in model.parameters()) > 5e7:
        limit_caches()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    if isinstance(model, PreTrainedModel) and model.config._attn_implementation == "sdpa":
        AttentionInterface.register("sdpa_fp32", attention)
        AttentionMaskInterface.register("sdpa_fp32", sdpa_mask)
        model.set_attn_implementation("sdpa_fp32")
    return model


def is_faster() -> bool:
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_avx512 and torch.backends.mkldnn.is_available()


def emulates_bf16() -> bool:
    """True on a CPU without AVX-512, whose bf16 products are many times slower than fp32."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def keep_freed_memory():
    """Stops glibc from returning freed pages to the system, because each costs a page fault again.

    The process then takes up to 2 GiB more, so that computers below 12 GiB keep glibc's way. A
    MALLOC_ variable of the user's, such as MALLOC_MMAP_THRESHOLD_=262144, takes precedence.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    if memory_gib() >= 12:
        for option in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
            libc.mallopt(option, 2**31 - 1)


def memory_gib() -> float:
    """The memory of this computer, used or not."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def limit_caches():
    """Keeps few of the products that oneDNN compiles for each shape; 1024 take up to 2 GiB.

    Both oneDNN and PyTorch cache them, and read their limits at the first product. Small models
    need no limit: their few shapes come again in every step.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


def attention(*args, **kwargs):
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(*args, **kwargs)


def product_dtype() -> torch.dtype:
    enabled = torch.is_autocast_enabled("cpu")
    return torch.get_autocast_dtype("cpu") if enabled else torch.float32


def product(x, weight, bias=None):
    """x W^T + b in fp32, with the product in the weight's dtype."""
    x = x.to(weight.dtype)
    if weight.dtype == torch.float32 or weight.is_mkldnn:
        y = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "").float()
    else:  # torch's own bf16 products use oneDNN
        y = F.linear(x, weight).float()
    return y if bias is None else y.add_(bias)


class Linear(nn.Linear):
    packed = None

    def forward(self, x):
        # oneDNN has no product of 0 rows.
        if x.dtype != torch.float32 or x.device.type != "cpu" or not x.numel():
            return F.linear(x, self.weight, self.bias)
        if self.packed is not None:
            return product(x, self.packed, self.bias)
        return Product.apply(x, self.weight, self.bias, product_dtype())


class Product(torch.autograd.Function):
    """y = x W^T + b for x (..., K), W (N, K), b (N,) or None in fp32; products in dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        x, ctx.dtype = x.to(dtype), dtype
        x_needs_grad, weight_needs_grad = ctx.needs_input_grad[:2]
        # backward() casts the weight again, because a copy of every weight would be large.
        ctx.save_for_backward(x if weight_needs_grad else None, weight if x_needs_grad else None)
        return product(x, weight.to(dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        bias_grad = rows.sum(0) if ctx.needs_input_grad[2] else None
        grad, rows = grad.to(ctx.dtype), rows.to(ctx.dtype)
        x_grad = None if weight is None else product(grad, weight.to(ctx.dtype).t())
        weight_grad = None if x is None else product(rows.t(), x.reshape(-1, x.shape[-1]).t())
        return x_grad, weight_grad, bias_grad, None


@contextmanager
def packed(model):
    """Also keeps the weights in the layout that is fastest for few rows; they must not change."""
    layers = [m for m in model.modules() if type(m) is Linear and m.weight.device.type == "cpu"]
    for layer in layers:
        weight = layer.weight.detach().to(product_dtype())
        layer.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    try:
        yield
    finally:
        for layer in layers:
            del layer.packed
