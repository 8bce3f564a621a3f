"""Spans made worse, or other, on purpose: for studies of a wrong critic and the paper's ablation of dense labels.

`--span_noise KIND:RATE` spoils this share of the spans:

    flip      good becomes poor, poor becomes good
    drop      the span is lost
    shift     it slips by its own length, to the left or to the right, as far as the text reaches
    random    it lands anywhere in the text

`--dense` grows the spans, word by word, until DENSE_SHARE of the words are labelled (Text2Grad, table of ablations: about 70%).
"""

import argparse
import re

from t2g.align import resolve
from t2g.critics import quote_of
from t2g.feedback import Feedback, Span

KINDS = ("flip", "drop", "shift", "random")
DENSE_SHARE = 0.7


def add_flags(add):
    add(
        "--dense",
        action="store_true",
        help="grow the spans until most words are labelled, the paper's ablation",
    )
    add(
        "--span_noise",
        type=kind_and_rate,
        metavar="KIND:RATE",
        help="spoil this share of the spans: flip, drop, shift or random",
    )


def kind_and_rate(text: str) -> tuple[str, float]:
    """An argument type: "flip:0.3" -> ("flip", 0.3)."""
    match = re.fullmatch(rf"({'|'.join(KINDS)}):(\d*\.?\d+)", text)
    if not match or float(match[2]) > 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not KIND:RATE, with a kind of {', '.join(KINDS)} and a rate in [0, 1]"
        )
    return match[1], float(match[2])


def change(spans, text: str, args, rng) -> list[Span]:
    """The spans as the flags want them: made dense, then spoilt; as they are without flags."""
    if args.dense:
        spans = dense(spans, text)
    if args.span_noise:
        spans = spoil(spans, len(text), *args.span_noise, rng)
    return spans


def spoil(spans, length: int, kind: str, rate: float, rng) -> list[Span]:
    """The spans of a text of so many characters, each one spoilt with probability rate; rng, a random.Random, makes all draws."""
    kept = []
    for start, end, score in spans:
        if rng.random() >= rate:
            kept.append(Span(start, end, score))
        elif kind == "flip":
            kept.append(Span(start, end, -score))
        elif kind != "drop":
            size = end - start
            to = (
                start + rng.choice((-size, size))
                if kind == "shift"
                else rng.randint(0, length - size)
            )
            to = min(max(to, 0), length - size)
            kept.append(Span(to, to + size, score))
    return kept


def dense(spans, text: str) -> list[Span]:
    """A span a word, for DENSE_SHARE of the words: labels, if there are any, spread to neighbours until there are enough."""
    words = [word.span() for word in re.finditer(r"\S+", text)]
    labels = [
        min((score for s, e, score in spans if s < end and start < e), default=0)
        for start, end in words
    ]
    missing = DENSE_SHARE * len(words) - sum(map(bool, labels))
    while missing > 0 and any(labels):
        before = labels.copy()
        for i, label in enumerate(before):
            nearby = [near for near in (*before[max(i - 1, 0) : i], *before[i + 1 : i + 2]) if near]
            if not label and nearby and missing > 0:
                labels[i], missing = nearby[0], missing - 1
    return [Span(*word, label) for word, label in zip(words, labels) if label]


def dense_feedback(text: str, feedback: Feedback) -> Feedback:
    """The same critique with dense labels as its quotes: neighbouring words of one label are one quote."""
    quotes, last = {1.0: [], -1.0: []}, None
    for start, end, score in dense(resolve(text, feedback)[0], text):
        if last and last[2] == score and not text[last[1] : start].strip():
            quotes[score].pop()
            start = last[0]
        quotes[score].append((start, end))
        last = start, end, score
    return Feedback(
        feedback.critique,
        *([quote_of(text, *place) for place in quotes[score]] for score in (1.0, -1.0)),
    )
