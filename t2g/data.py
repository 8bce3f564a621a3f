"""Reads data sets and turns their rows into examples of a task.

A data set is a .jsonl, .json (both may be gzipped) or .parquet file, or a hub id with an optional
split, such as HuggingFaceH4/ultrafeedback_binarized:train_prefs. Rows that cannot be used are
counted on the console.
"""

import random
from collections import Counter
from pathlib import Path

from t2g.cli import fail, needed
from t2g.log import parse_json, read_jsonl, read_text

HELDOUT_SHARE = 0.2
ENDINGS = (".jsonl", ".json", ".parquet")
FILE = "a .jsonl, .json or .parquet file"


def read_rows(data: str, split="train"):
    """Returns the content of a file, or the rows of a hub data set."""
    path = Path(data)
    ending = Path(path.name.removesuffix(".gz")).suffix
    if ending not in ENDINGS:
        return fail(f"{data} is not {FILE}") if path.exists() else read_hub(data, split)
    if ending == ".jsonl":
        return read_jsonl(path)
    try:
        if ending == ".parquet":
            return needed("pyarrow.parquet", "a .parquet file").read_table(path).to_pylist()
        return parse_json(read_text(path), data)
    except (OSError, ValueError) as error:
        fail(f"{data} cannot be read: {error}")


def read_hub(data: str, split: str) -> list[dict]:
    name, _, part = data.partition(":")
    datasets = needed("datasets", f"{data} (not {FILE}, so taken for a hub id)")
    try:
        return list(datasets.load_dataset(name, split=part or split))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: the hub id is a script
        reason = str(error).partition("\n")[0].removesuffix(".")
        fail(f"cannot load the data set {data}: {reason}. Use NAME:SPLIT or a downloaded file")


def load(args, reader):
    """Returns the examples for training and the held-out ones, each prompt once.

    Held out are --heldout_data, or a fifth of --data after a shuffle that ignores --seed.

    Args: reader(rows, name) returns a function from a row to an Example, to None if the row lacks a
        text, or to a string that says what else is wrong with it.
    """
    if not args.data:
        fail(f"the task {args.task} needs --data: {FILE}, or a hub id")
    train = examples(args.data, reader)
    if args.heldout_data:
        heldout = examples(args.heldout_data, reader)
        kept = [example for prompt, example in train.items() if prompt not in heldout]
        if len(kept) < len(train):
            print(f"{len(train) - len(kept)} prompts of {args.data} are held out, and dropped")
        return kept, list(heldout.values())
    train = list(train.values())
    random.Random(0).shuffle(train)
    count = max(1, round(HELDOUT_SHARE * len(train)))
    return train[count:], train[:count]


def examples(data, reader) -> dict:
    """Returns the usable examples of a data set by their prompts."""
    rows = read_rows(data)
    if not rows or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        fail(f"{data} must contain a list of objects, one per example")
    kept, dropped = {}, Counter()
    for example in map(reader(rows, data), rows):
        if isinstance(example, str):
            dropped[example] += 1
        elif not example or not (example.prompt.strip() and example.reference.strip()):
            dropped["they lack a prompt or a reference"] += 1
        elif kept.setdefault(example.prompt, example) is not example:
            dropped["an earlier row has the same prompt"] += 1
    if dropped:
        reasons = ", ".join(f"{count} ({reason})" for reason, count in dropped.items())
        print(f"{len(kept)} of {len(rows)} rows of {data} are usable; dropped: {reasons}")
    return kept


def has(rows, *fields) -> bool:
    """Returns True if each field occurs in some row; data sets are recognised by their fields."""
    return all(any(field in row for row in rows) for field in fields)


def text(value) -> str:
    """Returns a string without white space at its ends, or "" for any other value."""
    return value.strip() if isinstance(value, str) else ""
