"""A critic with errors made on purpose, to measure what a wrong critic costs.

It wraps another critic and spoils each of its quotes with a given probability:

    flip      a good quote becomes poor, a poor quote becomes good
    drop      the quote is removed
    shift     the quote moves left or right by its length; at an edge it may stay
    random    the quote moves to a random place of the text

python train_ppo.py --critic extras/studies/noisy.py --noise flip:0.3 --output_dir runs/toy/ppo_flip

The errors depend on the seed, the prompt and the response alone, so a resumed run repeats them.
"""

import argparse
import random
import re
from pathlib import Path

from t2g import critics
from t2g.align import resolve
from t2g.critics import quote_of
from t2g.feedback import Feedback, quoted

KINDS = ("flip", "drop", "shift", "random")


def add_flags(add):
    add("--noise", "flip:0.3", "KIND:RATE, the kind of error and its probability", kind_and_rate)
    add("--noisy_critic", "rule", "the critic whose quotes are spoilt")


def kind_and_rate(text: str) -> tuple[str, float]:
    """An argument type: "flip:0.3" -> ("flip", 0.3)."""
    match = re.fullmatch(rf"({'|'.join(KINDS)}):(\d*\.?\d+)", text)
    if not match or float(match[2]) > 1:
        wanted = f"KIND:RATE with a kind of {', '.join(KINDS)} and a rate in [0, 1]"
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return match[1], float(match[2])


def critic(task, args):
    def with_errors(example, response, feedback):
        rng = random.Random(f"{args.seed} {example.prompt} {response}")
        return spoil(response, feedback, *args.noise, rng)

    return wrapped(task, args, args.noisy_critic, with_errors)


def wrapped(task, args, name, change):
    """Returns the critic called name, with change(example, response, feedback) of its feedback."""
    inner_args = argparse.Namespace(**vars(args) | {"critic": name})
    inner = critics.load_critic(task, inner_args, Path(args.output_dir).parent)

    def critic(examples, responses):
        rows = zip(examples, responses, inner(examples, responses))
        return [change(*row) if isinstance(row[2], Feedback) else row[2] for row in rows]

    return critic


def spoil(text: str, feedback: Feedback, kind: str, rate: float, rng) -> Feedback:
    """Returns the feedback with each of its quotes spoilt with probability `rate`.

    A quote that stands nowhere in the text cannot move and stays as it is.
    """
    kept = {"good": [], "poor": []}
    for label, opposite in (("good", "poor"), ("poor", "good")):
        for quote in getattr(feedback, label):
            if rng.random() >= rate:
                kept[label].append(quote)
            elif kind == "flip":
                kept[opposite].append(quote)
            elif kind != "drop":
                kept[label].append(moved(text, quote, label, kind, rng))
    return Feedback(feedback.critique, **kept)


def moved(text: str, quote, label: str, kind: str, rng):
    """Returns a quote of equal severity from another place than the one that it marks.

    It starts as long as the old one, and is lengthened until it stands at one place only. label:
    "good" or "poor"; a repeated good quote marks its first place, a poor one its last.
    """
    spans, _ = resolve(text, Feedback("", **{label: [quote]}))
    if not spans:
        return quote
    start, end, _ = spans[0]
    size = end - start
    last = len(text) - size
    start = start + rng.choice((-size, size)) if kind == "shift" else rng.randint(0, last)
    start = min(max(start, 0), last)
    place = quote_of(text, start, start + size)
    return place if isinstance(quote, str) else {"text": place, "severity": quoted(quote)[1]}
