"""The card of a critic: its marks, quotes and critiques against the truth, with 95% intervals.

Every figure is made of sums over responses. A draw of the bootstrap weighs the responses anew, so
all draws together are one matrix product. An unreadable critique marks nothing: it counts in recall
and in json_valid. What would divide by 0 is 0 and has no interval (None).

Left out: where responses and critiques come from; see `eval.py rm`, which makes the cards.
"""

import itertools
import random
import re
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

from t2g.align import MATCH_KINDS, resolve, response_text, span_rewards, token_offsets
from t2g.cli import fail
from t2g.feedback import Feedback
from t2g.metrics import bootstrapped, resamples
from t2g.notes import read_annotations
from t2g.page import quotes_with_tokens, write_html

SIGNS = {"good": 1, "poor": -1}
WORD = re.compile(r"\w+|[^\w\s]")
SAMPLES_SHOWN = 24


class Sample(NamedTuple):
    """A response and the truth about it. A view is a text and the ranges in it that are counted."""

    prompt: str
    response: str
    truth: Feedback
    kinds: list[str]  # one for each of the truth's poor quotes, if known
    views: dict[str, tuple[str, list[tuple[int, int]]]]  # "token" and "character"


def truth_of(path) -> list[dict]:
    """The records of a file that hold feedback."""
    records = read_annotations(path)
    kept = [record for record in records if record["feedback"]]
    print(f"{path}: {len(kept)} of {len(records)} records have the status ok and are used")
    return kept or fail(f"{path} holds no record whose status is ok")


def same_records(path, records) -> list[Feedback | None]:
    """Another file's feedback on the same responses; None where it failed or has none."""
    others = {}
    for record in read_annotations(path):
        others[record.get("prompt"), record.get("response")] = record["feedback"]
    feedback = [others.get((record["prompt"], record["response"])) for record in records]
    readable = len(feedback) - feedback.count(None)
    print(f"{path}: feedback on {readable} of {len(feedback)} responses; the rest is unreadable")
    return feedback if readable else fail(f"{path} has no feedback on these prompts and responses")


def samples(records, tokenizer=None) -> list[Sample]:
    """Records with "feedback", ready to be counted by character, and by token or else by word."""
    made = []
    for record in records:
        text, truth = record["response"], record["feedback"]
        if tokenizer:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens = response_text(tokenizer, ids), token_offsets(tokenizer, ids)
        else:
            tokens = text, [word.span() for word in WORD.finditer(text)]
        views = {"token": tokens, "character": (text, [(i, i + 1) for i in range(len(text))])}
        made.append(Sample(record["prompt"], text, truth, record.get("kinds") or [], views))
    return made


def count(sample, feedback) -> Counter:
    """What one response adds to the sums of figures()."""
    n = Counter(responses=1, readable=feedback is not None)
    opinions = {"truth": sample.truth, "critic": feedback or Feedback("")}

    def overlap(truth, critic, *key):
        for part, marked in (("both", truth & critic), ("truth", truth), ("critic", critic)):
            n[(*key, part)] += marked.sum()

    for unit, (text, ranges) in sample.views.items():
        spans = {who: resolve(text, opinion)[0] for who, opinion in opinions.items()}
        truth, critic = (span_rewards(ranges, spans[who]).numpy() for who in opinions)
        for sign, value in SIGNS.items():
            overlap(truth == value, critic == value, unit, sign)
        for kind, of_kind in spans_of_kinds(sample, text).items():
            overlap(span_rewards(ranges, of_kind).numpy() < 0, critic < 0, unit, "kind", kind)
    # of the last view: whether any character is poor
    overlap((truth < 0).any(), (critic < 0).any(), "response", "poor")
    for who, opinion in opinions.items():
        _, matches = resolve(sample.response, opinion)
        n.update({(who, kind): matches[kind] for kind in MATCH_KINDS})
    return n


def spans_of_kinds(sample, text) -> dict[str, list]:
    """The truth's poor spans by kind; of a quote given twice, the first kind is the first place."""
    given, spans_of = defaultdict(list), defaultdict(list)
    for quote, kind in zip(sample.truth.plain().poor, sample.kinds):
        given[quote].append(kind)
    for quote, kinds in given.items():
        spans, _ = resolve(text, Feedback("", poor=[quote] * len(kinds)))
        for kind, span in zip(kinds, spans):
            spans_of[kind].append(span)
    return spans_of


def ratio(part, whole):
    """part / whole; nan where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def marks(n, *key):
    """Precision = both / critic, recall = both / truth, F1 = 2 both / (critic + truth)."""
    both, truth, critic = (n[(*key, part)] for part in ("both", "truth", "critic"))
    f1 = ratio(2 * both, truth + critic)
    return {"precision": ratio(both, critic), "recall": ratio(both, truth), "f1": f1}


def figures(n, kinds) -> dict:
    """Every figure of the card from sums over responses: arrays in, arrays of that shape out."""
    quotes = {who: sum(n[who, kind] for kind in MATCH_KINDS) for who in ("critic", "truth")}
    ways = zip(("verbatim", "normalised", "fuzzy", "invented"), MATCH_KINDS)
    return {
        **{sign: marks(n, "token", sign) for sign in SIGNS},
        "by_character": {sign: marks(n, "character", sign) for sign in SIGNS},
        "any_poor": marks(n, "response", "poor"),
        "json_valid": ratio(n["readable"], n["responses"]),
        **{name: ratio(n["critic", kind], quotes["critic"]) for name, kind in ways},
        "truth_invented": ratio(n["truth", "lost"], quotes["truth"]),
        "kinds": {kind: {"recall": marks(n, "token", "kind", kind)["recall"]} for kind in kinds},
    }


def card(samples, feedback, seed=0) -> dict:
    """The card of a critic that wrote feedback[i] about samples[i]; None is unreadable.

    good, poor         {precision, recall, f1} of tokens; by_character: of characters
    any_poor           the same of responses that have anything poor
    json_valid         share of responses with readable feedback
    verbatim, normalised, fuzzy, invented     shares of the critic's quotes by how they are found
    truth_invented     share of the truth's own quotes that stand nowhere: no critic can find them
    kinds              {kind: {recall of tokens, spans}} of the truth's poor spans
    intervals          the same keys with [low, high], by a bootstrap over responses, or None
    responses          their number
    """
    rows = [count(sample, one) for sample, one in zip(samples, feedback, strict=True)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = np.array([[row[name] for name in names] for row in rows], dtype=float)
    sums = (resamples(len(rows), seed) @ table).T
    n = defaultdict(lambda: np.zeros(sums.shape[1]), zip(names, sums))

    counted = Counter(kind for sample in samples for kind in sample.kinds)
    kinds = [kind for kind, _ in counted.most_common()]

    def interval(values):
        figure = bootstrapped(values)
        return None if figure["low"] is None else [figure["low"], figure["high"]]

    draws = figures(n, kinds)
    result = each(draws, lambda values: float(np.nan_to_num(values[0])))
    for kind in kinds:
        result["kinds"][kind]["spans"] = counted[kind]
    return result | {"intervals": each(draws, interval), "responses": len(rows)}


def each(figures, change):
    """The same nested keys with every figure changed."""
    return {
        name: each(value, change) if isinstance(value, dict) else change(value)
        for name, value in figures.items()
    }


def flat(figures, path=()) -> dict:
    """Nested figures under keys such as "by character, poor, recall"."""
    rows = {}
    for name, value in figures.items():
        here = (*path, name.replace("_", " "))
        rows |= flat(value, here) if isinstance(value, dict) else {", ".join(here): value}
    return rows


def write_page(path, truth, tokens, samples, feedback, cards, seed=0):
    """Writes one page with the cards of all critics and the marks of each on some responses.

    Args: truth and tokens say where they come from; feedback and cards are {critic: ...}.
    """
    chosen = random.Random(seed).sample(range(len(samples)), min(SAMPLES_SHOWN, len(samples)))
    groups = []
    for name, opinions in {"truth": [s.truth for s in samples], **feedback}.items():
        shown = [opinion(samples[i], opinions[i]) for i in sorted(chosen)]
        groups.append({"label": name, "samples": shown})
        if name in cards:
            values, intervals = flat(cards[name]), flat(cards[name]["intervals"])
            result = {row: [[values[row], *(ends or ())]] for row, ends in intervals.items()}
            groups[-1]["result"] = result
    title = f"{', '.join(cards)} against {truth}"
    about = f"{len(samples)} responses; truth: {truth}; tokens: {tokens}; in brackets 95% intervals"
    data = {"title": title, "about": about, "heading": "figure", "brackets": "[]"}
    write_html(path, data | {"groups": groups})


def opinion(sample, feedback) -> dict:
    """A response in pieces with their labels, and the critique with its quotes."""
    text, marked = sample.response, feedback or Feedback("")
    spans, _ = resolve(text, marked)
    cuts = sorted({0, len(text), *(s.start for s in spans), *(s.end for s in spans)})
    ranges = list(itertools.pairwise(cuts))
    tokens = [
        {"text": text[start:end], "delta": sign}
        for (start, end), sign in zip(ranges, span_rewards(ranges, spans).tolist())
    ]
    row = {"prompt": sample.prompt, "critique": feedback and feedback.critique, "step": 0}
    row |= {"tokens": [*tokens, {"text": "", "delta": 0}], "heldout": True}
    return row | quotes_with_tokens({"good": marked.good, "poor": marked.poor, **row})
