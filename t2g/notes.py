"""Reads and writes files of annotations: .jsonl files of the records that annotate.py describes."""

import json
import os
from pathlib import Path

from t2g.cli import fail, try_lock
from t2g.feedback import Feedback, FeedbackError
from t2g.log import read_jsonl, sync, write_text

FIELDS = {"prompt": str, "response": str, "critique": str, "good_spans": list, "poor_spans": list}
WRITTEN = ("reasoning", "critique", "good_spans", "poor_spans", "kinds")  # by an annotator
WRITTEN += ("status", "reason", "usage", "annotator")


def read_responses(path) -> list[dict]:
    """Returns records to annotate, without the fields that an earlier annotator wrote."""
    records, ids = read_jsonl(path), set()
    for number, record in enumerate(records, 1):
        if type(record.get("id")) is int:
            record["id"] = str(record["id"])
        for key in ("id", "prompt", "response"):
            if not isinstance(record.get(key), str):
                fail(f"record {number} of {path} has no {key}, which must be a string")
        if record["id"] in ids:
            fail(f"record {number} of {path} has the id of an earlier one; ids must be unique")
        ids.add(record["id"])
    if not records:
        fail(f"{path} contains no records")
    return [{key: r[key] for key in r if key not in WRITTEN} for r in records]


def read_annotations(path) -> list[dict]:
    """Returns the records of a file with their "feedback": None where the status is not "ok".

    Of several records with the same id the last one counts, because it is the latest attempt.
    """
    records = {}
    for number, record in enumerate(read_jsonl(path), 1):
        record["feedback"] = None
        if record.get("status", "ok") == "ok":
            try:
                record["feedback"] = read_feedback(record)
            except FeedbackError as error:
                fail(f"record {number} of {path} is invalid: {error}")
        name = record["id"] if isinstance(record.get("id"), str) else number
        before = records.get(name, record)
        if any(before.get(key) != record.get(key) for key in ("prompt", "response")):
            fault = f"the id {name!r} with another response than before"
            fail(f"record {number} of {path} has {fault}; ids of joined files must differ")
        records[name] = record
    return list(records.values())


def read_usable(path) -> list[dict]:
    """Returns the records of a file that have feedback. Fails if there are none."""
    records = read_annotations(path)
    usable = [record for record in records if record["feedback"]]
    print(f"{path}: {len(usable)} of {len(records)} records have the status ok and are used")
    return usable or fail(f"{path} has no record whose status is ok")


def read_feedback(record) -> Feedback:
    """Returns the feedback of an annotated record. Raises: FeedbackError that names the fault."""
    for key, kind in FIELDS.items():
        if not isinstance(record.get(key), kind):
            raise FeedbackError(f"{key} must be a {kind.__name__}")
    feedback = Feedback(record["critique"], record["good_spans"], record["poor_spans"])
    kinds, count = record.get("kinds", []), len(feedback.poor)
    strings = isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)
    if not strings or len(kinds) not in (0, count):
        raise FeedbackError(f'"kinds" must be a list of {count} strings, one per poor span')
    return Feedback.parse(feedback.render())


def write_whole(path: Path, records):
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_text(path, "".join(lines))


class Notes:
    """The records of a .jsonl file by their ids, to which a single process adds more.

    Of several records with one id the last counts.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file = open(path, "ab")
        if not try_lock(self.file):
            fail(f"another process writes {path}; wait for it or choose another --out")
        repair_last_line(path)
        rows = read_jsonl(path)
        if not all(isinstance(row.get("id"), str) for row in rows):
            fail(f"{path} is not a file of annotations: a record has no id; choose another --out")
        self.records = {row["id"]: row for row in rows}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def left(self, records, retry_failed=False) -> list[dict]:
        """Returns the records that the file lacks, and on request those that failed."""
        left = []
        for record in records:
            old = self.records.get(record["id"])
            if not old:
                left.append(record)
            elif any(old.get(key) != record[key] for key in ("prompt", "response")):
                problem = f"another prompt or response under the id {record['id']}"
                fail(f"{self.path} has {problem}; choose another --out")
            elif retry_failed and old.get("status") == "failed":
                left.append({**record, "usage": old.get("usage", {})})  # what it has cost so far
        return left

    def add(self, record):
        """Writes a record at once, so that neither a kill nor a power cut loses it."""
        self.records[record["id"]] = record
        self.file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        self.file.flush()
        sync(self.path)


def repair_last_line(path: Path):
    """Cuts off a half-written last line; one that lacks only its line break receives it."""
    last = path.read_bytes().rpartition(b"\n")[2]
    try:
        json.loads(last or b"{}")
    except ValueError:
        if not last.startswith(b"{"):
            fail(f"{path} is not a file of annotations; choose another --out")
        os.truncate(path, path.stat().st_size - len(last))
        print(f"the half-written last line of {path} was cut off", flush=True)
        return
    with open(path, "ab") as file:
        file.write(b"\n" if last else b"")
