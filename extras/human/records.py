"""What people said of responses, as the records that train_rm.py learns from.

    python -m extras.human.records FILE --out annotations.jsonl

Each line of FILE is a row of DeFacto (an explanation, instructions, a corrected summary), of
FineGrainedRLHF's QA feedback (ranges of errors by kind) or of ILF's feedback on programs (what is
wrong, and the mended program). Where people gave no quotes, quotes are made from what they marked.
Poor is what they removed or named. Good is sparse, as in the paper: of a summary the names and
numbers that the corrector kept and the article has, of an answer the longest runs without an error,
of a program the longest lines that were kept.
"""

import json
import re
from pathlib import Path

from extras.code import task as code
from extras.human.spans import INSTRUCTION, WORD, changes
from t2g import cli
from t2g.align import find
from t2g.cli import fail
from t2g.critics import quote_of
from t2g.feedback import Feedback
from t2g.log import read_jsonl
from t2g.notes import write_whole
from t2g.tasks import summarize

MAX_GOOD, SHORTEST_GOOD = 2, 4  # good quotes of a response; words of a run that counts as good
WORDS_QUOTED = 8  # at most, of a marked range or a passage in a critique
QUESTION = "Answer the question from the passages.\n\nQuestion: {}\n\nPassages:\n{}"
ERRORS = {  # FineGrainedRLHF's kinds of error as a critique; {} is the annotator's note
    "Irrelevant": "does not bear on the question",
    "Redundant": "repeats what was said",
    "Wrong-Grounding": "is not what the passages say{}",
    "Unverifiable": "stands in none of the passages",
    "Incoherent": "does not hang together",
}


def records(rows, name) -> list[dict]:
    """Returns the annotation records of a file's rows; fails with the number of a faulty row."""
    found = []
    for number, row in enumerate(rows, 1):
        form = next((form for field, form in FORMS.items() if field in row), dict)
        try:
            record = {"id": str(number - 1), **form(row), "status": "ok", "reason": ""}
            Feedback(record["critique"], record["good_spans"], record["poor_spans"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            fail(
                f"row {number} of {name} has no known form; see the head of extras/human/records.py"
            )
        found.append(record)
    return found


def defacto(row) -> dict:
    """Critique: explanation and instructions. Poor: what these quote or the correction removed."""
    text, said = row["candidate"], row["feedback"]
    wrong = changes(text, said["summary"]) if row["has_error"] else []
    for line in said["instruction_list"]:
        if match := INSTRUCTION.fullmatch(line.strip()):
            kind, places = find(text, match[1])
            wrong += places if kind in ("exact", "normalised") else []
    poor = joined(text, [place for place in wrong if not is_link(text[slice(*place)])])
    known = summarize.words_of(row["article"])
    facts = [
        place
        for place in summarize.names_and_numbers(text)
        if summarize.words_of(text[slice(*place)]) <= known
    ]
    good = [
        (start, end) for start, end in facts if not any(start < b and a < end for a, b in wrong)
    ]
    kind = " and ".join(kind for kind in ("intrinsic", "extrinsic") if row[f"{kind}_error"])
    return {
        "prompt": summarize.INSTRUCTION.format(row["article"].strip()),
        "response": text,
        "critique": one_line(f"{said['explanation']} {said['instruction']}"),
        "good_spans": [quote_of(text, *place) for place in good[:MAX_GOOD]],
        "poor_spans": [quote_of(text, *place) for place in poor],
        "kinds": [kind] * len(poor),
    }


def finegrained_qa(row) -> dict:
    """Critique: a sentence for each error, and what is missing. Poor: the marked ranges.

    Good: the longest runs without an error.
    """
    text, passages = row["prediction 1"], row["passages"]
    errors = sorted(row["feedback"]["errors"], key=lambda error: error["start"])
    remarks = []
    for error in errors:
        noted = (
            sentences(passages, json.loads(error["explanation"]))
            if error["error type"] == "Wrong-Grounding"
            else ""
        )
        said = ERRORS[error["error type"]].format(f": {noted.removesuffix('.')}" if noted else "")
        remarks.append(f'"{opening(text[error["start"] : error["end"]])}" {said}.')
    remarks += [
        f"It leaves out: {sentences(passages, missing)}"
        for missing in row["feedback"]["missing-info"][:1]
    ]
    ranges = [(error["start"], error["end"]) for error in errors]
    paragraphs = "\n".join(" ".join(passage[1:]).strip() for passage in passages)
    return {
        "prompt": QUESTION.format(row["question"], paragraphs),
        "response": text,
        "critique": one_line(" ".join(remarks)) or "It answers the question from the passages.",
        "good_spans": [quote_of(text, *place) for place in longest_kept(text, ranges)],
        "poor_spans": [quote_of(text, *place) for place in ranges],
        "kinds": [error["error type"] for error in errors],
    }


def ilf(row) -> dict:
    """Critique: the feedback. Poor: lines that the mended one lacks. Good: the longest others."""
    text = f"```python\n{row['original_model_completion'].strip()}\n```"
    mended = {one_line(line) for line in row["unedited_annotator_completion"].splitlines()}
    head = row["prompt"].rstrip().rpartition("\n")[2]
    lines = [(line.start(), line.end()) for line in re.finditer(r"\S.*", text)]
    written = text.index(head) + len(head)
    docs = [match.span() for match in re.finditer('""".*?"""', text, re.DOTALL)]
    lines = [
        (a, b)
        for a, b in lines[:-1]
        if a >= written and not any(start <= a < end for start, end in docs)
    ]
    poor = [place for place in lines if one_line(text[slice(*place)]) not in mended]
    good = sorted(set(lines) - set(poor), key=lambda place: place[0] - place[1])[:MAX_GOOD]
    return {
        "prompt": code.INSTRUCTION.format(f"Complete this program.\n\n{row['prompt'].strip()}"),
        "response": text,
        "critique": one_line(row["Feedback"]),
        "good_spans": [quote_of(text, *place) for place in sorted(good)],
        "poor_spans": [quote_of(text, *place) for place in poor],
    }


FORMS = {
    "candidate": defacto,
    "prediction 1": finegrained_qa,
    "original_model_completion": ilf,
}  # by a field that only this form has


def sentences(passages, place) -> str:
    """Returns what {"passage_id": i, "sentence_id": [j, ...]} points at; passages count from 1."""
    passage = passages[place["passage_id"] - 1]
    return opening(" ".join(passage[j] for j in place["sentence_id"] if j < len(passage)))


def opening(text) -> str:
    """The first words of a text, and dots where there are more.

    >>> opening("One two three four five six seven eight nine")
    'One two three four five six seven eight ...'
    """
    words = text.split()
    return " ".join(words[:WORDS_QUOTED]) + (" ..." if len(words) > WORDS_QUOTED else "")


def joined(text, places) -> list[tuple[int, int]]:
    """Ranges in order, those that overlap or have only link words between them as one.

    >>> joined("in the city of Leeds", [(15, 20), (7, 11)])
    [(7, 20)]
    """
    whole = []
    for start, end in sorted(places):
        if whole and (start <= whole[-1][1] or is_link(text[whole[-1][1] : start])):
            whole[-1] = (whole[-1][0], max(end, whole[-1][1]))
        else:
            whole.append((start, end))
    return whole


LINK = re.compile(r"(?:\W|\b(?:an?|the|of|in|on|at|to|for|and|by|with|from)\b)*", re.IGNORECASE)


def is_link(text) -> bool:
    """Nothing but white space, punctuation and the little words that carry no fact."""
    return LINK.fullmatch(text) is not None


def longest_kept(text, wrong) -> list[tuple[int, int]]:
    """The longest runs of words outside the wrong ranges, in the order of the text."""
    runs, last = [], None
    for word in WORD.finditer(text):
        start, end = word.span()
        if word[0] in ".;!?" or any(start < b and a < end for a, b in wrong):
            last = None
        elif last is None:
            runs.append([start, end, 1])
            last = runs[-1]
        else:
            last[1:] = [end, last[2] + 1]
    longest = sorted((run for run in runs if run[2] >= SHORTEST_GOOD), key=lambda run: -run[2])[
        :MAX_GOOD
    ]
    return sorted((start, end) for start, end, _ in longest)


def one_line(text) -> str:
    return " ".join(text.split())


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("file", help="rows of DeFacto, FineGrainedRLHF or ILF")
    parser.add_argument("--out", required=True, help="the annotations to write, a .jsonl file")
    args = parser.parse_args()
    cli.make_folder(Path(args.out).parent, "--out")
    found = records(read_jsonl(args.file), args.file)
    write_whole(Path(args.out), found)
    print(f"annotations: {args.out}, {len(found)} records")


if __name__ == "__main__":
    main()
