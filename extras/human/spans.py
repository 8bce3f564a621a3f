"""Do quotes mark what people marked? Their spans are given back as quotes, and compared.

    python -m extras.human.spans --data FILE [TOKENIZER ...]

Tokenizers are folders, hub ids or .gguf files. The last line printed is a JSON object.

Each line of FILE is an object in one of three forms: {"response": text, "spans": [[start, end],
...]}; FineGrainedRLHF's QA feedback (character offsets of errors); DeFacto (instructions that say
what to remove or replace, and a corrected text).
"""

import difflib
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer

from t2g import cli, policy
from t2g.align import (
    MATCH_KINDS,
    find,
    resolve,
    response_text,
    span_rewards,
    token_offsets,
    without_space,
)
from t2g.cli import fail
from t2g.critics import quote_of
from t2g.feedback import Feedback
from t2g.log import read_jsonl

INSTRUCTION = re.compile(
    r"(?:Remove|Replace) the information about (.+?)"
    r"(?: from the summary| with the information about .+)\.?"
)
WORD = re.compile(r"\w+|[^\w\s]")


class Marked(NamedTuple):
    """A response and what is wrong in it: the character ranges, and quotes that name them."""

    text: str
    ranges: list[tuple[int, int]]
    quotes: list[str]


def read(rows, name) -> tuple[list[Marked], bool]:
    """Returns the responses of a file, and whether their quotes are verbatim."""
    found, verbatim = [], True
    for number, row in enumerate(rows, 1):
        feedback = row.get("feedback")
        try:
            if "candidate" in row:
                text, verbatim = row["candidate"], False
                quotes = [
                    match[1]
                    for line in feedback["instruction_list"]
                    if (match := INSTRUCTION.fullmatch(line.strip()))
                ]
                found.append(
                    Marked(text, changes(text, feedback["summary"]) if quotes else [], quotes)
                )
                continue
            if "prediction 1" in row:
                text, ranges = (
                    row["prediction 1"],
                    [(error["start"], error["end"]) for error in feedback["errors"]],
                )
            else:
                text, ranges = row["response"], [(start, end) for start, end in row["spans"]]
            if not isinstance(text, str) or not all(
                isinstance(i, int) for place in ranges for i in place
            ):
                raise TypeError("not a text, or not whole numbers")
        except (KeyError, TypeError, ValueError, AttributeError):
            fail(f"row {number} of {name} has no known form; see the head of extras/human/spans.py")
        for start, end in ranges:
            if not 0 <= start < end <= len(text):
                problem = f"the span ({start}, {end}) is empty or outside the response"
                fail(f"row {number} of {name}: {problem}")
        found.append(Marked(text, ranges, [text[start:end] for start, end in ranges]))
    if not any(marked.quotes for marked in found):
        fail(f"{name} marks nothing")
    return [marked for marked in found if marked.quotes], verbatim


def changes(text: str, corrected: str) -> list[tuple[int, int]]:
    """Returns the ranges of words of a text that its correction lacks."""
    words = list(WORD.finditer(text))
    before, after = (
        [word[0].casefold() for word in words],
        [word[0].casefold() for word in WORD.finditer(corrected)],
    )
    steps = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return [
        (words[i].start(), words[j - 1].end())
        for step, i, j, _, _ in steps
        if step in ("replace", "delete")
    ]


def characters(ranges) -> set[int]:
    return {i for start, end in ranges for i in range(start, end)}


# ---- quotes, without tokens ------------------------------------------------------------------


def how_found(responses) -> dict:
    """Returns the shares of quotes found in each way, and of ambiguous ones."""
    counts = Counter()
    for marked in responses:
        for quote in marked.quotes:
            kind, places = find(marked.text, quote)
            counts[kind] += 1
            counts["ambiguous"] += len(places) > 1
    total = sum(counts[kind] for kind in MATCH_KINDS)
    return {"quotes": total} | {kind: counts[kind] / total for kind in (*MATCH_KINDS, "ambiguous")}


RULES = {  # which of its places a quote marks that is given k times
    "all": lambda places, k: places,
    "first": lambda places, k: places[:k],
    "last": lambda places, k: places[-k:],
    "skip": lambda places, k: [],
}


def rules_for_ambiguous_quotes(responses) -> dict:
    """Returns precision and recall of each rule on quotes that occur several times.

    Precision counts places that people marked for any error, recall those that the quote was taken
    from. "context" is what an annotator can do: lengthen the quote to the left until it is unique;
    there, both count characters.
    """
    hits = defaultdict(Counter)
    for marked in responses:
        everything = characters(marked.ranges)
        for quote, k in Counter(marked.quotes).items():
            places = find(marked.text, quote)[1]
            if len(places) < 2:
                continue
            own = {place for place in marked.ranges if marked.text[slice(*place)] == quote}
            for rule, choose in RULES.items():
                chosen = choose(places, k)
                right = sum(characters([place]) <= everything for place in chosen)
                hits[rule].update(
                    marked=len(chosen), right=right, own=len(own), found=len(own & set(chosen))
                )
            for start, end in own:
                chosen = characters(find(marked.text, quote_of(marked.text, start, end))[1])
                size = end - start
                hits["context"].update(
                    marked=len(chosen), right=len(chosen & everything), own=size, found=size
                )
    return {
        rule: {"precision": h["right"] / max(h["marked"], 1), "recall": h["found"] / h["own"], **h}
        for rule, h in hits.items()
    }


def garbled(quote: str, rng) -> dict[str, str]:
    """Returns a quote as annotators may misquote it, by kind of error."""
    words = quote.split()
    at = rng.randrange(len(words))
    letter = rng.choice([i for i, c in enumerate(quote) if c.isalpha()] or [0])
    typo = rng.choice(("", "x", quote[letter] * 2))
    forms = {
        "case": quote.upper(),
        "spaces": "  ".join(words),
        "quotation marks": f"“{quote}”".replace("'", "’"),
        "typo": quote[:letter] + typo + quote[letter + 1 :],
        "word left out": " ".join(words[:at] + words[at + 1 :]),
        "word changed": " ".join([*words[:at], "something", *words[at + 1 :]]),
        "middle left out": " ".join([*words[:3], "...", *words[-3:]]) if len(words) > 6 else quote,
    }
    return {name: form for name, form in forms.items() if form.strip() and form != quote}


def garbled_quotes(responses, seed=0) -> dict:
    """Returns how misquoted unique quotes are found, and how often in the right place."""
    rng, table, right = random.Random(seed), defaultdict(Counter), defaultdict(Counter)
    for marked in responses:
        for quote, place in zip(marked.quotes, marked.ranges):
            if len(find(marked.text, quote)[1]) != 1:
                continue
            for name, form in garbled(quote, rng).items():
                kind, places = find(marked.text, form)
                table[name][kind] += 1
                chosen, truth = characters(places), characters([place])
                right[kind].update(
                    quotes=1,
                    near=bool(chosen & truth),
                    characters=len(chosen),
                    inside=len(chosen & truth),
                )
    ways = {
        name: {"quotes": n.total()} | {kind: n[kind] / n.total() for kind in MATCH_KINDS}
        for name, n in table.items()
    }
    found = {
        kind: {
            "quotes": r["quotes"],
            "right place": r["near"] / r["quotes"],
            "right characters": r["inside"] / r["characters"],
        }
        for kind, r in right.items()
        if r["characters"]
    }
    return {"ways": ways, "found": found}


def against_corrections(responses) -> dict:
    """Returns the share of found quotes, and of any places, with a word that a person changed."""
    hits = defaultdict(Counter)
    for marked in responses:
        wrong, words = (
            characters(marked.ranges),
            [word.span() for word in WORD.finditer(marked.text)],
        )
        for quote in marked.quotes:
            kind, places = find(marked.text, quote)
            n = len(WORD.findall(quote))
            if places:
                windows = [(a, b) for (a, _), (_, b) in zip(words, words[n - 1 :])] or [
                    (0, len(marked.text))
                ]
                chance = sum(bool(characters([window]) & wrong) for window in windows) / len(
                    windows
                )
                hits[kind].update(
                    found=1, changed=bool(characters(places) & wrong), by_chance=chance
                )
    shares = ("changed", "by_chance")
    return {
        kind: {"quotes": h["found"]} | {name: h[name] / h["found"] for name in shares}
        for kind, h in hits.items()
    }


# ---- the whole way, with tokens --------------------------------------------------------------


def tokens_marked(responses, tokenizer) -> dict:
    """Compares the tokens that quotes mark with the tokenizer's own in the human spans.

    The tokenizer's offsets are of the text that was encoded, ours of the text that is decoded.
    Tokens of white space alone count on neither side.

    Returns: "unlike", the share of responses that decode to another text; how quotes are found in
    the decoded text; "verbatim", tokens of quotes that occur there once and verbatim; "all".
    """
    hits, kinds, unlike = {"verbatim": Counter(), "all": Counter()}, Counter(), 0
    for marked in responses:
        encoding = tokenizer(marked.text, add_special_tokens=False, return_offsets_mapping=True)
        ids, own = encoding["input_ids"], encoding["offset_mapping"]
        text, offsets = response_text(tokenizer, ids), token_offsets(tokenizer, ids)
        seen = {t for t, (start, end) in enumerate(offsets) if text[start:end].strip()}
        unlike += text != marked.text
        cases = [("all", marked.quotes, marked.ranges)]
        for quote, place in zip(marked.quotes, marked.ranges):
            kind, places = find(text, quote)
            kinds[kind] += 1
            if kind == "exact" and len(places) == 1:
                cases.append(("verbatim", [quote], [place]))
        for name, quotes, ranges in cases:
            delta = span_rewards(offsets, resolve(text, Feedback("", poor=quotes))[0])
            chosen, truth = (
                set(delta.nonzero().flatten().tolist()) & seen,
                tokens_in(marked.text, own, ranges) & seen,
            )
            hits[name].update(
                marked=len(chosen),
                wrong=len(chosen - truth),
                human=len(truth),
                missed=len(truth - chosen),
            )
    shares = {kind: kinds[kind] / kinds.total() for kind in MATCH_KINDS}
    return {
        "vocabulary": len(tokenizer),
        "unlike": unlike / len(responses),
        **shares,
        **{k: dict(h) for k, h in hits.items()},
    }


def tokens_in(text, offsets, ranges) -> set[int]:
    """The tokens with a character in the ranges, white space at their ends apart."""
    inside = characters(without_space(text, *place) for place in ranges)
    return {t for t, (start, end) in enumerate(offsets) if inside & set(range(start, end))}


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("tokenizers", nargs="*", help="folders, hub ids or .gguf files")
    parser.add_argument("--data", required=True, help="responses with spans that people marked")
    parser.add_argument("--seed", type=int, default=0, help="seed of the garbled quotes")
    args = parser.parse_intermixed_args()
    print(json.dumps(measure(args.data, args.tokenizers, args.seed)))


def measure(data, tokenizers=(), seed=0) -> dict:
    """What quotes mark, against the spans that people marked."""
    responses, verbatim = read(read_jsonl(data), data)
    shares = how_found(responses)
    print_table({"share of quotes": shares})
    if not verbatim:
        corrections = against_corrections(responses)
        print_table(corrections)
        return {"quotes": shares, "corrections": corrections}
    short = len({Path(name).name for name in tokenizers}) == len(tokenizers)
    loaded = {Path(name).name if short else name: load(name) for name in tokenizers}
    rules, garbled = rules_for_ambiguous_quotes(responses), garbled_quotes(responses, seed)
    tokens = {name: tokens_marked(responses, tokenizer) for name, tokenizer in loaded.items()}
    for table in (rules, garbled["ways"], garbled["found"]):
        print_table(table)
    for name in ("verbatim", "all"):
        print(f"\ntokens of {name} quotes")
        print_table({key: table[name] for key, table in tokens.items()})
    return {"quotes": shares, "rules": rules, "garbled": garbled, "tokenizers": tokens}


def load(source: str):
    """A fast tokenizer: a folder, a hub id or a .gguf file."""
    folder, options = policy.pretrained(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, ImportError) as error:
        fail(f"no tokenizer can be loaded from {source!r}: {str(error).splitlines()[0]}")
    if not tokenizer.is_fast:
        fail(f"the tokenizer {source!r} has no offsets to compare with; use a fast one")
    return tokenizer


def print_table(columns):
    """Prints {column: {row: number}}."""
    print("\n" + " " * 24 + "".join(f"{name:>24}" for name in columns))
    for row in next(iter(columns.values())):
        cells = (f"{column[row]:24.5g}" for column in columns.values())
        print(f"{row:24}" + "".join(cells))


if __name__ == "__main__":
    main()
