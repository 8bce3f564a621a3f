"""Which tokens a span rewards, and how its score is distributed among them."""

import re
import time

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from t2g.align import SPAN_WEIGHTS, span_rewards

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


WEIGHTS = {  # the weights of the n tokens of a span
    "uniform": lambda n: [1] * n,
    "severity": lambda n: [1] * n,
    "first": lambda n: [1],
    "inverse_length": lambda n: [1 / n] * n,
    "decayed": lambda n: [0.8**k for k in range(n)],
}


@pytest.mark.parametrize("name", SPAN_WEIGHTS)
@given(case=offsets_and_spans())
def test_a_token_gets_the_lowest_weighted_score_of_the_spans_that_touch_it(name, case):
    offsets, spans = case
    marks = [[] for _ in offsets]
    for first, last, score in spans:
        within = set(range(first, last))
        tokens = [t for t, place in enumerate(offsets) if within & set(range(*place))]
        for t, weight in zip(tokens, WEIGHTS[name](len(tokens))):
            marks[t].append(score * weight)
    expected = [min(scores, default=0.0) for scores in marks]
    assert span_rewards(offsets, spans, name).tolist() == pytest.approx(expected)


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
    span_rewards(offsets, spans)
    assert time.process_time() - start < 2


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
