"""Where a quote occurs in a text: verbatim, normalised, or by likeness.

1. exact       The same characters.
2. normalised  The same characters but for what a reader hardly sees: white space, case, Unicode's
               forms of a character, kinds of quotation marks and hyphens, Markdown's emphasis, and
               invisible characters. The normalised text remembers the place of each character.
3. fuzzy       The closest run of whole words, if its partial ratio reaches FUZZY_THRESHOLD.

A place that cuts a word in two counts only if no exact or normalised place is whole. In scripts
without spaces, such as Chinese or Thai, each character is a word of its own.
"""

import itertools
import re
import unicodedata
from functools import lru_cache

MATCH_KINDS = ("exact", "normalised", "fuzzy", "lost")
FUZZY_THRESHOLD = 90.0  # per cent, rapidfuzz's partial ratio
FUZZY_MIN_CHARS = 8  # shorter quotes resemble too many words
DOUBLE, SINGLE, HYPHENS = "“”„‟«»「」『』", "‘’‚‛‹›´", "‐‑‒–—―−"
SAME_MARK = {ord(c): mark for mark, alike in zip("\"'-", (DOUBLE, SINGLE, HYPHENS)) for c in alike}
EMPHASIS = re.compile(r"(?<![0-9A-Za-z])[*_~`]+(?=\S)|(?<=\S)[*_~`]+(?![0-9A-Za-z])")
INVISIBLE = re.compile(  # soft hyphens, zero-width spaces and joiners, directions, variants,
    r"[\u0640\u064b-\u0652\u0670"  # Arabic's long lines and short vowels
    r"\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]"
)
UNSPACED = re.compile(  # Thai, Lao, Tibetan, Burmese; Khmer; kana; Chinese characters
    r"[\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    r"\U00020000-\U0003ffff]"
)
BESIDE = re.compile(rf"(?<={UNSPACED.pattern})\s+|\s+(?={UNSPACED.pattern})")  # such as 用 CT 检查


def locate(text: str, quote: str) -> list[tuple[int, int]]:
    """Returns the ranges of a text where a quote occurs, in order.

    >>> locate("He is 27, not 27 and a half. In 1927?", "27")
    [(6, 8), (14, 16)]
    """
    return find(text, quote)[1]


def find(text: str, quote: str) -> tuple[str, list[tuple[int, int]]]:
    """Returns the kind of match, one of MATCH_KINDS, and the ranges of locate()."""
    if not quote.strip():
        return "lost", []
    exact = _occurrences(text, quote)
    if whole := _whole_words(text, exact):
        return "exact", whole
    quote = " ".join(quote.split())
    if len(quote) > 20 * len(text):  # NFKC makes at most 18 characters of one
        return "lost", []
    plain_text, origin = _normalise(text)
    plain_quote, _ = _normalise(quote)
    unwrapped = plain_quote.strip("\"' ")

    def places_of(wanted):
        ranges = _occurrences(plain_text, wanted) if wanted.strip() else []
        return list(dict.fromkeys((origin[start][0], origin[end - 1][1]) for start, end in ranges))

    normalised = places_of(plain_quote) or places_of(unwrapped)
    if whole := _whole_words(text, normalised):
        return "normalised", whole
    if exact or normalised:
        return ("exact", exact) if exact else ("normalised", normalised)
    if closest := _closest(plain_text, unwrapped):
        places = places_of(plain_text[slice(*closest)])
        return "fuzzy", _whole_words(text, places) or places
    return "lost", []


def _occurrences(text, quote):
    """All ranges with exactly this text, overlapping ones included."""
    places, start = [], text.find(quote)
    while start >= 0:
        places.append((start, start + len(quote)))
        start = text.find(quote, start + 1)
    return places


def _whole_words(text, places):
    """The places that cut no word in two."""
    return [p for p in places if not (_inside_word(text, p[0]) or _inside_word(text, p[1]))]


def _inside_word(text, i):
    """Whether a cut before character i falls into a word or a number such as 1.27 or 1,927."""
    around = text[max(i - 1, 0) : i + 1]
    if len(around) < 2 or UNSPACED.search(around):
        return False
    return all(map(_in_words, around)) or bool(re.search(r"\d[.,]\d", text[max(i - 2, 0) : i + 2]))


def _in_words(char):
    """Whether a character belongs to words: a letter, a digit, an underscore, or an accent."""
    return char.isalnum() or char == "_" or unicodedata.category(char).startswith("M")


@lru_cache(maxsize=32)  # all quotes of a response are searched for in the same text
def _normalise(text) -> tuple[str, list[tuple[int, int]]]:
    """The text as rule 2 compares it, and the original range of each of its characters."""
    skipped = set()
    for pattern in (EMPHASIS, INVISIBLE, BESIDE):
        for match in pattern.finditer(text):
            skipped.update(range(*match.span()))
    pieces = []  # [start, end, characters]: runs of spaces, and characters that compose
    for i, char in enumerate(text):
        if i in skipped:
            continue
        if pieces and _joins(pieces[-1][2], char):
            pieces[-1][1:] = i + 1, pieces[-1][2] + char
        else:
            pieces.append([i, i + 1, char])
    out, origin = [], []
    for start, end, piece in pieces:
        plain = unicodedata.normalize("NFKC", piece.translate(SAME_MARK)).casefold()
        plain = " " if piece.isspace() else unicodedata.normalize("NFKC", plain)
        out.append(plain)
        origin += [(start, end)] * len(plain)
    return "".join(out), origin


def _joins(piece, char):
    """Whether a character and those before it are one space, letter or syllable."""
    if char.isspace() or char.isascii():
        return char.isspace() and piece.isspace()
    before, after, both = (unicodedata.normalize("NFKC", x) for x in (piece, char, piece + char))
    return both != before + after


def _closest(text, quote):
    """The range of whole words that is most similar to quote, None below FUZZY_THRESHOLD."""
    from rapidfuzz import fuzz  # only fuzzy matches need this package

    if not FUZZY_MIN_CHARS <= len(quote) <= len(text) / (FUZZY_THRESHOLD / 100):
        return None
    match = fuzz.partial_ratio_alignment(quote, text, score_cutoff=FUZZY_THRESHOLD)
    if not match or match.dest_start == match.dest_end:
        return None
    # The match may cut words: compare the windows that start and end one word before or after it.
    words = [(start, end) for start, end in pieces(text) if _in_words(text[start])]
    first = sum(end <= match.dest_start for _, end in words)
    behind = sum(start < match.dest_end for start, _ in words)
    starts, ends = words[max(first - 1, 0) : first + 2], words[max(behind - 2, 0) : behind + 1]
    windows = [(start, end) for start, _ in starts for _, end in ends if start < end]
    # Where a word is much longer than the quote, as in a URL, the match itself is the place.
    half = len(quote) / 2
    windows = [(start, end) for start, end in windows if abs(end - start - len(quote)) <= half]
    if not windows and any(map(_in_words, text[match.dest_start : match.dest_end])):
        return match.dest_start, match.dest_end
    return max(windows, key=lambda window: fuzz.ratio(quote, text[slice(*window)]), default=None)


@lru_cache(maxsize=32)
def pieces(text) -> list[tuple[int, int]]:
    """The ranges of the words of a text and of the characters between them, in order."""
    cuts = [i for i in range(len(text) + 1) if not _inside_word(text, i)]
    return list(itertools.pairwise(cuts))


def without_space(text, start, end) -> tuple[int, int]:
    place = text[start:end]
    return end - len(place.lstrip()), start + len(place.rstrip())
