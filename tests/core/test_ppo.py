"""Advantages, whitening and KL, by identity, enumeration and brute force from the definitions.

In double precision unless it is the point. test_losses.py uses the helpers as well.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from t2g.ppo import AdaptiveKL, gae, kl_penalty, masked_mean, masked_variance, whiten

seeds = st.integers(0, 2**32 - 1)
rates = st.floats(0, 1)


def noise(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@st.composite
def masks(draw, min_tokens=0):
    """(B, T) bool, a prefix of each row; rows without any token too."""
    T = draw(st.integers(1, 7))
    several = st.lists(st.integers(0, T), min_size=1, max_size=4)
    lengths = draw(several.filter(lambda lengths: sum(lengths) >= min_tokens))
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


def every(x):
    """The mask that lets all of x count."""
    return torch.ones_like(x, dtype=torch.bool)


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


# ---- advantages ------------------------------------------------------------------------------
@given(masks(), seeds, rates, rates)
def test_gae_is_the_double_sum_of_its_definition(mask, seed, gamma, lam):
    """A_t = sum_l (gamma lam)^l TD_{t+l}, with TD = r + gamma V' - V, one term after the other."""
    rewards, values = noise(seed, 2, *mask.shape)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b, n in enumerate(mask.sum(1).tolist()):
        r, v = rewards[b].tolist(), [*values[b, :n].tolist(), 0.0]
        td = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum((gamma * lam) ** (s - t) * td[s] for s in range(t, n))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-9)
            assert returns[b, t].item() == pytest.approx(expected + v[t], abs=1e-9)
        assert not advantages[b, n:].any() and not returns[b, n:].any()


@given(masks(), seeds, rates, rates, st.sampled_from([1e30, math.inf, math.nan]))
def test_gae_is_blind_to_what_stands_in_padding(mask, seed, gamma, lam, junk):
    rewards, values = noise(seed, 2, *mask.shape)
    clean = gae(rewards, values, mask, gamma, lam)
    spoilt = rewards.masked_fill(~mask, junk), values.masked_fill(~mask, -junk)
    assert all(map(torch.equal, clean, gae(*spoilt, mask, gamma, lam)))


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_a_batch_without_rows_or_columns_keeps_its_shape(shape):
    x = torch.zeros(shape)
    advantages, returns = gae(x, x, x.bool(), 1.0, 0.95)
    assert advantages.shape == returns.shape == shape


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (1, 3), (2, 3, 1)])
def test_different_shapes_are_refused(which, shape):
    """(1, 3) too, which could be broadcast."""
    shapes = [(2, 3)] * 3
    shapes[which] = shape
    rewards, values, mask = (torch.ones(s) for s in shapes)
    with pytest.raises(ValueError, match="shapes differ"):
        gae(rewards, values, mask.bool(), 1.0, 0.95)


@pytest.mark.parametrize("holes", [[0, 1, 1], [1, 0, 1], [0, 0, 1], [0, 1, 0]])
def test_a_mask_that_is_no_prefix_is_refused(holes):
    mask = torch.tensor([[1, 1, 0], holes]).bool()
    with pytest.raises(ValueError, match="prefix"):
        gae(torch.ones(2, 3), torch.ones(2, 3), mask, 1.0, 0.95)


# ---- whitening -------------------------------------------------------------------------------
@given(masks(min_tokens=2), seeds, st.floats(0.01, 100), st.floats(-100, 100))
def test_whitened_values_have_mean_zero_and_variance_one(mask, seed, scale, shift):
    steps = 10 * torch.arange(mask.numel()).view(mask.shape)  # x is never nearly constant
    x = noise(seed, *mask.shape) + steps
    white = whiten(scale * x + shift, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].var(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert not white[~mask].any()
    assert_close(white, whiten(x, mask), atol=1e-4, rtol=0)


@given(masks(min_tokens=1), seeds, st.sampled_from([-1e6, 3.0, math.inf, math.nan]))
def test_statistics_are_blind_to_what_stands_in_padding(mask, seed, junk):
    x = noise(seed, *mask.shape)
    dirty = x.masked_fill(~mask, junk)
    assert_close(whiten(dirty, mask), whiten(x, mask))
    assert_close(masked_mean(dirty, mask), x[mask].mean())
    assert_close(masked_variance(dirty, mask), x[mask].var(correction=0))


@given(masks(), st.floats(-1, 1, width=32))
def test_a_constant_becomes_zero(mask, value):
    """In single precision, and for rewards in their range."""
    assert whiten(torch.full(mask.shape, value), mask).abs().max() <= 1e-2


def test_without_any_token_all_is_zero():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert not whiten(torch.ones(2, 3), nothing).any()
    assert masked_mean(torch.ones(2, 3), nothing) == 0


# ---- KL --------------------------------------------------------------------------------------
def two_policies(seed, requires_grad=False, spread=1.0):
    """Log-softmaxes over a vocabulary of five tokens at two places: pi and pi_ref."""
    logits = (spread * noise(seed, 2, 1, 2, 5)).requires_grad_(requires_grad)
    return logits[0].log_softmax(-1), logits[1].log_softmax(-1).detach(), logits


def each_token(logprobs, ref_logprobs, kind):
    """The estimate that each token of the vocabulary would give if it were the sampled one."""
    pairs = zip(logprobs.unbind(-1), ref_logprobs.unbind(-1))
    return torch.stack([kl_penalty(*pair, kind) for pair in pairs], dim=-1)


@given(seeds, st.floats(0.01, 30))
def test_full_kl_is_the_kl_divergence(seed, spread):
    logprobs, ref_logprobs, _ = two_policies(seed, spread=spread)
    pair = (torch.distributions.Categorical(logits=x) for x in (logprobs, ref_logprobs))
    expected = torch.distributions.kl_divergence(*pair)
    assert_close(kl_penalty(logprobs, ref_logprobs, "full"), expected)


@given(seeds, st.sampled_from(["k1", "k3"]))
def test_k1_and_k3_are_unbiased(seed, kind):
    logprobs, ref_logprobs, _ = two_policies(seed)
    expectation = (logprobs.exp() * each_token(logprobs, ref_logprobs, kind)).sum(-1)
    assert_close(expectation, kl_penalty(logprobs, ref_logprobs, "full"))


@given(seeds)
def test_k2_has_the_gradient_of_the_kl_and_k1_has_none(seed):
    """The expectation, over tokens drawn from pi, of the gradient of the estimate."""
    logprobs, ref_logprobs, logits = two_policies(seed, requires_grad=True)
    of_kl = gradient(kl_penalty(logprobs, ref_logprobs, "full").sum(), logits)
    probabilities = logprobs.exp().detach()
    for kind, expected in (("k2", of_kl), ("k1", torch.zeros_like(of_kl))):
        estimates = each_token(logits[0].log_softmax(-1), ref_logprobs, kind)
        assert_close(gradient((probabilities * estimates).sum(), logits), expected)


@given(seeds)
def test_k2_k3_abs_and_full_are_never_negative_and_abs_is_the_size_of_k1(seed):
    logprobs, ref_logprobs, _ = two_policies(seed)
    for kind in ("k2", "k3", "abs"):
        assert (each_token(logprobs, ref_logprobs, kind) >= 0).all()
    assert (kl_penalty(logprobs, ref_logprobs, "full") >= 0).all()
    k1, size = each_token(logprobs, ref_logprobs, "k1"), each_token(logprobs, ref_logprobs, "abs")
    assert torch.equal(torch.maximum(k1, -k1), size)
    assert (k1 > 0).any() and (k1 < 0).any()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs", "full"])
def test_a_policy_has_no_kl_from_itself(kind):
    logprobs, _, _ = two_policies(0)
    assert not kl_penalty(logprobs, logprobs, kind).any()


def test_k3_is_exact_where_policies_almost_agree():
    """In single precision pi_ref / pi - 1 loses all of its digits; the estimate must not."""
    step = torch.tensor([[1e-4]])
    assert_close(kl_penalty(step, torch.zeros_like(step), "k3"), step**2 / 2, rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", ["", "k4", "K1", "kl", None])
def test_an_unknown_estimator_is_refused(kind):
    with pytest.raises(ValueError, match="unknown KL estimator"):
        kl_penalty(torch.zeros(1, 1), torch.zeros(1, 1), kind)


# ---- the KL coefficient ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (1e9, 1.02), (math.inf, 1.02), (0.0, 0.98)],
)
def test_a_tenth_of_the_horizon_moves_it_by_a_tenth_of_the_error(kl, factor):
    """The error is relative to the target, and a fifth at most."""
    steered = AdaptiveKL(0.5, target=6.0, horizon=1000)
    steered.update(kl, 100)
    assert steered.value == pytest.approx(0.5 * factor)
    usual = AdaptiveKL(0.5, target=6.0)  # has a horizon of 10000
    usual.update(kl, 1000)
    assert usual.value == pytest.approx(steered.value)


def test_without_a_target_the_coefficient_stays():
    fixed = AdaptiveKL(0.05)
    fixed.update(1e6, 1000)
    assert fixed.value == 0.05
