"""From quotes to token rewards: where the words of a critique become credit (Text2Grad, sec. 3.3).

    feedback    --resolve-->        spans   [(start, end, score)] --span_rewards--> delta (T,)
    sampled ids --token_offsets-->  offsets [(start, end)]        ------^

Both are half-open character ranges of one text, response_text(tokenizer, ids). Sampled ids are only
decoded, never re-encoded: they are often not the canonical tokenisation of their text. The rules:

1. A quote that is not found (quotes.py) rewards nothing.
2. Where a quote occurs several times, a good one marks the first occurrence and a poor one the
   last: in a text that repeats itself the repetition is at fault. A quote that is given k times
   marks k occurrences.
3. A token gets the lowest score of the spans that it overlaps, so poor wins over good; or else 0.
   White space at the ends of a quote is ignored: it belongs to the token of the word that follows.
"""

import itertools
import os.path
import re
import weakref
from collections import Counter, defaultdict

import numpy as np
import torch

from t2g.feedback import Feedback, Span, quoted
from t2g.quotes import MATCH_KINDS, find, locate, without_space  # noqa: F401 (names of align)

SENTENCE_OR_LINE = r"[.!?…][\"'”’)\]]*(?=\s)\n*|\n+"  # the end of a step of a text
_SEEN = weakref.WeakKeyDictionary()  # tokenizer -> (anchor, pieces): each token is decoded once


# ---- 1. feedback -> spans --------------------------------------------------------------------
def resolve(text: str, feedback: Feedback, severities=False) -> tuple[list[Span], Counter]:
    """Finds the spans that feedback marks in a text, and counts its quotes by kind of match.

    Good quotes score +1 and poor ones -1, times their severity if severities is True. A quote that
    occurs more often than given counts as "ambiguous" too.
    """
    spans, counts = [], Counter()
    for sign, quotes in ((1.0, feedback.good), (-1.0, feedback.poor)):
        scores_of = defaultdict(list)
        for quote in quotes:
            quote, severity = quoted(quote)
            scores_of[quote].append(sign * severity if severities else sign)
        for quote, scores in scores_of.items():
            kind, places = find(text, quote)
            counts[kind] += len(scores)
            counts["ambiguous"] += len(scores) if len(places) > len(scores) else 0
            places = places[: len(scores)] if sign > 0 else places[-len(scores) :]
            for place, score in zip(places, scores):
                spans.append(Span(*without_space(text, *place), score))
    return spans, counts


# ---- 2. sampled ids -> offsets ---------------------------------------------------------------
def response_text(tokenizer, ids) -> str:
    """Returns the text of sampled ids without special tokens: all offsets refer to this text."""
    return _decode(tokenizer, list(ids), skip_special_tokens=True)


def _decode(tokenizer, ids, **options):
    """Decodes ids; those beyond the vocabulary, at which some tokenizers fail, have no text."""
    try:
        return tokenizer.decode(ids, **options)
    except (TypeError, ValueError, LookupError):
        return tokenizer.decode([i for i in ids if i < len(tokenizer)], **options)


def token_offsets(tokenizer, ids) -> list[tuple[int, int]]:
    """Returns the half-open character range of each token in response_text(tokenizer, ids).

    The ranges tile the text. Tokens that share a character all contain it. Special tokens such as
    EOS have an empty range. A tokenizer's offset_mapping would describe the re-encoded text.

    Args: ids, T token ids as sampled. Returns: T pairs (start, end), in characters.
    Cost: one decode; one or two short ones per new token; n^2 for a run of n byte fragments.
    """
    ids = [int(i) for i in ids]
    anchor, pieces = _pieces(tokenizer, ids)
    visible = [i for i in ids if pieces[i] is not None]
    joined, ranges = "", []
    for broken, run in itertools.groupby(visible, key=lambda i: "\ufffd" in pieces[i]):
        if broken:  # fragments of characters mean something only together
            run_text, places = _offsets_by_cuts(tokenizer, anchor, list(run))
            ranges += [(len(joined) + start, len(joined) + end) for start, end in places]
            joined += run_text
        else:
            for i in run:
                ranges.append((len(joined), len(joined) + len(pieces[i])))
                joined += pieces[i]
    text = response_text(tokenizer, ids)
    lead = len(joined) - len(text)  # the space before the first word, if the decoder drops it
    if joined.endswith(text) and not joined[:lead].strip():
        ranges = [(max(start - lead, 0), max(end - lead, 0)) for start, end in ranges]
    else:
        ranges = _offsets_by_cuts(tokenizer, [], visible)[1]
    offsets, end, rest = [], 0, iter(ranges)
    for i in ids:
        offsets.append((end, end) if pieces[i] is None else next(rest))
        end = offsets[-1][1]
    return offsets


def _pieces(tokenizer, ids):
    """The text of each token behind an anchor, because decoders treat a first token differently."""
    try:
        if tokenizer not in _SEEN:
            _SEEN[tokenizer] = _anchor(tokenizer), {}
        anchor, pieces = _SEEN[tokenizer]
    except TypeError:  # a tokenizer without a hash or weak references is decoded anew each time
        anchor, pieces = _anchor(tokenizer), {}
    new = set(ids) - pieces.keys()
    skip = len(response_text(tokenizer, anchor)) if new else 0
    for i in new:
        hidden = not response_text(tokenizer, [i])
        special = hidden and _decode(tokenizer, [i], skip_special_tokens=False)
        pieces[i] = None if special else response_text(tokenizer, [*anchor, i])[skip:]
    return anchor, pieces


def _anchor(tokenizer):
    """The ids of some word, or [] if the vocabulary has none."""
    for i in range(10_000):
        try:
            word = response_text(tokenizer, [i]).strip()
        except (LookupError, ValueError, TypeError):  # the vocabulary is smaller than 10,000
            break
        if len(word) > 1 and word.isalpha():
            return [i]
    return []


def _offsets_by_cuts(tokenizer, anchor, ids):
    """The text of ids behind anchor, and the range of each token, for any decoder.

    There is a cut between two tokens if both sides, decoded apart, add up to the whole. Tokens
    without a cut between them share a character.
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
            broken = common < len(prefix) or prefix.endswith("\ufffd")  # its last character
            settled = max(settled, min(common, len(prefix) - broken, length - broken))
            # The last token ends the segment, even if it is blank when decoded alone.
            end = min(settled + broken, length) if n < behind - 1 else length
            offsets.append((base + start, base + end))
        base += length
    return text, offsets


# ---- 3. spans and offsets -> token rewards ---------------------------------------------------
SPAN_DECAY = 0.8
SPAN_WEIGHTS = {  # the weights of the tokens of a span of n tokens, from the first token on
    "uniform": np.ones,  # as in the paper
    "severity": np.ones,  # resolve() has put the severities into the scores
    "first": lambda n: np.ones(1),
    "inverse_length": lambda n: np.full(n, 1 / n),
    "decayed": lambda n: SPAN_DECAY ** np.arange(n),
}


def span_rewards(offsets, spans, weights="uniform") -> torch.Tensor:
    """Returns delta, the reward of each token: the lowest of the spans that it overlaps, or 0.

        delta_t = min of score_s * w(k, n) over spans s in which t is token k of n

    Args: offsets, T half-open ranges in order; spans, (start, end, score) in the text, with a score
        in [-1, 1]; weights, a key of SPAN_WEIGHTS, w above.
    Returns: (T,) float32. Raises: ValueError if spans or offsets are not as above.

    >>> span_rewards([(0, 3), (3, 6), (6, 9), (9, 9)], [(0, 9, 1.0), (4, 7, -1.0)])
    tensor([ 1., -1., -1.,  0.])
    """
    ranges = np.asarray(offsets).reshape(-1, 2)
    visible = np.flatnonzero(ranges[:, 0] < ranges[:, 1])
    starts, ends = ranges[visible].T
    if (np.diff(ranges) < 0).any() or (np.diff(ranges[visible], axis=0) < 0).any():
        raise ValueError("the offsets of the tokens are out of order")
    length = ends.max(initial=0)
    delta = np.full(len(visible), np.inf)
    for start, end, score in spans:
        if not (0 <= start < end <= length and -1 <= score <= 1):
            raise ValueError(f"the span ({start}, {end}, {score}) is empty or out of bounds")
        first = np.searchsorted(ends, start, side="right")  # the first token that ends after start
        behind = np.searchsorted(starts, end)  # the first token that does not start before end
        if first < behind:
            values = score * SPAN_WEIGHTS[weights](behind - first)
            overlap = delta[first : first + len(values)]
            np.minimum(overlap, values, out=overlap)
    rewards = np.zeros(len(ranges), dtype=np.float32)
    rewards[visible] = np.where(np.isinf(delta), 0, delta)
    return torch.from_numpy(rewards)


def steps(offsets, text: str, step_end: str = SENTENCE_OR_LINE) -> list[int]:
    """Numbers the steps of a text, its sentences or lines, and returns the step of each token.

    >>> steps([(0, 4), (4, 5), (5, 9), (9, 10), (10, 10)], "Sure. Yes.")
    [0, 0, 1, 1, 1]
    """
    ends = [match.end() for match in re.finditer(step_end, text)]
    ended = np.searchsorted(ends, [start for start, _ in offsets], side="right")
    return np.unique(ended, return_inverse=True)[1].tolist()  # one token may end several steps
