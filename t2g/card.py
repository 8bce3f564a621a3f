"""The card of a critic: how well its marks and quotes agree with the truth, with 95% intervals.

Every figure is a ratio of sums over responses, and its interval comes from a bootstrap over the
responses. An unreadable critique marks nothing: it lowers recall and json_valid. A ratio whose
denominator is 0 counts as 0 and has no interval (None).
"""

import re
from collections import Counter, defaultdict

import numpy as np

from t2g.align import MATCH_KINDS, resolve, response_text, span_rewards, token_offsets
from t2g.cli import fail
from t2g.feedback import Feedback
from t2g.notes import read_annotations
from t2g.statistics import bootstrapped, resamples

SIGNS = {"good": 1, "poor": -1}
QUOTES = (  # the name of the figure, whose quotes it counts, and their kind of match
    ("verbatim", "critic", "exact"),
    ("normalised", "critic", "normalised"),
    ("fuzzy", "critic", "fuzzy"),
    ("invented", "critic", "lost"),
    ("truth_invented", "truth", "lost"),
)
WORD = re.compile(r"\w+|[^\w\s]")


def read_feedback_on(records, path) -> list[Feedback | None]:
    """Returns a file's feedback on the responses of other records, None where it has none."""
    feedback_on = {}
    for record in read_annotations(path):
        feedback_on[record.get("prompt"), record.get("response")] = record["feedback"]
    feedback = [feedback_on.get((record["prompt"], record["response"])) for record in records]
    readable = len(feedback) - feedback.count(None)
    print(f"{path}: feedback on {readable} of {len(records)}; the others count as unreadable")
    return feedback if readable else fail(f"{path} has no feedback on these prompts and responses")


def card(records, feedback, tokenizer=None, seed=0) -> dict:
    """Returns the card of a critic that wrote feedback[i] about records[i]; None is unreadable.

    good, poor         {precision, recall, f1} of the tokens with that mark
    any_poor           the same of the responses that have anything poor
    json_valid         share of responses with readable feedback
    verbatim, normalised, fuzzy, invented     shares of the critic's quotes by how they are found
    truth_invented     share of the truth's own quotes that are found nowhere
    kinds              {kind: {recall of tokens, spans}} of the truth's poor spans
    intervals          the same keys with [low, high], or None
    responses          their number

    Args: records, dicts with a "response", the true "feedback" and perhaps "kinds", one for each of
        its poor quotes. Without a tokenizer words are counted instead of tokens.
    """
    rows = [count(record, one, tokenizer) for record, one in zip(records, feedback, strict=True)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = np.array([[row[name] for name in names] for row in rows], dtype=float)
    sums = (resamples(len(rows), seed) @ table).T
    n = defaultdict(lambda: np.zeros(sums.shape[1]), zip(names, sums))
    spans = Counter(kind for record in records for kind in record.get("kinds") or [])
    result, intervals = {}, {}
    for path, part, whole in ratios(n, [kind for kind, _ in spans.most_common()]):
        draws = np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
        figure = bootstrapped(draws)
        has_figure = figure["value"] is not None
        put(result, path, figure["value"] if has_figure else 0.0)
        put(intervals, path, [figure["low"], figure["high"]] if has_figure else None)
    for figures in (result, intervals):
        figures.setdefault("kinds", {})
    for kind, figure in result["kinds"].items():
        figure["spans"] = spans[kind]
    return result | {"intervals": intervals, "responses": len(rows)}


def put(tree, path, value):
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def count(record, feedback, tokenizer) -> Counter:
    """Returns what one response adds to the sums."""
    text, n = record["response"], Counter(responses=1, readable=feedback is not None)
    offsets = [word.span() for word in WORD.finditer(text)]
    if tokenizer:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        text, offsets = response_text(tokenizer, ids), token_offsets(tokenizer, ids)
    deltas = []
    for author, opinion in (("truth", record["feedback"]), ("critic", feedback or Feedback(""))):
        spans, _ = resolve(text, opinion)
        deltas.append(span_rewards(offsets, spans).numpy())
        _, matches = resolve(record["response"], opinion)  # text may be spaced differently
        n.update({(author, kind): matches[kind] for kind in MATCH_KINDS})
    truth, critic = deltas

    def compare(key, truth, critic):
        for part, marked in (("both", truth & critic), ("truth", truth), ("critic", critic)):
            n[key, part] += marked.sum()

    for sign, value in SIGNS.items():
        compare(sign, truth == value, critic == value)
    compare("any_poor", (truth < 0).any(), (critic < 0).any())
    for kind, spans in spans_by_kind(record, text).items():
        compare(("kind", kind), span_rewards(offsets, spans).numpy() < 0, critic < 0)
    return n


def spans_by_kind(record, text) -> dict[str, list]:
    """Returns the truth's poor spans by kind. The kinds of a repeated quote keep their order."""
    kinds_of, spans_of = defaultdict(list), defaultdict(list)
    for quote, kind in zip(record["feedback"].plain().poor, record.get("kinds") or []):
        kinds_of[quote].append(kind)
    for quote, kinds in kinds_of.items():
        spans, _ = resolve(text, Feedback("", poor=[quote] * len(kinds)))
        for kind, span in zip(kinds, spans):
            spans_of[kind].append(span)
    return spans_of


def ratios(n, kinds):
    """Yields the path of each figure in the card, its numerator and denominator, for all draws."""
    for key in (*SIGNS, "any_poor"):
        both, truth, critic = (n[key, part] for part in ("both", "truth", "critic"))
        yield (key, "precision"), both, critic
        yield (key, "recall"), both, truth
        yield (key, "f1"), 2 * both, truth + critic
    yield ("json_valid",), n["readable"], n["responses"]
    for name, author, match in QUOTES:
        yield (name,), n[author, match], sum(n[author, kind] for kind in MATCH_KINDS)
    for kind in kinds:
        yield ("kinds", kind, "recall"), n[("kind", kind), "both"], n[("kind", kind), "truth"]


def as_rows(card) -> dict[str, str]:
    figures, rows = flat(card), {}
    for name, ends in flat(card["intervals"]).items():
        rows[name] = f"{figures[name]:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "-"
    return rows


def flat(figures, path=()) -> dict:
    """Returns nested figures under keys such as "kinds, wrong, recall"."""
    rows = {}
    for name, value in figures.items():
        here = (*path, name.replace("_", " "))
        rows |= flat(value, here) if isinstance(value, dict) else {", ".join(here): value}
    return rows
