"""The maths of PPO beside trl 0.11.3, the last version with the classic PPO, on the same inputs.

make_trl_outputs.py wrote the inputs and trl's outputs. Where the two differ on purpose, the test
says how.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from t2g.ppo import gae, kl_penalty, masked_mean, masked_variance, policy_loss, value_loss, whiten

TRL = load_file(Path(__file__).with_name("trl_outputs.safetensors"))


def same(ours, theirs):
    assert_close(ours, theirs, atol=1e-6, rtol=1e-6, check_dtype=False)


@pytest.fixture(params=range(len(TRL["mask"])))
def case(request):
    """One of the cases: the inputs and trl's outputs."""
    per_case = {name: x[request.param] for name, x in TRL.items() if len(x) == len(TRL["mask"])}
    return SimpleNamespace(**per_case)


def whiten_by_n_minus_1(x, mask):
    """Returns whiten() with trl's variance. The factor before keeps the 1e-8 in it the same."""
    n = mask.sum()
    factor = (n / (n - 1)).sqrt()
    return whiten(factor * x, mask) / factor


def test_statistics_differ_by_n_minus_1_only(case):
    x, mask, n = case.noise[0], case.mask, case.mask.sum()
    same(masked_mean(x, mask), case.mean)
    same(masked_variance(x, mask), case.variance)
    same(masked_variance(x, mask) * n / (n - 1), case.variance_unbiased)
    same(whiten_by_n_minus_1(x, mask), case.whitened)


def test_advantages_and_returns(case):
    values, rewards = case.noise[:2]
    gamma, lam = case.rates[:2].tolist()
    advantages, returns = gae(rewards, values, case.mask, gamma, lam)
    same(returns, case.gae_returns)
    same(whiten_by_n_minus_1(advantages, case.mask), case.gae_whitened)


def test_policy_loss_gradient_and_clip_fraction(case):
    """approx_kl is k3 here and k2 in trl; k3 is k1 plus the mean ratio minus 1."""
    logprobs, old_logprobs, advantages = case.noise[:3].clone()
    logprobs.requires_grad_()
    loss, stats = policy_loss(logprobs, old_logprobs, advantages, case.mask, case.rates[2])
    same(loss, case.policy_loss)
    same(torch.autograd.grad(loss, logprobs)[0], case.policy_gradient)
    same(stats["clipfrac"], case.clipfrac)
    same(masked_mean(kl_penalty(old_logprobs, logprobs, "k2"), case.mask), case.approx_k2)
    same(stats["approx_kl"], case.approx_k1 + case.mean_ratio - 1)


def test_value_loss_gradient_and_clip_fraction(case):
    """trl's loss includes its coefficient, which is applied in train_ppo.py here."""
    values, old_values, returns = case.noise[3:].clone()
    values.requires_grad_()
    loss, stats = value_loss(values, old_values, returns, case.mask, cliprange_value=case.rates[3])
    loss = case.rates[4] * loss
    same(loss, case.value_loss)
    same(torch.autograd.grad(loss, values)[0], case.value_gradient)
    same(stats["value_clipfrac"], case.value_clipfrac)


@pytest.mark.parametrize("kind", ["k1", "k2", "abs", "full"])
def test_kl_estimators(kind):
    """In value and in sign. trl has no k3."""
    policies = TRL["policies"] if kind == "full" else TRL["policies"][..., 0]
    same(kl_penalty(*policies, kind), TRL[f"kl_{kind}"])


def test_two_differences_on_purpose():
    """trl scales up the rounding error of a constant, and drops a minibatch with wild ratios."""
    constant = torch.full((1, 7), 1000.1)
    assert TRL["constant_whitened"].abs().max() > 0.1
    assert not whiten(constant, constant > 0).any()
    old, new = torch.zeros(1, 2), torch.full((1, 2), 3.0)
    assert not TRL["wild_ratio_losses"].any()
    assert policy_loss(new, old, new, new > 0, 0.2)[0] < 0
