"""The losses of policy and value, by identity and brute force, in double precision."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_ppo import every, gradient, masks, noise, row, seeds
from torch.testing import assert_close

from t2g.ppo import policy_loss, value_loss

# ---- the policy's loss -----------------------------------------------------------------------

EPS = 0.2


@given(masks(), seeds)
def test_at_ratio_one_the_gradient_is_minus_the_advantage_over_the_count(mask, seed):
    old, advantages = noise(seed, 2, *mask.shape) * mask
    logprobs = old.clone().requires_grad_()
    loss, stats = policy_loss(logprobs, old, advantages, mask, EPS)
    count = max(int(mask.sum()), 1)
    assert_close(gradient(loss, logprobs), -advantages / count)
    assert_close(loss.detach(), -advantages.sum() / count)
    assert stats["approx_kl"] == 0 and stats["clipfrac"] == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "binds"),
    [
        (1.3, 2.0, True),
        (0.7, -2.0, True),
        (1.3, -2.0, False),
        (0.7, 2.0, False),
        (1.1, 2.0, False),
        (0.9, -2.0, False),
    ],
)
def test_the_clip_binds_only_where_it_lowers_the_gain(ratio, advantage, binds):
    """Where it binds there is no gradient, and the ratio counts as its bound."""
    logprobs = row(math.log(ratio)).requires_grad_()
    loss, stats = policy_loss(logprobs, row(0.0), row(advantage), every(logprobs), EPS)
    bound = 1 + EPS if ratio > 1 else 1 - EPS
    assert loss.item() == pytest.approx(-advantage * (bound if binds else ratio))
    assert gradient(loss, logprobs).item() == pytest.approx(0 if binds else -advantage * ratio)
    assert stats["clipfrac"] == binds


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_the_clip_fraction_is_a_share_of_the_tokens_that_count(loss):
    """Both clips bind on the first of four tokens, and on a fifth that is off the mask."""
    new, old = row(1.0, 0.0, 0.0, 0.0, 1.0), row(0.0, 0.0, 0.0, 0.0, 0.0)
    mask = torch.tensor([[True, True, True, True, False]])
    (share,) = [
        value
        for name, value in loss(new, old, row(9.0, 9.0, 9.0, 9.0, 9.0), mask, EPS)[1].items()
        if "clipfrac" in name
    ]
    assert share == 0.25


@given(masks(), seeds)
def test_the_clip_is_pessimistic_and_a_wide_one_is_none(mask, seed):
    old, advantages, step = noise(seed, 3, *mask.shape)
    losses = [
        policy_loss(old + step, old, advantages, mask, eps)[0].item()
        for eps in (0.05, 0.2, 0.5, 1e9)
    ]
    assert losses == sorted(losses, reverse=True)
    gain = sum(a * math.exp(s) for a, s in zip(advantages[mask].tolist(), step[mask].tolist()))
    assert losses[-1] == pytest.approx(-gain / max(int(mask.sum()), 1))


@given(masks(), seeds, st.sampled_from([1e4, -1e4, math.inf, math.nan]))
def test_what_stands_in_padding_moves_neither_policy_loss_nor_gradient(mask, seed, junk):
    old, advantages, step = noise(seed, 3, *mask.shape)
    results = []
    for fill in (0.0, junk):
        logprobs = (old + step).masked_fill(~mask, fill).requires_grad_()
        loss, stats = policy_loss(
            logprobs, old.masked_fill(~mask, 2.0), advantages.masked_fill(~mask, 3.0), mask, EPS
        )
        results.append((loss.detach(), *stats.values(), gradient(loss, logprobs)))
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*results))
    assert not results[1][-1][~mask].any()


def test_approx_kl_is_the_kl_of_the_old_policy_from_the_new_one():
    """Exactly, for a uniform old policy and each token of the vocabulary sampled once."""
    new = noise(1, 1, 6).log_softmax(-1)
    old = torch.full_like(new, -math.log(6))
    _, stats = policy_loss(new, old, torch.zeros_like(new), every(new), EPS)
    assert_close(stats["approx_kl"], (old.exp() * (old - new)).sum())


def losses_of(name, logprobs, old, target, mask, count=None):
    if name == "policy":
        return policy_loss(logprobs, old, target, mask, EPS, count)
    return value_loss(logprobs, old, target, mask, EPS, count)


@pytest.mark.parametrize("name", ["policy", "value"])
@given(mask=masks(), seed=seeds, data=st.data())
def test_no_split_into_microbatches_changes_the_step(name, mask, seed, data):
    old, target, step = noise(seed, 3, *mask.shape)
    now = (old + step).requires_grad_()
    loss, stats = losses_of(name, now, old, target, mask)
    part_of_row = torch.tensor(
        data.draw(st.lists(st.integers(0, 2), min_size=len(mask), max_size=len(mask)))
    )
    count = mask.sum().clamp(min=1)
    summed_loss, summed_gradient, summed_stats = (
        0.0,
        torch.zeros_like(now),
        dict.fromkeys(stats, 0.0),
    )
    for part in (0, 1, 2):
        rows = part_of_row == part
        part_loss, part_stats = losses_of(
            name, now[rows], old[rows], target[rows], mask[rows], count
        )
        summed_loss += part_loss.detach()
        summed_gradient += gradient(part_loss, now)
        summed_stats = {key: summed_stats[key] + part_stats[key] for key in stats}
    assert_close(summed_loss, loss.detach())
    assert_close(summed_gradient, gradient(loss, now))
    for key in stats:
        assert_close(torch.as_tensor(summed_stats[key]), stats[key], check_dtype=False)
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize("name", ["policy", "value"])
def test_a_minibatch_without_tokens_has_no_loss(name):
    x = torch.ones(2, 3)
    loss, stats = losses_of(name, x, x + 1, x, torch.zeros(2, 3, dtype=torch.bool))
    assert loss == 0 and not any(stats.values())


# ---- the value's loss ------------------------------------------------------------------------


@given(masks(), seeds)
def test_at_the_old_values_the_gradient_is_the_error_over_the_count(mask, seed):
    old, returns = noise(seed, 2, *mask.shape) * mask
    values = old.clone().requires_grad_()
    loss, stats = value_loss(values, old, returns, mask, EPS)
    count = max(int(mask.sum()), 1)
    assert_close(gradient(loss, values), (values - returns).detach() / count)
    assert_close(loss.detach() * 2 * count, (values - returns).detach().square().sum())
    assert stats["value_clipfrac"] == 0


@pytest.mark.parametrize(
    ("value", "target", "counts_as"),
    [
        (1.0, 2.0, 0.2),
        (-1.0, -2.0, -0.2),
        (1.0, -2.0, 1.0),
        (-1.0, 2.0, -1.0),
        (0.1, 2.0, 0.1),
        (-0.1, -2.0, -0.1),
        (1.0, 0.1, 1.0),
    ],
)
def test_a_value_that_runs_ahead_of_its_bound_counts_as_the_bound(value, target, counts_as):
    """Old value 0: a step towards the return pays up to the bound; a wrong step counts in full."""
    values = row(value).requires_grad_()
    loss, stats = value_loss(values, row(0.0), row(target), every(values), EPS)
    assert loss.item() == pytest.approx((counts_as - target) ** 2 / 2)
    assert gradient(loss, values).item() == pytest.approx(
        value - target if counts_as == value else 0
    )
    assert stats["value_clipfrac"] == (counts_as != value)


@given(masks(), seeds)
def test_the_value_clip_is_pessimistic_and_a_wide_one_is_none(mask, seed):
    old, returns, step = noise(seed, 3, *mask.shape)
    losses = [value_loss(old + step, old, returns, mask, eps)[0].item() for eps in (0.5, 1e9)]
    assert losses[0] >= losses[1]
    errors = (old + step - returns)[mask].tolist()
    assert losses[1] == pytest.approx(sum(e * e for e in errors) / 2 / max(len(errors), 1))


@given(masks(), seeds, st.sampled_from([1e4, -1e4]))
def test_what_stands_in_padding_moves_neither_value_loss_nor_gradient(mask, seed, junk):
    old, returns, step = noise(seed, 3, *mask.shape)
    results = []
    for fill in (0.0, junk):
        values = (old + step).masked_fill(~mask, fill).requires_grad_()
        loss, stats = value_loss(
            values, old.masked_fill(~mask, -fill), returns.masked_fill(~mask, fill / 2), mask, EPS
        )
        results.append((loss.detach(), *stats.values(), gradient(loss, values)))
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*results))
    assert not results[1][-1][~mask].any()
