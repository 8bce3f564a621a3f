"""Critics that wrap a critic: noisy.py makes errors of a given kind and rate, dense.py spreads labels."""

import argparse
import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from extras.studies import dense, noisy
from t2g.align import resolve
from t2g.feedback import Feedback, Span
from t2g.tasks import Example, toy

WORDS = "Ana lives in Porto since 1927 and likes old chess books".split()
TEXT = " ".join(WORDS)
FEEDBACK = Feedback("c", ["Porto", "chess"], [{"text": "1927", "severity": 0.5}, "Ana"])
texts = st.lists(st.sampled_from(["a", "bb", "ccc,", "27"]), min_size=1, max_size=20).map(" ".join)


def spoil(kind, rate=1.0, seed=0):
    return noisy.spoil(TEXT, FEEDBACK, kind, rate, random.Random(seed))


def places(feedback):
    return resolve(TEXT, feedback, severities=True)[0]


def test_at_rate_one_each_kind_does_what_its_name_says():
    assert spoil("flip") == Feedback("c", FEEDBACK.poor, FEEDBACK.good)
    assert spoil("drop") == Feedback("c")
    for seed in range(20):
        for kind in ("shift", "random"):
            for old, new in zip(places(FEEDBACK), places(spoil(kind, seed=seed))):
                assert new.score == old.score and 0 <= new.start < new.end <= len(TEXT)
    shifted = {places(spoil("shift", seed=seed))[0] for seed in range(20)}
    assert {TEXT[start:end] for start, end, _ in shifted} == {"s in", "since"[:4]}
    nowhere = Feedback("c", ["Lisbon"])
    assert noisy.spoil(TEXT, nowhere, "shift", 1.0, random.Random(0)) == nowhere
    twice = Feedback("c", poor=["27"])  # a poor quote marks its last place, so it moves from there
    spoilt = [noisy.spoil("27 a 27 b", twice, "shift", 1.0, random.Random(i)) for i in range(20)]
    assert {one.poor[0] for one in spoilt} == {"a ", " b"}


@pytest.mark.parametrize("kind", noisy.KINDS)
def test_the_rate_is_the_share_of_quotes_that_are_spoilt(kind):
    assert spoil(kind, rate=0.0) == FEEDBACK
    kept = 0
    for seed in range(1000):
        spoilt = spoil(kind, 0.3, seed)
        kept += sum(quote in spoilt.good for quote in FEEDBACK.good)
        kept += sum(quote in spoilt.poor for quote in FEEDBACK.poor)
    assert kept / 4000 == pytest.approx(0.7, abs=0.04)


def test_errors_depend_on_the_seed_and_the_text_alone(tmp_path):
    """A resumed run, or one on more processes, meets the same errors, in whatever order it asks."""
    rng = random.Random(0)
    examples = [toy.make_example(rng) for _ in range(40)]
    responses = [example.reference for example in examples]

    def ask(seed, order):
        args = dict(seed=seed, noise=("flip", 0.5), noisy_critic="rule", output_dir=tmp_path / "x")
        critic = noisy.critic(toy, argparse.Namespace(**args))
        answers = critic([examples[i] for i in order], [responses[i] for i in order])
        return dict(zip(order, answers))

    order = list(range(40))
    assert ask(0, order) == ask(0, order[::-1]) != ask(1, order)


def test_what_is_no_feedback_passes_through(tmp_path):
    file = tmp_path / "numbers.py"
    file.write_text("def critic(task, args):\n    return lambda examples, responses: [None, 0.5]\n")
    args = dict(seed=0, noise=("flip", 1.0), output_dir=tmp_path / "x")
    args |= dict(noisy_critic=str(file), dense_critic=str(file))
    examples = [Example("p", "", {})] * 2
    for study in (noisy, dense):
        assert study.critic(toy, argparse.Namespace(**args))(examples, ["a", "b"]) == [None, 0.5]


def test_flags_of_noise():
    assert noisy.kind_and_rate("flip:0.3") == ("flip", 0.3)
    for text in ("flip", "flip:", "flip:2", "flip:-0.1", "flip:nan", "twist:0.3", ":0.3", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            noisy.kind_and_rate(text)


@given(st.data(), texts)
def test_dense_labels_keep_every_label_and_cover_the_share(data, text):
    words = text.split()
    ends = st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(sorted)
    solid = ends.filter(lambda place: text[slice(*place)].strip())
    drawn = data.draw(st.lists(st.tuples(solid, st.sampled_from([1.0, -1.0])), min_size=1))
    spans = [Span(*place, score) for place, score in drawn]
    grown = dense.dense(spans, text)
    every_word = dense.dense([Span(0, len(text), 1.0)], text)
    touched = [any(s < end and start < e for s, e, _ in spans) for start, end, _ in every_word]
    expected = max(dense.SHARE * len(words), sum(touched))
    assert expected <= len(grown) < expected + 1
    for start, end, score in grown:
        touching = [s for a, b, s in spans if a < end and start < b]
        assert score == min(touching) if touching else score in {s for _, _, s in spans}


def test_labels_spread_to_their_neighbours_evenly():
    text = "one two three four five six seven eight nine ten"
    grown = dense.dense([Span(4, 7, 1.0), Span(34, 39, -1.0)], text)
    marked = [(text[start:end], score) for start, end, score in grown]
    good, poor = "one two three four".split(), "seven eight nine".split()
    assert marked == [(word, 1.0) for word in good] + [(word, -1.0) for word in poor]
    assert dense.dense([], "some words") == [] == dense.dense([], "")


@given(st.data())
def test_dense_feedback_marks_in_quotes_what_dense_marks_in_spans(data):
    words = data.draw(st.lists(st.sampled_from(WORDS), min_size=2, max_size=9, unique=True))
    text = " ".join(words)
    cut = data.draw(st.integers(0, len(words) - 1))
    feedback = Feedback("c", good=words[:cut][:1], poor=words[cut:][:1])
    spread = dense.dense_feedback(text, feedback)
    assert spread.critique == "c"
    assume(all(text.count(quote) == 1 for quote in [*spread.good, *spread.poor]))

    def marked(spans):
        ranges = [(range(start, end), score) for start, end, score in spans]
        return {i: score for places, score in ranges for i in places if not text[i].isspace()}

    by_spans = dense.dense(resolve(text, feedback)[0], text)
    assert marked(resolve(text, spread)[0]) == marked(by_spans)
