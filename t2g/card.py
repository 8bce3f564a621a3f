"""The card of a reward model: its marks, quotes and critiques against a truth, by token and by character, with 95% intervals.

    records of the truth -> samples();    samples and what a critic says of them -> card();    the cards -> write_page()

Every figure is made of sums over responses, so that a draw of the bootstrap is but other weights of the responses, and all
draws together one matrix product. An unreadable critique marks nothing: it counts in recall, and in json_valid. What would
divide by 0 is 0 and has no interval (None).

Left out: where responses and critiques come from (eval.py, critics.py).
"""

import itertools
import os
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from extras.human.spans import WORD
from t2g.align import MATCH_KINDS, find, resolve, response_text, span_rewards, token_offsets
from t2g.cli import fail, make_folder
from t2g.feedback import Feedback
from t2g.notes import read_annotations
from t2g.page import write_html

SIGNS = {"good": 1, "poor": -1}
SIZES = ("characters", "spans", "words")  # how much is marked, and written
DRAWS = 1000  # of the bootstrap
SAMPLES_SHOWN = 24


class Sample(NamedTuple):
    """A response and the truth about it. A view is a text and the ranges in it that are counted: its tokens, its characters."""

    prompt: str
    response: str
    truth: Feedback
    kinds: list[str]  # of the truth's poor quotes, one each
    views: dict[str, tuple[str, list[tuple[int, int]]]]


# ---- annotations ---------------------------------------------------------------------------------------------------------


def truth_of(path, limit, seed) -> list[dict]:
    """The records of a file that hold feedback, all or so many of them drawn at random; what is left out is counted."""
    records = read_annotations(path)
    kept = [record for record in records if record["feedback"]]
    print(f"{len(kept)} of {len(records)} records of {path} are of use: their status is ok")
    if not kept:
        fail(f"{path} holds no record whose status is ok")
    return random.Random(seed).sample(kept, limit) if limit and limit < len(kept) else kept


def same_records(path, records, truth_path) -> list[Feedback | None]:
    """What another critic wrote of the same records, by their ids; None where it failed or the record is absent."""
    others, wanted = by_id(read_annotations(path), path), by_id(records, truth_path)
    for name in others.keys() & wanted.keys():
        if others[name]["feedback"] and any(
            others[name][field] != wanted[name][field] for field in ("prompt", "response")
        ):
            fail(
                f"record {name} of {path} has another prompt or response than that of {truth_path}; annotate the same responses"
            )
    found = [others[name]["feedback"] if name in others else None for name in wanted]
    if not any(found):
        fail(
            f"{path} says nothing readable of the {len(found)} records of {truth_path}: none of their ids is in it with status ok"
        )
    print(
        f"{path}: {len(found) - found.count(None)} of {len(found)} records, the others count as unreadable"
    )
    return found


def by_id(records, path) -> dict[str, dict]:
    if not all(isinstance(record.get("id"), str) for record in records):
        fail(f"{path} has a record whose id is no text, and records of two files are matched by it")
    return {record["id"]: record for record in records}


def samples(records, tokenizer=None) -> list[Sample]:
    """Records with "feedback", ready to be counted: by character, and by the tokenizer's tokens or, without one, by words.

    Quotes are looked for in the response as it stands for the characters, in the text that its tokens decode to for the tokens.
    """
    found = []
    for record in records:
        text, kinds = (
            record["response"],
            record.get("kinds") or ["unnamed"] * len(record["feedback"].poor),
        )
        if tokenizer:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens = response_text(tokenizer, ids), token_offsets(tokenizer, ids)
        else:
            tokens = text, [word.span() for word in WORD.finditer(text)]
        views = {"token": tokens, "character": (text, [(i, i + 1) for i in range(len(text))])}
        found.append(Sample(record["prompt"], text, record["feedback"], kinds, views))
    return found


# ---- sums of counts ------------------------------------------------------------------------------------------------------


def labels(view, feedback) -> np.ndarray:
    """+1, -1 or 0 for each range of the view: each one counts once, poor wins over good, and where it stands is what counts."""
    text, ranges = view
    return span_rewards(ranges, resolve(text, feedback)[0]).numpy()


def count(sample, feedback) -> Counter:
    """What one response adds to the sums that figures() are made of."""
    n, said = Counter(responses=1, readable=feedback is not None), feedback or Feedback("")

    def overlap(truth, guess, *key):
        n.update(
            {
                (*key, "both"): (truth & guess).sum(),
                (*key, "truth"): truth.sum(),
                (*key, "critic"): guess.sum(),
            }
        )

    for unit, view in sample.views.items():
        truth, guess = labels(view, sample.truth), labels(view, said)
        n[unit] = len(truth)
        for sign, value in SIGNS.items():
            overlap(truth == value, guess == value, unit, sign)
        for kind, spans in spans_of_kinds(sample, view[0]).items():
            overlap(span_rewards(view[1], spans).numpy() < 0, guess < 0, unit, "kind", kind)
    for sign in SIGNS:
        both, truth, guess = (n["character", sign, part] for part in ("both", "truth", "critic"))
        n["iou", sign], n["either", sign] = both / max(truth + guess - both, 1), truth + guess > 0
        overlap(np.array(truth > 0), np.array(guess > 0), "response", sign)
    sizes = {}
    for who, words in (("truth", sample.truth), ("critic", said)):
        spans, found = resolve(sample.response, words)
        n.update({(who, kind): found[kind] for kind in MATCH_KINDS})
        sizes[who] = (
            sum(n["character", sign, who] for sign in SIGNS),
            len(spans),
            len(words.critique.split()),
        )
    for what, x, y in zip(SIZES, sizes["critic"], sizes["truth"]) if feedback else ():
        n.update(
            {
                (what, "x"): x,
                (what, "y"): y,
                (what, "xx"): x * x,
                (what, "xy"): x * y,
                (what, "yy"): y * y,
            }
        )
    return n


def spans_of_kinds(sample, text) -> dict[str, list]:
    """Where the truth's poor quotes of each kind stand. Of a quote that is given twice, the first kind has the first place."""
    given, found = defaultdict(list), defaultdict(list)
    for quote, kind in zip(sample.truth.plain().poor, sample.kinds):
        given[quote].append(kind)
    for quote, kinds in given.items():
        spans, _ = resolve(text, Feedback("", poor=[quote] * len(kinds)))
        for kind, span in zip(kinds, spans):
            found[kind].append(span)
    return found


# ---- figures of sums -----------------------------------------------------------------------------------------------------


def ratio(part, whole):
    """part / whole, and not a number where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def marks(n, *key):
    """Precision = both / critic, recall = both / truth, F1 = 2 both / (critic + truth)."""
    both, truth, critic = (n[(*key, part)] for part in ("both", "truth", "critic"))
    return {
        "precision": ratio(both, critic),
        "recall": ratio(both, truth),
        "f1": ratio(2 * both, truth + critic),
    }


def calibration(n, what):
    """How much the critic marks or writes (x) against the truth (y), over responses with a readable critique.

    mean x, mean y, mean x / mean y, and Pearson's correlation of x and y over the responses.
    """
    number, x, y, xx, xy, yy = (
        n["readable"],
        *(n[what, sum_of] for sum_of in ("x", "y", "xx", "xy", "yy")),
    )
    spread = np.sqrt((number * xx - x * x) * (number * yy - y * y))
    means = {"critic": ratio(x, number), "truth": ratio(y, number)}
    return means | {"ratio": ratio(x, y), "correlation": ratio(number * xy - x * y, spread)}


def figures(n, kinds) -> dict:
    """Every figure of the card from sums over the responses: arrays in, arrays of the same shape out."""
    quotes = {who: sum(n[who, kind] for kind in MATCH_KINDS) for who in ("critic", "truth")}
    verbatim, normalised, fuzzy, invented = (
        ratio(n["critic", kind], quotes["critic"]) for kind in MATCH_KINDS
    )
    labelled = {
        who: ratio(sum(n["token", sign, who] for sign in SIGNS), n["token"])
        for who in ("critic", "truth")
    }
    recalls = {"recall": "token", "recall_by_character": "character"}
    return {
        **{sign: marks(n, "token", sign) for sign in SIGNS},
        "by_character": {sign: marks(n, "character", sign) for sign in SIGNS},
        "any_poor": marks(n, "response", "poor"),
        "iou": {sign: ratio(n["iou", sign], n["either", sign]) for sign in SIGNS},
        "json_valid": ratio(n["readable"], n["responses"]),
        "verbatim": verbatim, "normalised": normalised, "fuzzy": fuzzy, "invented": invented,
        "truth_invented": ratio(n["truth", "lost"], quotes["truth"]),
        "labelled": labelled,
        "calibration": {what: calibration(n, what) for what in SIZES},
        "kinds": {kind: {name: marks(n, unit, "kind", kind)["recall"] for name, unit in recalls.items()} for kind in kinds},
    }  # fmt: skip


def card(samples, feedback, seed=0) -> dict:
    """The card of a critic that said feedback[i], None if unreadable, of samples[i].

    good, poor         {precision, recall, f1} of tokens; by_character: the same of characters
    any_poor           the same of responses that have anything poor
    iou                {good, poor}: marked by both / marked by either, in characters of a response, mean over responses
                       in which either marks any
    json_valid         share of responses with readable feedback
    verbatim, normalised, fuzzy, invented     shares of the critic's quotes by how they were found; invented ones stand nowhere
    truth_invented     the share of the truth's own quotes that stand nowhere: nothing can find them
    labelled           {critic, truth}: share of tokens with a mark
    calibration        {characters, spans, words}: see calibration()
    kinds              {kind: {recall, recall_by_character, spans, tokens}} of the truth's poor spans, {} if it names none
    intervals          the same keys with [low, high]: percentiles of a bootstrap over responses; None where nothing is divided
    responses          their number
    """
    rows = [count(sample, said) for sample, said in zip(samples, feedback, strict=True)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = np.array([[row[name] for name in names] for row in rows], dtype=float)
    draws = np.random.default_rng(seed).multinomial(
        len(rows), np.full(len(rows), 1 / len(rows)), DRAWS
    )
    sums = (
        np.vstack([np.ones(len(rows)), draws]) @ table
    )  # (1 + DRAWS, names), the first row the sums themselves
    n = defaultdict(lambda: np.zeros(1 + DRAWS), zip(names, sums.T))

    counted = Counter(kind for sample in samples for kind in sample.kinds)
    kinds = [kind for kind, _ in counted.most_common()] if set(counted) != {"unnamed"} else []
    found = figures(n, kinds)
    result = each(found, lambda values: float(np.nan_to_num(values[0])))
    for kind in kinds:
        result["kinds"][kind] |= {
            "spans": counted[kind],
            "tokens": int(n["token", "kind", kind, "truth"][0]),
        }
    return result | {"intervals": each(found, bounds), "responses": len(rows)}


def each(figures, change):
    """The same nested keys with every figure changed."""
    return {
        name: each(value, change) if isinstance(value, dict) else change(value)
        for name, value in figures.items()
    }


def bounds(values) -> list[float] | None:
    """The 95% interval of the draws behind a figure; those that divide by 0 say nothing."""
    return None if np.isnan(values[0]) else np.nanquantile(values[1:], (0.025, 0.975)).tolist()


# ---- the page ------------------------------------------------------------------------------------------------------------


def page_path(out, critic) -> Path:
    """Where the page goes: out, or else card.html in the critic's folder or, where it has none, in the current one."""
    path = Path(out) if out else Path(critic if Path(critic).is_dir() else ".") / "card.html"
    make_folder(path.parent, "--out")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        fail(f"{path} cannot be written; choose another --out")
    return path


def write_page(path, truth, tokens, samples, said, cards, seed=0):
    """One HTML file without network: the cards of critics side by side, and responses, drawn at random, with everyone's marks.

    Args: truth and tokens, where they come from, in words; said and cards, {critic: a list of feedback}, {critic: card()}.
    Texts go into the page as JSON and are shown as text.
    """
    short = {name: Path(name).name for name in cards}
    names = [short[name] if len(set(short.values())) == len(short) else name for name in cards]
    shown = sorted(
        random.Random(seed).sample(range(len(samples)), min(SAMPLES_SHOWN, len(samples)))
    )
    rows = []
    for i in shown:
        opinions = [
            opinion(samples[i], feedback)
            for feedback in (samples[i].truth, *(said[name][i] for name in cards))
        ]
        rows.append({"prompt": samples[i].prompt, "opinions": opinions})
    data = {
        "title": f"{', '.join(names)} against {truth}",
        "about": f"{len(samples)} responses. The truth: {truth}. Tokens: {tokens}.",
        "critics": [{"name": name, **card} for name, card in zip(names, cards.values())],
        "samples": rows,
    }
    write_html(path, "card.html", data)


def opinion(sample, feedback) -> dict | None:
    """What the page shows of feedback: the response in pieces with their marks, the critique, and quotes that stand nowhere."""
    if feedback is None:
        return None
    pairs = itertools.groupby(
        zip(sample.response, labels(sample.views["character"], feedback).tolist()),
        key=lambda pair: pair[1],
    )
    pieces = [["".join(character for character, _ in group), sign] for sign, group in pairs]
    plain = feedback.plain()
    lost = [quote for quote in plain.good + plain.poor if find(sample.response, quote)[0] == "lost"]
    return {"pieces": pieces, "critique": feedback.critique, "lost": lost}
