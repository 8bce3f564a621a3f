"""Quotes -> character spans -> token rewards: where the words of a critique become credit (Text2Grad, sec. 3.3).

    feedback --resolve--> spans [(start, end, score)] --token_offsets, span_rewards--> delta (T,) in [-1, 1]

Sampled ids are sacred: they are decoded to be read and never encoded again, for a sampled sequence is often not the
canonical tokenisation of its own text. The written rules:

1. A quote is looked for as it stands; if it is nowhere, up to white space, quotation marks and case; if it is still nowhere,
   by the closest match above FUZZY_THRESHOLD. Each way is counted apart, and a quote that is nowhere rewards nothing.
2. Of a quote that stands in several places, good marks the first one and poor the last one: saying a thing twice is paid once,
   and what people fault in a text that repeats itself is the repetition. A quote that is given k times marks k places. A place
   that cuts a word in two counts only if there is no other.
3. A token takes the lowest score of the spans that it overlaps: poor wins over good. No span, no reward. White space at the
   ends of a quote marks nothing, for the space before a word is part of that word's token.
"""

import itertools
import os.path
import re
import weakref
from bisect import bisect_right
from collections import Counter, defaultdict
from functools import lru_cache

import numpy as np
import torch
from rapidfuzz import fuzz

from t2g.feedback import Feedback, Span, quoted

FUZZY_THRESHOLD = 90.0  # percent, rapidfuzz's partial ratio
FUZZY_MIN_CHARS = 8  # shorter quotes resemble too much
SPAN_DECAY = 0.8  # of the weight, from token to token
SENTENCE_OR_LINE = r"[.!?…][\"'”’)\]]*(?=\s)\n*|\n+"  # what ends a step of a text
MATCH_KINDS = ("exact", "normalised", "fuzzy", "lost")
SAME_MARK = str.maketrans(
    {**dict.fromkeys("“”„«»", '"'), **dict.fromkeys("‘’‚`´", "'"), **dict.fromkeys("–—", "-")}
)


# ---- tokens: where each one stands in the text ---------------------------------------------------------------------------


def response_text(tokenizer, ids) -> str:
    """The text of sampled ids without special tokens: what critics read, and what every offset refers to."""
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def token_offsets(tokenizer, ids) -> list[tuple[int, int]]:
    """The half-open character range of each token in response_text(tokenizer, ids).

    The ranges tile the text. Tokens that share a character (one of several bytes, say) all carry it; EOS and other special
    tokens have an empty range. Only decode() is asked, so any tokenizer will do; its own offset_mapping would speak of the
    re-encoded text.

    Args: ids, the T token ids as sampled. Returns: T pairs (start, end), in characters.
    Cost: one decode, and a short one or two for each token that this tokenizer was never asked about before. A run of byte
    fragments costs the square of its own length, and so does a text that is not the sum of what its tokens write.
    """
    ids = [int(i) for i in ids]
    anchor, pieces = _pieces(tokenizer, ids)
    written = [i for i in ids if pieces[i] is not None]
    rest = iter(
        _offsets_of_written(tokenizer, response_text(tokenizer, ids), written, anchor, pieces)
    )
    offsets, end = [], 0
    for i in ids:
        offsets.append((end, end) if pieces[i] is None else next(rest))
        end = offsets[-1][1]
    return offsets


_KNOWN = (
    weakref.WeakKeyDictionary()
)  # tokenizer -> (anchor, pieces): what it said once need not be asked again


def _pieces(tokenizer, ids):
    """A word to read tokens behind, [] if there is none, and what each token writes behind it; None for special tokens.

    Decoders treat the first token of a text in their own way (its space is dropped, say), hence the word.
    """
    try:
        if tokenizer not in _KNOWN:
            _KNOWN[tokenizer] = _anchor(tokenizer), {}
        anchor, pieces = _KNOWN[tokenizer]
    except TypeError:  # it has no hash or no weak reference: it is asked anew each time
        anchor, pieces = _anchor(tokenizer), {}
    new = set(ids) - pieces.keys()
    if not new:
        return anchor, pieces
    skip = len(response_text(tokenizer, anchor))
    for i in new:
        special = not response_text(tokenizer, [i]) and tokenizer.decode(
            [i], skip_special_tokens=False
        )
        pieces[i] = None if special else response_text(tokenizer, [*anchor, i])[skip:]
    return anchor, pieces


def _anchor(tokenizer):
    for i in range(10_000):
        try:
            word = response_text(tokenizer, [i]).strip()
        except (LookupError, ValueError, TypeError):  # the vocabulary is smaller than that
            break
        if len(word) > 1 and word.isalpha():
            return [i]
    return []


def _offsets_of_written(tokenizer, text, ids, anchor, pieces):
    """token_offsets() of ids without special tokens, given what each token writes behind an anchor."""
    runs = []  # (text, the tokens' ranges in that text); byte fragments mean something only together
    for fragments, group in itertools.groupby(ids, key=lambda i: "\ufffd" in pieces[i]):
        group = list(group)
        if fragments:
            runs.append(_offsets_by_cuts(tokenizer, anchor, group))
        else:
            ends = list(itertools.accumulate(len(pieces[i]) for i in group))
            runs.append(("".join(pieces[i] for i in group), list(zip([0, *ends], ends))))

    joined = "".join(run_text for run_text, _ in runs)
    lead = len(joined) - len(text)
    if not joined.endswith(text) or joined[:lead].strip():
        return _offsets_by_cuts(tokenizer, [], ids)[
            1
        ]  # this text is not the sum of its tokens: cut it
    offsets, base = [], -lead
    for run_text, local in runs:
        offsets += [(max(base + start, 0), max(base + end, 0)) for start, end in local]
        base += len(run_text)
    return offsets


def _offsets_by_cuts(
    tokenizer, anchor: list[int], ids: list[int]
) -> tuple[str, list[tuple[int, int]]]:
    """The text that ids add behind anchor and each token's range in it, read off where the text can be cut in two.

    Between two tokens there is a cut if what they write apart is what they write together. Tokens without a cut between them
    hold parts of one character, say: each one then ends with the first bytes of the next character.
    """

    def read(part):
        return response_text(tokenizer, anchor + part)[skip:]

    skip = len(response_text(tokenizer, anchor))
    text = read(ids)
    cuts = [n for n in range(len(ids) + 1) if read(ids[:n]) + read(ids[n:]) == text]
    offsets, base = [], 0
    for first, behind in itertools.pairwise(cuts):
        length, settled = len(read(ids[:behind])) - base, 0
        for n in range(first, behind):
            start, prefix = settled, read(ids[first : n + 1])
            common = len(os.path.commonprefix([prefix, text[base : base + length]]))  # noqa: RUF071
            broken = common < len(prefix) or prefix.endswith(
                "\ufffd"
            )  # the last character of the prefix is not yet whole
            settled = max(settled, min(common, len(prefix) - broken, length - broken))
            offsets.append((base + start, base + min(settled + broken, length)))
        base += length
    return text, offsets


# ---- quotes: where each one stands in the text ---------------------------------------------------------------------------


def locate(text: str, quote: str) -> list[tuple[int, int]]:
    """Where a quote stands in text: half-open character ranges in order, [] if nowhere. See the rules above.

    >>> locate("He is 27, not 27 and a half. In 1927?", "27")
    [(6, 8), (14, 16)]
    >>> locate("She said “Yes  please”.", '"yes please"')
    [(9, 22)]
    """
    return find(text, quote)[1]


def find(text: str, quote: str) -> tuple[str, list[tuple[int, int]]]:
    """locate() with the way in which the quote was found: "exact", "normalised", "fuzzy" or "lost"."""
    if not quote.strip():
        return "lost", []
    if places := _whole_words(text, _occurrences(text, quote)):
        return "exact", places
    quote = " ".join(quote.split())
    if len(quote) > 4 * len(text):  # too long by far, even for a text that case folding triples
        return "lost", []
    plain_text, origin = _normalise(text)
    plain_quote, _ = _normalise(quote)

    def back(start, end):
        return origin[start][0], origin[end - 1][1]

    for wanted in (plain_quote, unwrapped := plain_quote.strip("\"' ")):
        if wanted and (places := _occurrences(plain_text, wanted)):
            return "normalised", _whole_words(
                text, list(dict.fromkeys(back(*place) for place in places))
            )
    if place := _closest(plain_text, unwrapped):
        return "fuzzy", _whole_words(
            text, [back(*twin) for twin in _occurrences(plain_text, plain_text[slice(*place)])]
        )
    return "lost", []


def _closest(text, quote):
    """The range of whole words of text that is most like quote, None if none is like enough."""
    if not FUZZY_MIN_CHARS <= len(quote) <= len(text) / (FUZZY_THRESHOLD / 100):
        return None
    match = fuzz.partial_ratio_alignment(quote, text, score_cutoff=FUZZY_THRESHOLD)
    if not match or match.dest_start == match.dest_end:
        return None
    words = [word.span() for word in re.finditer(r"\w+", text)]
    first = sum(
        end <= match.dest_start for _, end in words
    )  # the first word that the match touches, and the one behind it
    behind = sum(start < match.dest_end for start, _ in words)
    starts, ends = words[max(first - 1, 0) : first + 2], words[max(behind - 2, 0) : behind + 1]
    windows = [(start, end) for start, _ in starts for _, end in ends if start < end]
    return max(windows, key=lambda window: fuzz.ratio(quote, text[slice(*window)]), default=None)


def _occurrences(text, quote):
    """All of them, the overlapping ones too."""
    places, start = [], text.find(quote)
    while start >= 0:
        places.append((start, start + len(quote)))
        start = text.find(quote, start + 1)
    return places


def _whole_words(text, places):
    return [
        (start, end)
        for start, end in places
        if not (_inside_word(text, start) or _inside_word(text, end))
    ] or places


def _inside_word(text, i) -> bool:
    """True if letters or digits stand on both sides of i; "1.27" and "1,927" are words as well."""
    beside = 0 < i < len(text) and text[i - 1].isalnum() and text[i].isalnum()
    return beside or bool(re.search(r"\d[.,]\d", text[max(i - 2, 0) : i + 2]))


@lru_cache(maxsize=32)  # all quotes of a response are looked for in the same text
def _normalise(text) -> tuple[str, list[tuple[int, int]]]:
    """Text with one space for white space, plain quotation marks and no case; and each character's range in the original."""
    out, origin = [], []
    for piece in re.finditer(r"\s+|\S", text):
        plain = " " if piece[0].isspace() else piece[0].translate(SAME_MARK).casefold()
        out.append(plain)
        origin += [piece.span()] * len(plain)
    return "".join(out), origin


def resolve(text: str, feedback: Feedback, severities=False) -> tuple[list[Span], Counter]:
    """The spans that feedback marks in text, and counts of how its quotes were found.

    The score is +1 for good quotes and -1 for poor ones, times the severity that the feedback gives if severities are asked for.
    The counts: each quote under its kind of match, and "ambiguous" if it stands in more places than it was given times.
    """
    spans, counts = [], Counter()
    for sign, quotes in ((1.0, feedback.good), (-1.0, feedback.poor)):
        given = defaultdict(list)
        for quote in quotes:
            quote, severity = quoted(quote)
            given[quote].append(sign * severity if severities else sign)
        for quote, scores in given.items():
            kind, places = find(text, quote)
            counts[kind] += len(scores)
            counts["ambiguous"] += len(scores) if len(places) > len(scores) else 0
            places = places[: len(scores)] if sign > 0 else places[-len(scores) :]
            spans += [
                Span(*without_space(text, *place), score) for place, score in zip(places, scores)
            ]
    return spans, counts


def without_space(text, start, end) -> tuple[int, int]:
    """The range without the white space at its ends."""
    place = text[start:end]
    return end - len(place.lstrip()), start + len(place.rstrip())


# ---- the meeting of the two ----------------------------------------------------------------------------------------------


SPAN_WEIGHTS = {  # what the tokens of a span of n tokens weigh, from the first one on
    "uniform": lambda n: np.ones(n),  # the paper's
    "severity": lambda n: np.ones(n),  # with the scores that the feedback gives
    "first": lambda n: np.ones(1),
    "inverse_length": lambda n: np.full(n, 1 / n),
    "decayed": lambda n: SPAN_DECAY ** np.arange(n),
}


def span_rewards(offsets, spans, weights="uniform") -> torch.Tensor:
    """delta: the reward of each token, the lowest one of the spans that its characters overlap, 0 if there is none.

        delta_t = min over spans s that weigh t of score_s w(k, n)        t is token k of the n tokens of s

    Args: offsets, T half-open ranges in order; spans, (start, end, score) with score in [-1, 1]; weights, a key of SPAN_WEIGHTS.
    Returns: (T,) float32.
    Raises: ValueError for a span that is empty, reversed or outside the text, or a score that is no number in [-1, 1], or
        offsets that are out of order.

    >>> span_rewards([(0, 3), (3, 6), (6, 9), (9, 9)], [(0, 9, 1.0), (4, 7, -1.0)])
    tensor([ 1., -1., -1.,  0.])
    """
    ranges = np.asarray(offsets).reshape(-1, 2)
    written = np.flatnonzero(ranges[:, 0] < ranges[:, 1])
    starts, ends = ranges[written].T
    if (
        (np.diff(starts) < 0).any()
        or (np.diff(ends) < 0).any()
        or (ranges[:, 0] > ranges[:, 1]).any()
    ):
        raise ValueError("the offsets of the tokens are out of order")
    length = ends.max(initial=0)
    delta = np.full(len(written), np.inf)
    for start, end, score in spans:
        if not 0 <= start < end <= length:
            raise ValueError(
                f"the span ({start}, {end}) is empty, reversed or outside the text of {length} characters"
            )
        if not -1 <= score <= 1:
            raise ValueError(
                f"the score {score} of the span ({start}, {end}) is no number in [-1, 1]"
            )
    marks = np.asarray(spans).reshape(-1, 3)
    first = np.searchsorted(ends, marks[:, 0], side="right")
    behind = np.searchsorted(starts, marks[:, 1])
    for token, n, score in zip(first, behind - first, marks[:, 2]):
        if n:
            values = score * SPAN_WEIGHTS[weights](n)
            delta[token : token + len(values)] = np.minimum(
                delta[token : token + len(values)], values
            )
    rewards = np.zeros(len(ranges), dtype=np.float32)
    rewards[written] = np.where(np.isinf(delta), 0, delta)
    return torch.from_numpy(rewards)


def steps(offsets, text: str, step_end: str = SENTENCE_OR_LINE) -> list[int]:
    """The number of the step, a sentence or a line, in which each token begins: for rewards by step.

    >>> steps([(0, 4), (4, 5), (5, 9), (9, 10), (10, 10)], "Sure. Yes.")
    [0, 0, 1, 1, 1]
    """
    ends = [match.end() for match in re.finditer(step_end, text)]
    ended = [
        bisect_right(ends, start) for start, _ in offsets
    ]  # how many ends stand before each token: one may hold several
    numbers = {count: number for number, count in enumerate(sorted(set(ended)))}
    return [numbers[count] for count in ended]
