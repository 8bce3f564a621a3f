"""How long alignment takes: offsets, quotes and rewards of one response, in milliseconds.

Measured on one core; medians of many rounds.

python -m extras.human.alignment TOKENIZER         # a folder, a hub id or a .gguf file
"""

import itertools
import json
import random
import sys
import time
from pathlib import Path
from statistics import median

from extras.human.spans import load
from t2g.align import resolve, response_text, span_rewards, token_offsets
from t2g.feedback import Feedback

WORDS = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8").split()
ROUNDS = 30


def case(tokenizer, tokens, spans, typo=False):
    """Returns ids and feedback of these sizes; quotes have one to eight words, half are good."""
    rng = random.Random(0)
    ids = tokenizer.encode(" ".join(rng.choices(WORDS, k=2 * tokens)), add_special_tokens=False)[
        :tokens
    ]
    said = response_text(tokenizer, ids).split()
    quotes = []
    for _ in range(spans):
        start = rng.randrange(len(said) - 8)
        quotes.append(" ".join(said[start : start + rng.randint(1, 8)]))
    if typo:
        quotes = [quote[:-2] + "#" + quote[-1:] for quote in quotes]
    return ids, Feedback("", quotes[::2], quotes[1::2])


def milliseconds(tokenizer, ids, feedback):
    parts = []
    for _ in range(ROUNDS):
        clock = [time.perf_counter()]
        offsets = token_offsets(tokenizer, ids)
        clock.append(time.perf_counter())
        spans, _ = resolve(response_text(tokenizer, ids), feedback)
        clock.append(time.perf_counter())
        span_rewards(offsets, spans)
        clock.append(time.perf_counter())
        parts.append(
            [1000 * (b - a) for a, b in itertools.pairwise(clock)] + [1000 * (clock[-1] - clock[0])]
        )
    return {
        name: round(median(column), 3)
        for name, column in zip(("offsets", "quotes", "rewards", "all"), zip(*parts))
    }


def main():
    tokenizer = load(sys.argv[1])
    rows = [
        (128, 20),
        (256, 20),
        (512, 20),
        (1024, 20),
        (2048, 20),
        (512, 10),
        (512, 40),
        (512, 80),
        (512, 10_000),
    ]
    result = {
        f"{tokens} tokens, {spans} spans": milliseconds(tokenizer, *case(tokenizer, tokens, spans))
        for tokens, spans in rows
    }
    result["512 tokens, 20 spans, each with a typo"] = milliseconds(
        tokenizer, *case(tokenizer, 512, 20, typo=True)
    )
    print(
        f"{'milliseconds':40}"
        + "".join(f"{part:>10}" for part in ("offsets", "quotes", "rewards", "all"))
    )
    for name, row in result.items():
        print(f"{name:40}" + "".join(f"{value:10.3f}" for value in row.values()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
