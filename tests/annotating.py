"""Helpers for the tests of annotate.py: records, flags and what a server was asked."""

import random

from t2g.notes import write_whole

KEY = "sk-very-secret-0123456789"


def texts(count):
    """Records to annotate; each response is unique."""
    rng = random.Random(count)
    words = "the cat sat on a mat while rain fell over old towns near rivers".split()
    records = []
    for n in range(count):
        response = f"{n} {' '.join(rng.choices(words, k=9))} end{n}."
        records.append({"id": f"r{n}", "prompt": f"Go on, {n}.", "response": response})
    return records


def annotated(prompt, response, feedback, **more):
    """A record as annotate.py writes it."""
    spans = {"good_spans": feedback.good, "poor_spans": feedback.poor}
    return {"prompt": prompt, "response": response, "critique": feedback.critique, **spans, **more}


def write(path, records):
    write_whole(path, records)
    return path


def flags(url, tmp_path, records, *more):
    """The flags for annotating records from in.jsonl by a server into out.jsonl."""
    paths = ("--responses", write(tmp_path / "in.jsonl", records), "--out", tmp_path / "out.jsonl")
    return *paths, "--model", "m", "--base_url", url, "--timeout", 1, "--concurrency", 32, *more


def requests(log):
    return [line for line in log if line["what"] == "request"]
