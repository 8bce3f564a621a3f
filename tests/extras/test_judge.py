"""The maths of PPO before an independent judge: trl 0.11, the last with the classic PPO, gets the same inputs.

Where the two differ on purpose the test says in which relation they stand. It needs an environment of its own:

    python3.11 -m venv ../judge && ../judge/bin/pip install -r requirements-bench.txt
    ../judge/bin/python -m pytest tests/test_judge.py
"""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_ppo import gradient, masks, noise, rates, row, seeds, two_policies
from torch.testing import assert_close

from t2g.ppo import (
    AdaptiveKL,
    gae,
    kl_penalty,
    masked_mean,
    masked_variance,
    policy_loss,
    value_loss,
    whiten,
)

REASON = "the judge is trl 0.11, which wants an environment of its own: requirements-bench.txt"
trl = pytest.importorskip("trl", reason=REASON)
if trl.__version__.startswith("0.11."):
    from trl import PPOConfig, PPOTrainer, core
    from trl.trainer import AdaptiveKLController, FixedKLController
else:
    pytest.skip(f"{REASON} (here is trl {trl.__version__})", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:`PPOConfig` is deprecated")
epsilons = st.floats(0.01, 1)


def trainer(**config):
    """All that the judge's methods read of a trainer."""
    return SimpleNamespace(config=PPOConfig(**config))


def judge_losses(logprobs, old_logprobs, advantages, values, old_values, returns, mask, **config):
    """The judge's policy loss, value loss and stats. Of the logits it takes the entropy, which nothing here looks at."""
    config, logits = {"ratio_threshold": math.inf, **config}, torch.zeros(*mask.shape, 2)
    return PPOTrainer.loss(
        trainer(**config),
        old_logprobs,
        old_values,
        logits,
        values,
        logprobs,
        mask,
        advantages,
        returns,
    )


def same(ours, theirs):
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5, check_dtype=False)


def bessel(mask):
    """The judge divides a variance by n - 1, we by n: its variance is ours times n / (n - 1)."""
    n = mask.sum()
    return n / (n - 1)


def whiten_by_n_minus_1(x, mask):
    """ours times sqrt((n - 1) / n), written so that the 1e-8 under the root weighs the same on both sides."""
    root = bessel(mask).sqrt()
    return whiten(root * x, mask) / root


# ---- statistics and whitening --------------------------------------------------------------------------------------------


@given(masks(min_tokens=2), seeds)
def test_mean_and_variance_agree_up_to_n_minus_1(mask, seed):
    x = noise(seed, *mask.shape)
    same(masked_mean(x, mask), core.masked_mean(x, mask))
    same(masked_variance(x, mask), core.masked_var(x, mask, unbiased=False))
    same(masked_variance(x, mask) * bessel(mask), core.masked_var(x, mask))


@given(masks(min_tokens=2), seeds)
def test_whitening_agrees_up_to_n_minus_1_and_the_judge_whitens_padding_too(mask, seed):
    """Ours is 0 off the mask. The judge puts what stands there through the same shift and scale; its losses mask it again."""
    x = noise(seed, *mask.shape)
    ours, theirs = whiten(x, mask), core.masked_whiten(x, mask)
    same(whiten_by_n_minus_1(x, mask), theirs * mask)
    same(
        theirs[~mask],
        ((x - core.masked_mean(x, mask)) * (core.masked_var(x, mask) + 1e-8).rsqrt())[~mask],
    )
    assert not ours[~mask].any()


def test_a_single_token_and_none_are_zero_here_and_nan_to_the_judge():
    """n - 1 and n are 0 there."""
    x, one = row(3.0, 2.0), torch.tensor([[True, False]])
    assert core.masked_var(x, one).isnan() and core.masked_whiten(x, one).isnan().all()
    assert core.masked_mean(x, one & False).isnan()
    assert (
        masked_variance(x, one) == 0
        and not whiten(x, one).any()
        and masked_mean(x, one & False) == 0
    )


def test_a_constant_is_zero_here_and_rounding_blown_up_to_the_judge():
    """In single precision the mean of seven 1000.1 is not quite 1000.1, and the judge divides by a deviation of next to nothing."""
    x = torch.full((1, 7), 1000.1)
    assert core.masked_whiten(x, x > 0).abs().max() > 0.1
    same(whiten(x, x > 0), torch.zeros_like(x))


# ---- advantages ----------------------------------------------------------------------------------------------------------


@given(masks(min_tokens=2), seeds, rates, rates)
def test_advantages_and_returns_agree(mask, seed, gamma, lam):
    """The judge's GAE runs over the padding as well, but rewards and V times the mask are 0 there: so is V after the last token."""
    rewards, values = noise(seed, 2, *mask.shape)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    kept, whitened, their_returns = PPOTrainer.compute_advantages(
        trainer(gamma=gamma, lam=lam), values, rewards, mask
    )
    same(returns, their_returns)
    same(advantages, their_returns - kept)
    same(whiten_by_n_minus_1(advantages, mask), whitened * mask)


def test_a_hole_in_the_mask_is_refused_here_and_a_step_of_no_value_to_the_judge():
    """With gamma below 1 a masked token costs the judge a discount, and V after the token before it is 0."""
    rewards, values, mask = (
        row(0.0, 0.0, 1.0),
        row(0.0, 0.5, 0.5),
        torch.tensor([[True, False, True]]),
    )
    with pytest.raises(ValueError):
        gae(rewards, values, mask, 0.9, 1.0)
    filled = gae(rewards * mask, values * mask, torch.ones_like(mask), 0.9, 1.0)[1]
    same(
        PPOTrainer.compute_advantages(trainer(gamma=0.9, lam=1.0), values, rewards, mask)[2], filled
    )


@pytest.mark.parametrize("junk", [math.inf, math.nan])
def test_junk_in_padding_is_nan_to_the_judge_and_nothing_here(junk):
    """It multiplies by the mask where we select by it. Finite junk, as in every other test here, moves neither."""
    x, mask = row(0.3, -0.2, junk), torch.tensor([[True, True, False]])
    config = trainer(gamma=0.9, lam=0.9)
    assert PPOTrainer.compute_advantages(config, x, x, mask)[2].isnan().any()
    assert all(loss.isnan() for loss in judge_losses(x, x * 0, x, x, x * 0, x, mask)[:2])
    same(gae(x, x, mask, 0.9, 0.9)[1][:, :2], gae(x[:, :2], x[:, :2], mask[:, :2], 0.9, 0.9)[1])
    assert all(f(x, x * 0, x, mask, 0.2)[0].isfinite() for f in (policy_loss, value_loss))


# ---- losses --------------------------------------------------------------------------------------------------------------


@given(masks(min_tokens=1), seeds, epsilons)
def test_policy_loss_its_gradient_and_clip_fraction_agree(mask, seed, eps):
    old, advantages, now, *others = noise(seed, 6, *mask.shape)
    now.requires_grad_()
    ours, stats = policy_loss(now, old, advantages, mask, eps)
    theirs, _, judged = judge_losses(now, old, advantages, *others, mask, cliprange=eps)
    same(ours, theirs)
    same(gradient(ours, now), gradient(theirs, now))
    same(stats["clipfrac"], judged["policy/clipfrac"])


@given(masks(min_tokens=1), seeds)
def test_approximate_kl_is_k3_here_and_k2_to_the_judge(mask, seed):
    """k3 is k1 plus the mean ratio less 1, and k1 and the ratio are the judge's own."""
    old, advantages, now, *others = noise(seed, 6, *mask.shape)
    _, stats = policy_loss(now, old, advantages, mask, 0.2)
    judged = judge_losses(now, old, advantages, *others, mask)[2]
    same(judged["policy/approxkl"], masked_mean(kl_penalty(old, now, "k2"), mask))
    same(
        stats["approx_kl"],
        core.masked_mean(judged["policy/ratio"], mask) - 1 + judged["policy/policykl"],
    )


@given(masks(min_tokens=1), seeds, epsilons, rates)
def test_value_loss_its_gradient_and_clip_fraction_agree(mask, seed, eps, vf_coef):
    """Both halve it. The judge's comes with its coefficient in it; ours gets it in the loop."""
    old, returns, now, *others = noise(seed, 6, *mask.shape)
    now.requires_grad_()
    ours, stats = value_loss(now, old, returns, mask, eps)
    _, theirs, judged = judge_losses(
        *others, now, old, returns, mask, cliprange_value=eps, vf_coef=vf_coef
    )
    same(vf_coef * ours, theirs)
    same(gradient(vf_coef * ours, now), gradient(theirs, now))
    same(stats["value_clipfrac"], judged["val/clipfrac"])


def test_a_value_within_its_range_does_not_count_as_clipped():
    """In single precision, on neither side: old + (V - old) would often be a rounding away from V."""
    now, old, returns = noise(0, 3, 1, 2000).float()
    mask = torch.ones_like(now, dtype=torch.bool)
    judged = judge_losses(now, old, returns, now, old, returns, mask, cliprange_value=100.0)[2]
    assert (
        value_loss(now, old, returns, mask, 100.0)[1]["value_clipfrac"]
        == judged["val/clipfrac"]
        == 0
    )


@given(masks(min_tokens=1).filter(lambda mask: mask.any(1).all()), seeds)
def test_parts_of_a_minibatch_add_up_here_and_are_averaged_by_the_judge(mask, seed):
    """Row by row: ours add up to its loss of the whole. Its own mean over rows would weigh a token by one over its row's length."""
    old, target, now = noise(seed, 3, *mask.shape)
    rows = [slice(b, b + 1) for b in range(len(mask))]
    judged = [
        judge_losses(*(x[b] for x in (now, old, target, now, old, target, mask)), vf_coef=1)[:2]
        for b in rows
    ]
    whole = judge_losses(now, old, target, now, old, target, mask, vf_coef=1)[:2]
    for i, f in enumerate((policy_loss, value_loss)):
        parts = torch.stack(
            [f(now[b], old[b], target[b], mask[b], 0.2, mask.sum())[0] for b in rows]
        )
        same(parts.sum(), whole[i])
        same(parts * mask.sum() / mask.sum(1), torch.stack([losses[i] for losses in judged]))


def test_a_minibatch_of_wild_ratios_counts_in_full_here_and_is_dropped_by_the_judge():
    """Its losses are 0 where the mean ratio is above ratio_threshold, 10 by default; ours is the clipped loss as ever."""
    old, now, mask = row(0.0, 0.0), row(3.0, 3.0), torch.tensor([[True, True]])
    with pytest.warns(UserWarning, match="Skipping batch"):
        theirs = judge_losses(now, old, now, now, old, old, mask, ratio_threshold=10.0)
    assert theirs[0] == theirs[1] == 0
    assert policy_loss(now, old, now, mask, 0.2)[0] < 0 < value_loss(now, old, old, mask, 0.2)[0]


# ---- KL ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "theirs"), [("k1", "kl"), ("k2", "mse"), ("abs", "abs"), ("full", "full")]
)
@given(seed=seeds)
def test_kl_estimators_agree(kind, theirs, seed):
    """In value and in sign; full is KL(pi || pi_ref) on both sides. The judge has no k3."""
    logprobs, ref_logprobs, _ = two_policies(seed)
    judged = PPOTrainer._kl_penalty(trainer(kl_penalty=theirs), logprobs, ref_logprobs)
    same(kl_penalty(logprobs, ref_logprobs, kind), judged)


updates_of_kl = st.lists(st.tuples(st.floats(0, 100), st.integers(1, 1000)), max_size=20)


@given(updates_of_kl, st.floats(0.01, 10), st.floats(0.1, 100), st.floats(1000, 1e6))
def test_the_coefficient_takes_the_same_path(updates, init, target, horizon):
    pairs = [
        (AdaptiveKL(init, target, horizon), AdaptiveKLController(init, target, horizon)),
        (AdaptiveKL(init), FixedKLController(init)),
    ]
    for ours, theirs in pairs:
        for kl, n in updates:
            ours.update(kl, n)
            theirs.update(kl, n)
            assert ours.value == pytest.approx(theirs.value, rel=1e-5)
