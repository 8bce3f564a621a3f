"""Spans that are spoilt or made dense on purpose: what each kind does, how often, and that a seed settles it."""

import random
from argparse import ArgumentTypeError

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from extras.studies.ablations import DENSE_SHARE, KINDS, dense, dense_feedback, kind_and_rate, spoil
from t2g.align import resolve
from t2g.feedback import Feedback, Span

LENGTH = 40
places = (
    st.tuples(st.integers(0, LENGTH), st.integers(0, LENGTH))
    .map(sorted)
    .filter(lambda place: place[0] < place[1])
)
spans_of_a_text = st.lists(
    st.builds(lambda place, score: Span(*place, score), places, st.sampled_from([1.0, -1.0])),
    max_size=6,
)
seeds = st.integers(0, 2**32)


@given(spans_of_a_text, st.sampled_from(KINDS), seeds)
def test_rate_zero_spoils_nothing(spans, kind, seed):
    assert spoil(spans, LENGTH, kind, 0.0, random.Random(seed)) == spans


@given(spans_of_a_text, st.sampled_from(KINDS), st.floats(0, 1), seeds)
def test_the_same_seed_spoils_the_same_spans_in_the_same_way(spans, kind, rate, seed):
    assert spoil(spans, LENGTH, kind, rate, random.Random(seed)) == spoil(
        spans, LENGTH, kind, rate, random.Random(seed)
    )


@given(spans_of_a_text, st.floats(0, 1), seeds)
def test_spoilt_spans_keep_their_length_and_stay_in_the_text(spans, rate, seed):
    for kind in ("flip", "shift", "random"):
        spoilt = spoil(spans, LENGTH, kind, rate, random.Random(seed))
        assert [end - start for start, end, _ in spoilt] == [end - start for start, end, _ in spans]
        assert all(0 <= start < end <= LENGTH for start, end, _ in spoilt)


@given(spans_of_a_text, seeds)
def test_at_rate_one_each_kind_does_what_its_name_says(spans, seed):
    spoilt = {kind: spoil(spans, LENGTH, kind, 1.0, random.Random(seed)) for kind in KINDS}
    assert spoilt["flip"] == [(start, end, -score) for start, end, score in spans]
    assert spoilt["drop"] == []
    for (start, end, score), moved in zip(spans, spoilt["shift"]):
        left, right = max(start - (end - start), 0), min(end, LENGTH - (end - start))
        assert moved in ((left, left + end - start, score), (right, right + end - start, score))
    assert [span.score for span in spoilt["random"]] == [span.score for span in spans]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_is_the_share_of_spans_that_are_spoilt(kind):
    spans = [Span(20, 23, 1.0)] * 4000
    kept = sum(span == spans[0] for span in spoil(spans, 1000, kind, 0.3, random.Random(0)))
    assert kept / len(spans) == pytest.approx(0.7, abs=0.03)


def test_a_random_span_may_land_anywhere():
    starts = {
        span.start for span in spoil([Span(0, 2, 1.0)] * 500, 10, "random", 1.0, random.Random(0))
    }
    assert starts == set(range(9))


def test_flags_of_noise():
    assert kind_and_rate("flip:0.3") == ("flip", 0.3)
    for text in ("flip", "flip:", "flip:2", "flip:-0.1", "flip:nan", "twist:0.3", ":0.3", ""):
        with pytest.raises(ArgumentTypeError):
            kind_and_rate(text)


texts = st.lists(st.sampled_from(["a", "bb", "ccc,", "27"]), min_size=1, max_size=20).map(" ".join)


@given(st.data(), texts)
def test_dense_labels_keep_every_label_and_cover_the_share(data, text):
    words = text.split()
    given_places = st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(sorted)
    solid = given_places.filter(lambda place: text[slice(*place)].strip())
    spans = [
        Span(*place, score)
        for place, score in data.draw(
            st.lists(st.tuples(solid, st.sampled_from([1.0, -1.0])), min_size=1)
        )
    ]
    grown = dense(spans, text)
    before = sum(
        any(s < end and start < e for s, e, _ in spans)
        for start, end, _ in dense([Span(0, len(text), 1.0)], text)
    )
    assert (
        max(DENSE_SHARE * len(words), before)
        <= len(grown)
        < max(DENSE_SHARE * len(words), before) + 1
    )
    for start, end, score in grown:
        touching = [s for a, b, s in spans if a < end and start < b]
        assert score == min(touching) if touching else score in {s for _, _, s in spans}


def test_labels_spread_to_their_neighbours_evenly():
    text = "one two three four five six seven eight nine ten"
    labels = {
        text[s:e]: score for s, e, score in dense([Span(4, 7, 1.0), Span(34, 39, -1.0)], text)
    }
    assert labels == dict.fromkeys(["one", "two", "three", "four"], 1.0) | dict.fromkeys(
        ["seven", "eight", "nine"], -1.0
    )


def test_without_spans_there_is_nothing_to_spread():
    assert dense([], "some words") == [] == dense([], "")


@given(st.data())
def test_dense_feedback_says_in_quotes_what_dense_says_in_spans(data):
    words = data.draw(
        st.lists(
            st.sampled_from("Ana lives in Porto since 1927 and likes chess".split()),
            min_size=2,
            max_size=9,
            unique=True,
        )
    )
    text = " ".join(words)
    cut = data.draw(st.integers(0, len(words) - 1))
    feedback = Feedback("c", good=words[:cut][:1], poor=words[cut:][:1])
    dense_one = dense_feedback(text, feedback)
    assert dense_one.critique == "c"
    assume(all(text.count(quote) == 1 for quote in [*dense_one.good, *dense_one.poor]))
    marked = {
        i: score
        for s, e, score in resolve(text, dense_one)[0]
        for i in range(s, e)
        if not text[i].isspace()
    }
    expected = {
        i: score for s, e, score in dense(resolve(text, feedback)[0], text) for i in range(s, e)
    }
    assert marked == expected
