"""fp32 matrix products on CPUs through oneDNN: it uses AVX-512 wherever a CPU has it, torch's own products do so on Intel alone.

On an AMD CPU products are done in half the time (docs/RESULTS.md). Left out: bf16, where torch takes oneDNN by itself.
"""

import torch
from torch import nn
from torch.nn import functional as F


def use(model):
    """The same model; where it pays, its linear layers take products from oneDNN."""
    for module in model.modules() if pays() else ():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return model


def pays() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(x, weight, bias=None):
    """x W^T + b, by what torch.compile calls for a linear layer on a CPU. Looked up when it is wanted: not every torch has it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Linear(nn.Linear):
    def forward(self, x):
        elsewhere = x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
        if elsewhere or not x.numel():  # oneDNN knows no product of no rows, such as those of an expert that got no token
            return F.linear(x, self.weight, self.bias)
        return Product.apply(x, self.weight, self.bias)


class Product(torch.autograd.Function):
    """y = x W^T + b, for x (..., K), W (N, K), b (N,) or None."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, of_bias = grad.reshape(-1, grad.shape[-1]), ctx.needs_input_grad[2]
        of_x = None if weight is None else product(grad, weight.t())
        of_weight = None if x is None else product(rows.t(), x.reshape(-1, x.shape[-1]).t())
        return of_x, of_weight, rows.sum(0) if of_bias else None
