"""Rows of data sets and what tasks make of them. Files: .jsonl and .json, also with .gz behind, and .parquet; else a hub id.

A hub id may name a split, HuggingFaceH4/ultrafeedback_binarized:train_prefs; it is "train" otherwise. Each kind of bad input ends
the program with one sentence, and rows that are of no use are counted on the console.
"""

import gzip
import importlib
import json
import random
from collections import Counter
from pathlib import Path

from t2g.cli import fail
from t2g.log import read_jsonl

HELDOUT_SHARE = 0.2
FILES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
ENDINGS = ".jsonl, .json or .parquet"


def read_rows(data: str, split="train"):
    """What a file holds, whatever it is, or the rows of a data set of the hub."""
    path = Path(data)
    ending = next((ending for ending in FILES if path.name.endswith(ending)), None)
    if ending and not path.is_file():
        fail(f"there is no file {data}")
    if ending == ".jsonl":
        return read_jsonl(path)
    if ending == ".parquet":
        try:
            return needed("pyarrow.parquet", "a .parquet file").read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            fail(f"{data} is no .parquet file: {error}")
    if ending:
        try:
            text = (
                gzip.open(path, "rt", encoding="utf-8").read()
                if ending.endswith(".gz")
                else path.read_text(encoding="utf-8")
            )
            lines = [line for line in text.split("\n") if line.strip()]
            return json.loads(f"[{','.join(lines)}]" if ending == ".jsonl.gz" else text)
        except (OSError, EOFError, ValueError) as error:
            fail(f"{data} is no {ending} file: {error}")
    if path.exists():
        fail(f"{data} is no {ENDINGS} file")
    name, _, part = data.partition(":")
    datasets = needed("datasets", f"{data} (no {ENDINGS} file, so taken for a hub id)")
    try:
        return list(datasets.load_dataset(name, split=part or split))
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # RuntimeError: a data set that comes as a script
        reason = str(error).splitlines()[0].removesuffix(".")
        fail(
            f"the data set {data} could not be loaded: {reason}. A split follows a colon, NAME:SPLIT; a downloaded file will do too"
        )


def needed(module: str, what: str):
    """An optional package, or a sentence that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        fail(f"{what} needs the package {package}: pip install {package}")


def load(args, reader):
    """The examples for training and the held-out ones, each prompt once.

    Held out is --heldout_data, or a fifth of --data after a shuffle that does not depend on the seed.

    Args: reader(rows, name), which says how a row is read: it returns a function from a row to an Example, or to None if the row
        lacks a text, or to what else is wrong with it.
    """
    if not args.data:
        fail(f"the task {args.task} needs --data: a {ENDINGS} file, or a hub id")
    if args.heldout_data:
        heldout = examples(args.heldout_data, reader)
        train = [
            example
            for prompt, example in examples(args.data, reader).items()
            if prompt not in heldout
        ]
        if not train:
            fail(f"every example of {args.data} is held out by {args.heldout_data}")
        return train, list(heldout.values())
    found = list(examples(args.data, reader).values())
    if len(found) < 2:
        fail(
            f"{args.data} holds {len(found)} usable example(s); training and measuring need at least two"
        )
    random.Random(0).shuffle(found)
    count = max(1, round(HELDOUT_SHARE * len(found)))
    return found[count:], found[:count]


def examples(data, reader) -> dict:
    """The usable examples of a file or a data set, by their prompts."""
    rows = read_rows(data)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        fail(f"{data} must hold a list of objects, one an example")
    if not rows:
        fail(f"{data} holds no example")
    read, found, left_out = reader(rows, data), {}, Counter()
    for example in map(read, rows):
        if isinstance(example, str):
            left_out[example] += 1
        elif not example or not (example.prompt.strip() and example.reference.strip()):
            left_out["they lack a text"] += 1
        elif found.setdefault(example.prompt, example) is not example:
            left_out["an earlier one has the same source"] += 1
    if left_out:
        reasons = ", ".join(f"{count} ({reason})" for reason, count in left_out.items())
        print(f"{len(found)} of {len(rows)} rows of {data} are of use; left out: {reasons}")
    return found


def has(rows, *fields) -> bool:
    """True if each field stands in some row: data sets are recognised by their fields."""
    return all(any(field in row for row in rows) for field in fields)


def text(value) -> str:
    """A text without white space at its ends, "" for what is none."""
    return value.strip() if isinstance(value, str) else ""
