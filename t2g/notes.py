"""Files of annotations: what stands there already, and new records a line each, so that a kill at any moment loses none of them."""

import fcntl
import json
import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from t2g.cli import fail
from t2g.feedback import Feedback, FeedbackError
from t2g.log import read_jsonl, write_text

FIELDS = {"prompt": str, "response": str, "critique": str, "good_spans": list, "poor_spans": list}
WRITTEN = (  # by annotators
    "reasoning", "critique", "good_spans", "poor_spans", "kinds", "status", "reason", "usage", "annotator",
)  # fmt: skip


def read_responses(path) -> list[dict]:
    """Records to annotate: objects with the texts id, prompt and response, each id once. A whole number as id becomes a text."""
    records, seen = read_jsonl(path), set()
    for number, record in enumerate(records, 1):
        if type(record.get("id")) is int:
            record["id"] = str(record["id"])
        if wrong := [
            name for name in ("id", "prompt", "response") if not isinstance(record.get(name), str)
        ]:
            fail(f"record {number} of {path} has no {', '.join(wrong)}; each must be a text")
        if record["id"] in seen:
            fail(f"record {number} of {path} has the id of an earlier one; each needs its own")
        seen.add(record["id"])
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            fail(
                f"record {number} of {path} holds half of a surrogate pair, which is no text; mend it or leave it out"
            )
    if not records:
        fail(f"{path} holds no record")
    return records


def read_annotations(path) -> list[dict]:
    """The records of an annotations file, each with its "feedback": None where its status is not "ok".

    Where an id stands twice, the later line counts: a record that failed may have been asked for again.
    """
    records = read_jsonl(path)
    for number, record in enumerate(records, 1):
        record["feedback"] = None
        if record.get("status", "ok") != "ok":
            continue
        if wrong := [
            name for name, kind in FIELDS.items() if not isinstance(record.get(name), kind)
        ]:
            fail(
                f"record {number} of {path} has no usable {', '.join(wrong)}; see annotate.py for the fields"
            )
        try:
            check_kinds(record)
            said = Feedback(record["critique"], record["good_spans"], record["poor_spans"])
            record["feedback"] = Feedback.parse(said.render())
            (record["prompt"] + record["response"]).encode()
        except ValueError as error:
            fail(f"record {number} of {path} is no feedback: {error}")
    return list(
        {
            row["id"] if isinstance(row.get("id"), str) else i: row for i, row in enumerate(records)
        }.values()
    )


def check_kinds(record):
    """Raises: FeedbackError where a record has "kinds" that are not parallel to its poor_spans."""
    kinds, poor = record.get("kinds", []), record["poor_spans"]
    if (
        not isinstance(kinds, list)
        or not all(isinstance(kind, str) for kind in kinds)
        or len(kinds) not in (0, len(poor))
    ):
        raise FeedbackError(
            f'"kinds" must be a list of texts, one for each of the {len(poor)} poor_spans'
        )


@contextmanager
def writing(path: Path):
    """Around what writes path: one sentence where that cannot be."""
    try:
        yield
    except OSError as error:
        fail(
            f"{path} cannot be written ({error.strerror}); make room there or choose another --out"
        )


def write_whole(path: Path, records):
    """A .jsonl file that appears whole or not at all."""
    with writing(path):
        write_text(
            path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        )


class Notes:
    """The records of a .jsonl file by id, and room for more. One process at a time may hold it.

    Where an id stands twice its later line counts, and closing leaves only that one.
    """

    def __init__(self, path: Path):
        self.path, self.file, self.synced = path, open(path, "ab"), 0.0
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(
                os.fstat(self.file.fileno()), os.stat(path)
            )  # and has not just been replaced
        except BlockingIOError:
            ours = False
        if not ours:
            fail(f"another process is writing {path}; wait for it, or choose another --out")
        mend_last_line(path)
        rows = read_jsonl(path)
        if wrong := [
            number for number, row in enumerate(rows, 1) if not isinstance(row.get("id"), str)
        ]:
            fail(
                f"record {wrong[0]} of {path} has no id, so this is no file of annotations; choose another --out"
            )
        self.records = {row["id"]: row for row in rows}
        self.failed = {row["id"] for row in self.records.values() if row.get("status") == "failed"}
        self.twice = len(self.records) < len(rows)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.twice:
            write_whole(self.path, self.records.values())
        with suppress(OSError):  # only of a line that add() could not write, and has said so
            self.file.close()

    def left(self, records, retry_failed=False) -> list[dict]:
        """The records that do not stand there yet; those that failed as well if they are to be asked again, with what they cost."""
        todo = []
        for record in records:
            there = self.records.get(record["id"])
            if there and (there.get("prompt"), there.get("response")) != (
                record["prompt"],
                record["response"],
            ):
                fail(
                    f"{self.path} holds the id {record['id']} with another prompt or response; choose another --out"
                )
            if not there:
                todo.append(record)
            elif retry_failed and record["id"] in self.failed:
                todo.append({**record, "usage": there.get("usage", {})})
        return todo

    def add(self, record):
        """Writes a record, which is safe from a kill at once and from a power cut within a second or so."""
        self.twice |= record["id"] in self.records
        self.records[record["id"]] = record
        (self.failed.add if record["status"] == "failed" else self.failed.discard)(record["id"])
        self.file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        self.file.flush()
        if time.monotonic() - self.synced > 1:
            os.fsync(self.file.fileno())
            self.synced = time.monotonic()


def mend_last_line(path: Path):
    """Cuts off a last line that a killed run half wrote. If no more than its line break is missing, that is added."""
    text = path.read_bytes()
    last = text[text.rfind(b"\n") + 1 :]
    if not last:
        return
    try:
        json.loads(last)
    except ValueError:
        os.truncate(path, len(text) - len(last))
        print(
            f"the last line of {path} was half written and is cut off: its record will be annotated again",
            flush=True,
        )
    else:
        with open(path, "ab") as file:
            file.write(b"\n")
