"""Measures whether quotes find the spans that people marked, and how long the search takes.

    python -m extras.human.spans --data FILE [TOKENIZER ...]

Each line of FILE is {"response": text, "spans": [[start, end], ...]} or a row of FineGrainedRLHF's
QA feedback. The text of each span is searched for as a quote, verbatim and with typical mistakes. A
tokenizer is a folder, a hub id or a .gguf file; its own offsets say which tokens a quote should
mark. The last line is one JSON object.
"""

import json
import random
import time
from collections import Counter, defaultdict
from statistics import median
from typing import NamedTuple

from transformers import AutoTokenizer

from t2g import cli, policy
from t2g.align import MATCH_KINDS, find, resolve, response_text, span_rewards, token_offsets
from t2g.cli import fail
from t2g.critics import quote_of
from t2g.feedback import Feedback
from t2g.log import read_jsonl
from t2g.quotes import without_space


class Marked(NamedTuple):
    """A response, the character ranges that people marked in it, and their texts."""

    text: str
    ranges: list[tuple[int, int]]
    quotes: list[str]


def read_marked(rows, name) -> list[Marked]:
    """Returns the responses in which people marked something; fails at a faulty row."""
    responses = []
    for number, row in enumerate(rows, 1):
        try:
            if "prediction 1" in row:
                text, errors = row["prediction 1"], row["feedback"]["errors"]
                ranges = [(error["start"], error["end"]) for error in errors]
            else:
                text, ranges = row["response"], [(start, end) for start, end in row["spans"]]
            quotes = [text[start:end] for start, end in ranges]
            are_inside = all(0 <= start < end <= len(text) for start, end in ranges)
        except (KeyError, TypeError, ValueError):
            fail(f"row {number} of {name} has no known form; see the head of extras/human/spans.py")
        if not are_inside:
            fail(f"row {number} of {name} has a span that is empty or outside the response")
        if ranges:
            responses.append(Marked(text, ranges, quotes))
    if not responses:
        fail(f"{name} marks nothing")
    return responses


def characters(ranges) -> set[int]:
    return {i for start, end in ranges for i in range(start, end)}


RULES = {  # the places that a quote marks if it occurs several times and was given k times
    "all": lambda places, k: places,
    "first": lambda places, k: places[:k],
    "last": lambda places, k: places[-k:],
}


def compare_rules(responses) -> dict:
    """Returns precision and recall of each rule on quotes that occur several times.

    Precision counts places that people marked for any error, recall those that the quote was taken
    from. "context" is what an annotator can do: lengthen the quote until it is unique; there, both
    count characters.
    """
    hits = defaultdict(Counter)
    for marked in responses:
        faulty = characters(marked.ranges)
        for quote, k in Counter(marked.quotes).items():
            places = find(marked.text, quote)[1]
            if len(places) < 2:
                continue
            own = {place for place in marked.ranges if marked.text[slice(*place)] == quote}
            for rule, choose in RULES.items():
                chosen = choose(places, k)
                right = sum(characters([place]) <= faulty for place in chosen)
                hits[rule].update(marked=len(chosen), right=right)
                hits[rule].update(own=len(own), found=len(own & set(chosen)))
            for start, end in own:
                chosen = characters(find(marked.text, quote_of(marked.text, start, end))[1])
                hits["context"].update(marked=len(chosen), right=len(chosen & faulty))
                found = len(chosen & characters([(start, end)]))
                hits["context"].update(own=end - start, found=found)
    return {
        rule: {"precision": n["right"] / n["marked"], "recall": n["found"] / n["own"], **n}
        for rule, n in hits.items()
    }


def misquote(quote: str, rng) -> dict[str, str]:
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


def find_misquotes(responses, seed=0) -> dict:
    """Returns how misquoted unique quotes are found, and how often in the right place."""
    rng, kinds, hits = random.Random(seed), defaultdict(Counter), defaultdict(Counter)
    for marked in responses:
        for quote, place in zip(marked.quotes, marked.ranges):
            if len(find(marked.text, quote)[1]) != 1:
                continue
            for name, form in misquote(quote, rng).items():
                kind, places = find(marked.text, form)
                kinds[name][kind] += 1
                chosen = characters(places)
                right = chosen & characters([place])
                hits[kind].update(quotes=1, near=bool(right))
                hits[kind].update(characters=len(chosen), right=len(right))
    found = {}
    for kind, n in hits.items():
        if n["characters"]:
            found[kind] = {"quotes": n["quotes"], "right place": n["near"] / n["quotes"]}
            found[kind]["right characters"] = n["right"] / n["characters"]
    return {"ways": {name: shares(counts) for name, counts in kinds.items()}, "found": found}


def shares(kinds: Counter) -> dict:
    """Returns the number of quotes, and the share of each kind of match."""
    total = kinds.total()
    return {"quotes": total} | {kind: kinds[kind] / total for kind in MATCH_KINDS}


def compare_tokens(responses, tokenizer) -> dict:
    """Compares the tokens that quotes mark with those that the tokenizer's own offsets name.

    Tokens of white space alone count on neither side.

    Returns: "unlike", the share of responses that decode to another text; how quotes are found in
    the decoded text; the tokens of quotes that occur there once and "verbatim", and of "all".
    """
    hits, kinds, unlike = {"verbatim": Counter(), "all": Counter()}, Counter(), 0
    for marked in responses:
        encoding = tokenizer(marked.text, add_special_tokens=False, return_offsets_mapping=True)
        ids, own = encoding["input_ids"], encoding["offset_mapping"]
        text, offsets = response_text(tokenizer, ids), token_offsets(tokenizer, ids)
        visible = {t for t, (start, end) in enumerate(offsets) if text[start:end].strip()}
        unlike += text != marked.text
        cases = [("all", marked.quotes, marked.ranges)]
        for quote, place in zip(marked.quotes, marked.ranges):
            kind, places = find(text, quote)
            kinds[kind] += 1
            if kind == "exact" and len(places) == 1:
                cases.append(("verbatim", [quote], [place]))
        for name, quotes, ranges in cases:
            delta = span_rewards(offsets, resolve(text, Feedback("", poor=quotes))[0])
            chosen = set(delta.nonzero().flatten().tolist()) & visible
            human = tokens_in(marked.text, own, ranges) & visible
            hits[name].update(marked=len(chosen), wrong=len(chosen - human))
            hits[name].update(human=len(human), missed=len(human - chosen))
    result = {"vocabulary": len(tokenizer), "unlike": unlike / len(responses)}
    return result | shares(kinds) | {name: dict(counts) for name, counts in hits.items()}


def tokens_in(text, offsets, ranges) -> set[int]:
    """Returns the tokens with a character in the ranges, without white space at their ends."""
    inside = characters(without_space(text, *place) for place in ranges)
    return {t for t, (start, end) in enumerate(offsets) if inside & set(range(start, end))}


def time_alignment(responses, tokenizer, tokens, typo=False, spans=20, rounds=30) -> float:
    """Returns the median milliseconds of offsets, search and rewards of one response.

    Its first tokens come from all responses together; a quote has one to eight of its words.
    """
    rng = random.Random(0)
    text = " ".join(marked.text for marked in responses)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = (ids * (tokens // len(ids) + 1))[:tokens]  # repeated, if the responses are few
    words, quotes = response_text(tokenizer, ids).split(), []
    for _ in range(spans):
        start = rng.randrange(len(words))
        quote = " ".join(words[start : start + rng.randint(1, 8)])
        quotes.append(quote[:-2] + "#" + quote[-1:] if typo else quote)
    feedback, seconds = Feedback("", quotes[::2], quotes[1::2]), []
    for _ in range(rounds):
        start = time.perf_counter()
        offsets = token_offsets(tokenizer, ids)
        span_rewards(offsets, resolve(response_text(tokenizer, ids), feedback)[0])
        seconds.append(time.perf_counter() - start)
    return 1000 * median(seconds)


def load_tokenizer(source: str):
    folder, options = policy.pretrained(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        fail(f"no tokenizer can be loaded from {source!r}: {reason}")
    if not tokenizer.is_fast:
        fail(f"the tokenizer {source!r} has no offsets to compare with; use a fast one")
    return tokenizer


@cli.friendly_errors()
def main():
    parser = cli.parser(__doc__)
    parser.add_argument("tokenizers", nargs="*", help="folders, hub ids or .gguf files")
    parser.add_argument("--data", required=True, help="responses with spans that people marked")
    args = parser.parse_intermixed_args()
    responses = read_marked(read_jsonl(args.data), args.data)
    loaded = {name: load_tokenizer(name) for name in args.tokenizers}
    rules, misquotes, tokens = compare_rules(responses), find_misquotes(responses), {}
    for table in (rules, misquotes["ways"], misquotes["found"]):
        print_table(table)
    for name, tokenizer in loaded.items():
        speed = {
            "512 tokens": time_alignment(responses, tokenizer, 512),
            "2048 tokens": time_alignment(responses, tokenizer, 2048),
            "512 tokens, typos": time_alignment(responses, tokenizer, 512, typo=True),
        }
        tokens[name] = {**compare_tokens(responses, tokenizer), "milliseconds": speed}
        print(f"\n{name}")
        print_table({f"{kind} quotes": tokens[name][kind] for kind in ("verbatim", "all")})
        print_table({"milliseconds": speed})
    quotes = sum(len(marked.quotes) for marked in responses)
    result = {"quotes": quotes, "rules": rules, "garbled": misquotes, "tokenizers": tokens}
    print(json.dumps(result))


def print_table(columns):
    """Prints {column: {row: number}}, nothing if no quote counts."""
    if not columns:
        return
    print("\n" + " " * 24 + "".join(f"{name:>24}" for name in columns))
    for row in next(iter(columns.values())):
        print(f"{row:24}" + "".join(f"{column[row]:24.5g}" for column in columns.values()))


if __name__ == "__main__":
    main()
