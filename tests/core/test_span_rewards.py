"""Where spans and tokens meet: which tokens a span rewards, and how its score is shared out among them."""

import itertools
import re
import time

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from t2g.align import (
    SPAN_DECAY,
    SPAN_WEIGHTS,
    span_rewards,
)

scores = st.floats(-1, 1, width=32)


@st.composite
def offsets_and_spans(draw):
    """Ranges that tile a text with shared characters and empty ranges among them, and spans within it."""
    offsets, end = [], 0
    for size, shared in draw(
        st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=8)
    ):
        start = max(end - (shared and size > 0), 0)
        end = max(end, start + size)
        offsets.append((start, start + size) if size else (end, end))
    assume(end > 0)
    cuts = st.lists(st.integers(0, end), min_size=2, max_size=2, unique=True).map(sorted)
    return offsets, draw(
        st.lists(st.builds(lambda cut, score: (*cut, score), cuts, scores), max_size=5)
    )


@given(offsets_and_spans())
def test_a_token_is_rewarded_if_and_only_if_it_shares_a_character_with_a_span(case):
    offsets, spans = case
    for (start, end), reward in zip(offsets, span_rewards(offsets, spans).tolist()):
        touching = [score for s, e, score in spans if set(range(start, end)) & set(range(s, e))]
        assert reward == (min(touching) if touching else 0)


@given(offsets_and_spans(), st.randoms())
def test_the_order_of_the_spans_does_not_matter(case, rng):
    offsets, spans = case
    shuffled = rng.sample(spans, len(spans))
    assert torch.equal(span_rewards(offsets, spans), span_rewards(offsets, shuffled))


@pytest.mark.parametrize(
    "spans", [[(0, 4, 1.0), (0, 4, -1.0)], [(0, 4, -1.0), (0, 4, 1.0)], [(0, 1, -1.0), (1, 4, 1.0)]]
)
def test_poor_wins_over_good_in_a_token(spans):
    assert span_rewards([(0, 4)], spans).tolist() == [-1]


@given(offsets_and_spans(), st.sampled_from(list(SPAN_WEIGHTS)))
def test_weights_never_move_credit_to_other_tokens_nor_make_it_larger(case, weights):
    offsets, spans = case
    weighted, uniform = (span_rewards(offsets, spans, name) for name in (weights, "uniform"))
    marked = torch.tensor(
        [any(start < e and s < end for s, e, _ in spans) and start < end for start, end in offsets],
        dtype=torch.bool,
    )
    assert not weighted[~marked].any()
    assert (weighted >= uniform.clamp(max=0)).all()


def one_span(data, weights):
    """The weights that the tokens of one span get, by random tokens and a random score; none of them shared or empty."""
    ends = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=12))
    cuts = [sum(ends[:n]) for n in range(len(ends) + 1)]
    first = data.draw(st.integers(0, len(ends) - 1))
    last = data.draw(st.integers(first, len(ends) - 1))
    score = data.draw(st.floats(0.1, 1)) * data.draw(st.sampled_from([1, -1]))
    start = data.draw(st.integers(cuts[first], cuts[first + 1] - 1))
    end = data.draw(st.integers(max(start, cuts[last]) + 1, cuts[last + 1]))
    delta = span_rewards(list(itertools.pairwise(cuts)), [(start, end, score)], weights)
    assert not delta[:first].any() and not delta[last + 1 :].any()
    return delta[first : last + 1] / score


@given(st.data())
def test_uniform_weights_are_all_one(data):
    assert_close(w := one_span(data, "uniform"), torch.ones_like(w))


@given(st.data())
def test_severity_shares_its_score_out_as_uniform_does(data):
    assert_close(w := one_span(data, "severity"), torch.ones_like(w))


@given(st.data())
def test_first_is_one_for_the_first_token_and_nothing_for_the_rest(data):
    w = one_span(data, "first")
    assert_close(w, (torch.arange(len(w)) == 0).float())


@given(st.data())
def test_inverse_length_gives_every_span_a_total_of_one_in_equal_parts(data):
    w = one_span(data, "inverse_length")
    assert w.sum().item() == pytest.approx(1, abs=1e-5)
    assert_close(w, torch.full_like(w, w[0].item()))


@given(st.data())
def test_decayed_falls_from_one_by_the_same_factor_at_each_token(data):
    w = one_span(data, "decayed")
    assert w[0].item() == pytest.approx(1)
    assert_close(w[1:], w[:-1] * SPAN_DECAY)
    assert 0 < SPAN_DECAY < 1


def test_where_weighted_spans_overlap_the_lowest_wins_and_a_tail_without_weight_marks_nothing():
    offsets = [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert span_rewards(offsets, [(0, 3, -1.0), (1, 4, 1.0)], "first").tolist() == [-1, 1, 0, 0]
    assert span_rewards(offsets, [(0, 2, 1.0), (1, 3, -1.0)], "inverse_length").tolist() == [
        0.5,
        -0.5,
        -0.5,
        0,
    ]


def test_ten_thousand_spans_are_no_trouble():
    offsets = [(n, n + 1) for n in range(512)]
    spans = [(n % 500, n % 500 + 1 + n % 12, (-1.0) ** n) for n in range(10_000)]
    began = time.process_time()
    delta = span_rewards(offsets, spans)
    assert time.process_time() - began < 2
    assert delta[:500].tolist() == [
        min(score for s, e, score in spans[:1000] if s <= t < e) for t in range(500)
    ]


@pytest.mark.parametrize("offsets", [[(3, 6), (0, 3)], [(0, 6), (1, 2)], [(3, 0), (3, 6)]])
def test_offsets_out_of_order_are_refused(offsets):
    with pytest.raises(ValueError, match="out of order"):
        span_rewards(offsets, [(0, 1, 1.0)])


@pytest.mark.parametrize("weights", SPAN_WEIGHTS)
def test_a_span_that_no_token_touches_marks_nothing(weights):
    """Where the offsets leave a part of the text out."""
    assert span_rewards([(0, 2), (4, 6)], [(2, 4, 1.0)], weights).tolist() == [0, 0]


def test_ranges_that_only_touch_do_not_overlap():
    assert span_rewards([(0, 2), (2, 4), (4, 6)], [(2, 4, 1.0)]).tolist() == [0, 1, 0]


BAD_RANGES = [(2, 2), (3, 2), (-1, 2), (0, 7), (6, 7)]
BAD_SCORES = [1.01, -1.01, float("inf"), -float("inf"), float("nan")]


@pytest.mark.parametrize(
    "span", [*((*place, 1.0) for place in BAD_RANGES), *((0, 2, score) for score in BAD_SCORES)]
)
def test_a_bad_span_is_refused(span):
    """Empty, reversed, outside the text, or with a score that is no number in [-1, 1]."""
    with pytest.raises(ValueError, match=re.escape(str(span))):
        span_rewards([(0, 3), (3, 6)], [(0, 3, 1.0), span])


def test_without_spans_or_tokens_there_are_no_rewards():
    assert span_rewards([(0, 3), (3, 3)], []).tolist() == [0, 0]
    nothing = span_rewards([], [])
    assert nothing.shape == (0,) and nothing.dtype == torch.float32
    with pytest.raises(ValueError):
        span_rewards([], [(0, 1, 1.0)])
