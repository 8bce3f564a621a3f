"""The losses of policy and value, by identity and brute force, in double precision."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_ppo import every, gradient, masks, noise, row, seeds
from torch.testing import assert_close

from t2g.ppo import policy_loss, value_loss

EPS = 0.2
BOTH = pytest.mark.parametrize("loss_of", [policy_loss, value_loss])


RATIOS = [
    (1.3, 2.0, True), (0.7, -2.0, True),
    (1.3, -2.0, False), (0.7, 2.0, False), (1.1, 2.0, False), (0.9, -2.0, False),
]  # fmt: skip
VALUES = [
    (1.0, 2.0, 0.2), (-1.0, -2.0, -0.2), (1.0, -2.0, 1.0), (-1.0, 2.0, -1.0),
    (0.1, 2.0, 0.1), (-0.1, -2.0, -0.1), (1.0, 0.1, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("ratio", "advantage", "binds"), RATIOS)
def test_the_clip_binds_only_where_it_lowers_the_gain(ratio, advantage, binds):
    """Where it binds there is no gradient, and the ratio counts as its bound."""
    logprobs = row(math.log(ratio)).requires_grad_()
    loss, stats = policy_loss(logprobs, row(0.0), row(advantage), every(logprobs), EPS)
    bound = 1 + EPS if ratio > 1 else 1 - EPS
    assert loss.item() == pytest.approx(-advantage * (bound if binds else ratio))
    assert gradient(loss, logprobs).item() == pytest.approx(0 if binds else -advantage * ratio)
    assert stats["clipfrac"] == binds


@pytest.mark.parametrize(("value", "target", "counts_as"), VALUES)
def test_a_value_that_runs_ahead_of_its_bound_counts_as_the_bound(value, target, counts_as):
    """Old value 0: a step towards the return pays up to the bound; a wrong step counts in full."""
    values = row(value).requires_grad_()
    loss, stats = value_loss(values, row(0.0), row(target), every(values), EPS)
    slope = value - target if counts_as == value else 0
    assert loss.item() == pytest.approx((counts_as - target) ** 2 / 2)
    assert gradient(loss, values).item() == pytest.approx(slope)
    assert stats["value_clipfrac"] == (counts_as != value)


@BOTH
def test_the_clip_fraction_is_a_share_of_the_tokens_that_count(loss_of):
    """Both clips bind on the first of four tokens, and on a fifth that is off the mask."""
    new, old = row(1.0, 0.0, 0.0, 0.0, 1.0), row(0.0, 0.0, 0.0, 0.0, 0.0)
    mask = torch.tensor([[True, True, True, True, False]])
    _, stats = loss_of(new, old, row(9.0, 9.0, 9.0, 9.0, 9.0), mask, EPS)
    assert [value for name, value in stats.items() if "clipfrac" in name] == [0.25]


@BOTH
@given(mask=masks(), seed=seeds)
def test_the_clip_is_pessimistic_and_a_wide_one_is_none(loss_of, mask, seed):
    old, target, step = noise(seed, 3, *mask.shape)
    losses = [loss_of(old + step, old, target, mask, eps)[0].item() for eps in (0.05, 0.5, 1e9)]
    assert losses == sorted(losses, reverse=True)
    if loss_of is policy_loss:
        terms = -target * step.exp()
    else:
        terms = (old + step - target) ** 2 / 2
    assert losses[-1] == pytest.approx(terms[mask].sum().item() / max(int(mask.sum()), 1))


@BOTH
@given(mask=masks(), seed=seeds, junk=st.sampled_from([1e4, -1e4, math.inf, math.nan]))
def test_what_stands_in_padding_moves_neither_loss_nor_gradient(loss_of, mask, seed, junk):
    old, target, step = noise(seed, 3, *mask.shape)
    results = []
    for fill in (0.0, junk):
        new = (old + step).masked_fill(~mask, fill).requires_grad_()
        others = [x.masked_fill(~mask, 2.0 if fill else 0.0) for x in (old, target)]
        loss, stats = loss_of(new, *others, mask, EPS)
        results.append((loss.detach(), *stats.values(), gradient(loss, new)))
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*results))
    assert not results[1][-1][~mask].any()


@BOTH
def test_a_minibatch_without_tokens_has_no_loss_and_statistics_have_no_gradient(loss_of):
    x = torch.ones(2, 3, requires_grad=True)
    loss, stats = loss_of(x, x + 1, x, torch.zeros(2, 3, dtype=torch.bool), EPS)
    assert loss == 0 and not any(stats.values())
    assert not any(value.requires_grad for value in stats.values())


def test_approx_kl_is_the_kl_of_the_old_policy_from_the_new_one():
    """Exactly, for a uniform old policy and each token of the vocabulary sampled once."""
    new = noise(1, 1, 6).log_softmax(-1)
    old = torch.full_like(new, -math.log(6))
    _, stats = policy_loss(new, old, torch.zeros_like(new), every(new), EPS)
    assert_close(stats["approx_kl"], (old.exp() * (old - new)).sum())
