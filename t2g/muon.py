"""Muon (Jordan et al., 2024), in the dtype of the weights: for matrices of models from scratch.

torch.optim.Muon computes in bf16, which a CPU without AVX-512 emulates: there a supervised step of
the toy takes four times as long with it. Updates are scaled as by its match_rms_adamw, so that
learning rates of AdamW carry over.
"""

import torch


class Muon(torch.optim.Optimizer):
    """Nesterov momentum M of the gradient G, made orthogonal; mu is the momentum.

    M <- mu M + (1 - mu) G
    W <- (1 - lr weight_decay) W - 0.2 lr sqrt(max(rows, columns)) orthogonal(mu M + (1 - mu) G)
    """

    def __init__(self, weights, lr, weight_decay, momentum=0.95):
        super().__init__(weights, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            momentum, lr = group["momentum"], group["lr"]
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)  # torch's name
                average = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                update = orthogonal(weight.grad.lerp(average, momentum))
                weight.mul_(1 - lr * group["weight_decay"])
                weight.add_(update, alpha=-0.2 * lr * max(weight.shape) ** 0.5)


def orthogonal(matrix, steps=5):
    """Moves the singular values of a matrix close to 1, to between 0.7 and 1.2, by Newton-Schulz:

    X <- a X + (b X X^T + c (X X^T)^2) X        from X = matrix / norm

    >>> values = torch.linalg.svdvals(orthogonal(torch.diag(torch.tensor([9.0, 2.0, 0.5]))))
    >>> [round(value, 1) for value in values.tolist()]
    [0.8, 0.7, 0.7]
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T
