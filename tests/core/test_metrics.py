"""The meter: did the tokens move that were criticised?"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from t2g.metrics import shift

seeds = st.integers(0, 2**32 - 1)


@given(seeds)
def test_each_group_of_tokens_has_its_own_mean_and_padding_counts_for_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    change, delta = (
        torch.randn(3, 6, generator=generator),
        torch.randint(-1, 2, (3, 6), generator=generator).float(),
    )
    mask = torch.arange(6) < torch.tensor([6, 3, 0])[:, None]
    dirty = shift(change.masked_fill(~mask, 1e3), delta.masked_fill(~mask, 1.0), mask)
    for name, sign in (("poor", -1), ("rest", 0), ("good", 1)):
        group = change[mask & (delta == sign)]
        assert dirty.get(f"shift_{name}") == (
            pytest.approx(group.mean().item(), abs=1e-5) if len(group) else None
        )
    assert dirty["shift_rank"] == pytest.approx(
        spearmanr(delta[mask], change[mask]).statistic, abs=1e-6
    )


def test_poor_tokens_of_good_responses_and_good_tokens_of_poor_ones_are_told_apart():
    delta = torch.tensor([[1.0, 1.0, -1.0], [1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    change = torch.tensor([[0.1, 0.2, -0.3], [0.4, -0.5, -0.6], [9.0, 9.0, 9.0]])
    mask = torch.tensor(
        [[True] * 3, [True] * 3, [False] * 3]
    )  # the third is masked out and does not raise the mean
    seen = shift(change, delta, mask)
    assert seen["shift_poor_above"] == pytest.approx(-0.3) and seen[
        "shift_good_below"
    ] == pytest.approx(0.4)


def test_the_rank_correlation_is_one_where_the_order_is_the_same_and_left_out_where_nothing_varies():
    delta, mask = torch.tensor([[-1.0, -0.2, 0.0, 0.5]]), torch.ones(1, 4, dtype=torch.bool)
    assert shift(delta**3, delta, mask)["shift_rank"] == pytest.approx(1)
    assert shift(-delta, delta, mask)["shift_rank"] == pytest.approx(-1)
    assert "shift_rank" not in shift(delta * 0, delta, mask) | shift(delta, delta * 0, mask)
    assert shift(delta, delta, mask & False) == {}
