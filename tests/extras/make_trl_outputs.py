"""Writes trl_outputs.safetensors: random inputs, and what trl 0.11.3 computes from them.

trl 0.11 is the last version with the classic PPO. It needs an environment of its own:

python3.11 -m venv /tmp/peer && /tmp/peer/bin/pip install -r extras/speed/requirements-peer.txt
/tmp/peer/bin/python tests/extras/make_trl_outputs.py
"""

import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from trl import PPOConfig, PPOTrainer, core

CASES, B, T, V = 32, 4, 7, 5
KL_KINDS = {"k1": "kl", "k2": "mse", "abs": "abs", "full": "full"}  # our name: trl's


def trainer(**config):
    """Returns all that trl's methods read of a trainer."""
    return SimpleNamespace(config=PPOConfig(**{"ratio_threshold": math.inf, **config}))


def losses(policy, value, mask, **config):
    """Returns trl's policy loss, value loss and stats.

    policy is (logprobs, old_logprobs, advantages), value is (values, old_values, returns). The
    logits give trl's entropy alone, which is not compared.
    """
    logprobs, old_logprobs, advantages = policy
    values, old_values, returns = value
    logits = torch.zeros(*mask.shape, 2)
    tensors = old_logprobs, old_values, logits, values, logprobs, mask, advantages, returns
    return PPOTrainer.loss(trainer(**config), *tensors)


def statistics_and_gae(x, rewards, mask, rates):
    gamma, lam = rates[:2].tolist()
    advantages = PPOTrainer.compute_advantages(trainer(gamma=gamma, lam=lam), x, rewards, mask)
    return {
        "mean": core.masked_mean(x, mask),
        "variance": core.masked_var(x, mask, unbiased=False),
        "variance_unbiased": core.masked_var(x, mask),
        "whitened": core.masked_whiten(x, mask) * mask,
        "gae_whitened": advantages[1] * mask,
        "gae_returns": advantages[2],
    }


def losses_and_gradients(policy, value, mask, rates):
    config = dict(zip(("cliprange", "cliprange_value", "vf_coef"), rates[2:].tolist()))
    policy[0].requires_grad_(), value[0].requires_grad_()
    policy_loss, value_loss, stats = losses(policy, value, mask, **config)
    return {
        "policy_loss": policy_loss,
        "policy_gradient": torch.autograd.grad(policy_loss, policy[0])[0],
        "clipfrac": torch.as_tensor(stats["policy/clipfrac"]),
        "approx_k2": torch.as_tensor(stats["policy/approxkl"]),
        "approx_k1": torch.as_tensor(stats["policy/policykl"]),
        "mean_ratio": core.masked_mean(stats["policy/ratio"], mask),
        "value_loss": value_loss,
        "value_gradient": torch.autograd.grad(value_loss, value[0])[0],
        "value_clipfrac": torch.as_tensor(stats["val/clipfrac"]),
    }


def make():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, T + 1, (CASES, B), generator=generator)
    lengths[:, 0].clamp_(min=2)  # trl's variance divides by n - 1
    mask = torch.arange(T) < lengths[..., None]
    noise = torch.randn(CASES, 6, B, T, generator=generator, dtype=torch.float64)
    rates = torch.rand(CASES, 5, generator=generator, dtype=torch.float64)
    outputs = {"mask": mask, "noise": noise, "rates": rates}
    cases = []
    for tensors, m, rate in zip(noise.clone(), mask, rates):
        parts = list(tensors[:3].clone()), list(tensors[3:].clone())
        cases.append(statistics_and_gae(tensors[0], tensors[1], m, rate))
        cases[-1] |= losses_and_gradients(*parts, m, rate)
    for name in cases[0]:
        outputs[name] = torch.stack([case[name].detach() for case in cases])

    policies = torch.randn(2, B, T, V, generator=generator, dtype=torch.float64).log_softmax(-1)
    outputs["policies"] = policies
    for kind, theirs in KL_KINDS.items():
        ours = policies if kind == "full" else policies[..., 0]
        outputs[f"kl_{kind}"] = PPOTrainer._kl_penalty(trainer(kl_penalty=theirs), *ours)

    # Two inputs where the project differs from trl on purpose.
    constant = torch.full((1, 7), 1000.1)
    outputs["constant_whitened"] = core.masked_whiten(constant, constant > 0)
    old, new = torch.zeros(1, 2), torch.full((1, 2), 3.0)
    wild = losses((new, old, new), (new, old, old), new > 0, ratio_threshold=10.0)
    outputs["wild_ratio_losses"] = torch.stack(wild[:2])
    return outputs


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    path = Path(__file__).with_name("trl_outputs.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in make().items()}, path)
    print(f"{path}: {path.stat().st_size} bytes")
