"""Which tokens a span rewards, and how its score is distributed among them."""

import itertools
import re
import time

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from t2g.align import SPAN_DECAY, SPAN_WEIGHTS, span_rewards

scores = st.floats(-1, 1, width=32)


@st.composite
def offsets_and_spans(draw):
    """Ranges that tile a text, some with a shared character or empty, and spans within the text."""
    offsets, end = [], 0
    sizes = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=8)
    for size, shared in draw(sizes):
        start = max(end - (shared and size > 0), 0)
        end = max(end, start + size)
        offsets.append((start, start + size) if size else (end, end))
    assume(end > 0)
    cuts = st.lists(st.integers(0, end), min_size=2, max_size=2, unique=True).map(sorted)
    spans = st.lists(st.builds(lambda cut, score: (*cut, score), cuts, scores), max_size=5)
    return offsets, draw(spans)


@given(offsets_and_spans(), st.randoms())
def test_a_token_gets_the_lowest_score_of_the_spans_with_which_it_shares_a_character(case, rng):
    offsets, spans = case
    rewards = span_rewards(offsets, spans)
    assert torch.equal(rewards, span_rewards(offsets, rng.sample(spans, len(spans))))
    for (start, end), reward in zip(offsets, rewards.tolist()):
        touching = [score for s, e, score in spans if set(range(start, end)) & set(range(s, e))]
        assert reward == (min(touching) if touching else 0)


@given(offsets_and_spans(), st.sampled_from(list(SPAN_WEIGHTS)))
def test_weights_never_move_credit_to_other_tokens_and_never_increase_it(case, weights):
    offsets, spans = case
    weighted, uniform = (span_rewards(offsets, spans, name) for name in (weights, "uniform"))
    for (start, end), reward in zip(offsets, weighted):
        marked = start < end and any(start < e and s < end for s, e, _ in spans)
        assert marked or not reward
    assert (weighted >= uniform.clamp(max=0)).all()


@given(st.data(), st.sampled_from(list(SPAN_WEIGHTS)))
def test_the_weights_of_one_span(data, name):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=12))
    cuts = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    first = data.draw(st.integers(0, len(sizes) - 1))
    last = data.draw(st.integers(first, len(sizes) - 1))
    score = data.draw(st.floats(0.1, 1)) * data.draw(st.sampled_from([1, -1]))
    start = data.draw(st.integers(cuts[first], cuts[first + 1] - 1))
    end = data.draw(st.integers(max(start, cuts[last]) + 1, cuts[last + 1]))
    delta = span_rewards(list(itertools.pairwise(cuts)), [(start, end, score)], name)
    assert not delta[:first].any() and not delta[last + 1 :].any()
    w = delta[first : last + 1] / score
    if name in ("uniform", "severity"):
        assert_close(w, torch.ones_like(w))
    elif name == "first":
        assert w[0].item() == pytest.approx(1) and not w[1:].any()
    elif name == "inverse_length":
        assert w.sum().item() == pytest.approx(1, abs=1e-5)
        assert_close(w, torch.full_like(w, w[0].item()))
    else:
        assert w[0].item() == pytest.approx(1) and 0 < SPAN_DECAY < 1
        assert_close(w[1:], w[:-1] * SPAN_DECAY)


def test_poor_wins_over_good_also_when_spans_are_weighted():
    for spans in ([(0, 4, 1.0), (0, 4, -1.0)], [(0, 1, -1.0), (1, 4, 1.0)]):
        assert span_rewards([(0, 4)], spans).tolist() == [-1]
    offsets = [(0, 1), (1, 2), (2, 3), (3, 4)]
    first = span_rewards(offsets, [(0, 3, -1.0), (1, 4, 1.0)], "first")
    assert first.tolist() == [-1, 1, 0, 0], "a token without weight is not marked"
    inverse = span_rewards(offsets, [(0, 2, 1.0), (1, 3, -1.0)], "inverse_length")
    assert inverse.tolist() == [0.5, -0.5, -0.5, 0]


def test_ten_thousand_spans_take_less_than_two_seconds():
    offsets = [(n, n + 1) for n in range(512)]
    spans = [(n % 500, n % 500 + 1 + n % 12, (-1.0) ** n) for n in range(10_000)]
    start = time.process_time()
    delta = span_rewards(offsets, spans)
    assert time.process_time() - start < 2
    for t in range(500):
        assert delta[t] == min(score for s, e, score in spans[:1000] if s <= t < e)


@pytest.mark.parametrize("offsets", [[(3, 6), (0, 3)], [(0, 6), (1, 2)], [(3, 0), (3, 6)]])
def test_offsets_out_of_order_are_refused(offsets):
    with pytest.raises(ValueError, match="out of order"):
        span_rewards(offsets, [(0, 1, 1.0)])


BAD_RANGES = [(2, 2), (3, 2), (-1, 2), (0, 7), (6, 7)]
BAD_SCORES = [1.01, -1.01, float("inf"), -float("inf"), float("nan")]
BAD_SPANS = [(*place, 1.0) for place in BAD_RANGES] + [(0, 2, score) for score in BAD_SCORES]


@pytest.mark.parametrize("span", BAD_SPANS)
def test_a_bad_span_is_refused_and_named(span):
    with pytest.raises(ValueError, match=re.escape(str(span))):
        span_rewards([(0, 3), (3, 6)], [(0, 3, 1.0), span])


def test_without_spans_or_tokens_there_are_no_rewards():
    assert span_rewards([(0, 3), (3, 3)], []).tolist() == [0, 0]
    nothing = span_rewards([], [])
    assert nothing.shape == (0,) and nothing.dtype == torch.float32
    with pytest.raises(ValueError):
        span_rewards([], [(0, 1, 1.0)])
