"""Did the criticised tokens move? And the intervals of the bootstrap."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from t2g.metrics import mean_scores, shift
from t2g.statistics import bootstrapped, resamples

WRONG = [None, 1.0, "good", ["good"], {"good": float("nan")}, {"godo": 1}, {"good": "1"}]


@pytest.mark.parametrize("score", [*WRONG, {"good": None}])
def test_a_score_that_is_missing_or_not_finite_is_named(score, refused):
    task = SimpleNamespace(METRICS={"good": "share"}, score=lambda example, text: score)
    assert "good" in refused(mean_scores, task, ["e"], ["text"])
    task.score = lambda example, text: {"good": text == "a", "other": float("nan")}
    assert mean_scores(task, ["e"] * 2, ["a", "b"]) == {"good": 0.5}


@given(st.integers(0, 2**32 - 1))
def test_each_group_of_tokens_has_its_own_mean_and_padding_counts_for_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(3, 6, generator=generator)
    delta = torch.randint(-1, 2, (3, 6), generator=generator).float()
    mask = torch.arange(6) < torch.tensor([6, 3, 0])[:, None]
    means = shift(change.masked_fill(~mask, 1e3), delta.masked_fill(~mask, 1.0), mask)
    for name, sign in (("poor", -1), ("rest", 0), ("good", 1)):
        group = change[mask & (delta == sign)]
        expected = pytest.approx(group.mean().item(), abs=1e-5) if len(group) else None
        assert means.get(f"shift_{name}") == expected
    rank = spearmanr(delta[mask], change[mask]).statistic
    assert means["shift_rank"] == pytest.approx(rank, abs=1e-6)


def test_poor_tokens_of_good_responses_and_good_tokens_of_poor_ones_are_told_apart():
    delta = torch.tensor([[1.0, 1.0, -1.0], [1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    change = torch.tensor([[0.1, 0.2, -0.3], [0.4, -0.5, -0.6], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[True] * 3, [True] * 3, [False] * 3])  # the third is unreadable
    means = shift(change, delta, mask)
    assert means["shift_poor_above"] == pytest.approx(-0.3)
    assert means["shift_good_below"] == pytest.approx(0.4)


def test_a_correlation_with_a_constant_is_left_out():
    delta, mask = torch.tensor([[-1.0, -0.2, 0.0, 0.5]]), torch.ones(1, 4, dtype=torch.bool)
    assert "shift_rank" not in shift(delta * 0, delta, mask) | shift(delta, delta * 0, mask)
    assert shift(delta, delta, mask & False) == {}


def test_a_bootstrap_weighs_examples_and_leaves_draws_of_nan_out():
    weights = resamples(200)
    assert np.array_equal(weights, resamples(200)) and (weights.sum(1) == 200).all()
    values = np.random.default_rng(0).normal(size=200)
    means = weights @ values / 200
    means[1::10] = np.nan
    figure = bootstrapped(means)
    assert figure["value"] == pytest.approx(values.mean())
    half = 1.96 * values.std() / np.sqrt(200)
    assert figure["high"] - figure["low"] == pytest.approx(2 * half, rel=0.15)
    assert bootstrapped(means * np.nan) == {"value": None, "low": None, "high": None}
