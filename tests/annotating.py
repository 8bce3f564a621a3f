"""What the tests of annotate.py share: records to annotate, the flags that point it at a server, what the server was asked."""

import json
import random

KEY = "sk-very-secret-0123456789"


def texts(count):
    rng = random.Random(count)
    words = "the cat sat on a mat while rain fell over old towns near rivers".split()
    return [
        {
            "id": f"r{n}",
            "prompt": f"Go on, {n}.",
            "response": f"{n} {' '.join(rng.choices(words, k=9))} end{n}.",
        }
        for n in range(count)
    ]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def flags(url, tmp_path, records, *more):
    write(tmp_path / "in.jsonl", records)
    paths = ("--responses", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    return *paths, "--model", "m", "--base_url", url, "--timeout", 1, "--concurrency", 32, *more


def requests(log):
    return [line for line in log if line["what"] == "request"]
