"""Turns human feedback, published or one's own, into the records that train_rm.py learns from.

    python -m extras.human.records FILE --out annotations.jsonl

Each line of FILE is a row of DeFacto (an explanation, instructions, a corrected summary), of
FineGrainedRLHF's QA feedback (ranges of errors by kind), of ILF's feedback on programs (a critique
and the mended program), or a record of annotate.py in which people filled in critique, good_spans
and poor_spans, as the page of extras.human.page does. Invalid feedback is reported and left out.

In the published forms, poor marks what people removed or named; few places are marked good: names
and numbers of a summary that the corrector kept and the article has, the longest runs of an answer
without an error, the longest lines of a program that were kept.
"""

import difflib
import json
import re
from pathlib import Path

from extras.code import problems
from t2g import cli
from t2g.align import find
from t2g.critics import quote_of
from t2g.feedback import Feedback, FeedbackError
from t2g.log import read_jsonl
from t2g.notes import read_feedback, write_whole
from t2g.tasks import summarize

MAX_GOOD, MIN_GOOD_WORDS = 2, 4  # good quotes of a response; words of a run that counts as good
QUOTED_WORDS = 8  # at most, of a marked range or a passage in a critique
QUESTION = "Answer the question from the passages.\n\nQuestion: {}\n\nPassages:\n{}"
ERRORS = {  # FineGrainedRLHF's kinds of error as a critique; {} is the annotator's note
    "Irrelevant": "does not bear on the question",
    "Redundant": "repeats what was said",
    "Wrong-Grounding": "is not what the passages say{}",
    "Unverifiable": "stands in none of the passages",
    "Incoherent": "does not hang together",
}
INSTRUCTION = re.compile(
    r"(?:Remove|Replace) the information about (.+?)"
    r"(?: from the summary| with the information about .+)\.?"
)
WORD = re.compile(r"\w+|[^\w\s]")
# White space, punctuation and the little words that carry no fact.
LINK = re.compile(r"(?:\W|\b(?:an?|the|of|in|on|at|to|for|and|by|with|from)\b)*", re.IGNORECASE)


def records(rows, name) -> list[dict]:
    """Returns the annotation records of a file's rows; fails with the number of a faulty row."""
    result, stem = [], Path(name).stem  # part of the ids, so that files can be joined
    for number, row in enumerate(rows, 1):
        form = next((form for field, form in FORMS.items() if field in row), filled_in)
        try:
            record = {"id": f"{stem}-{number}", **form(row), "status": "ok", "reason": ""}
            Feedback(record["critique"], record["good_spans"], record["poor_spans"])
        except FeedbackError as error:
            print(f"row {number} of {name} is left out: {error}")
            continue
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            problem = "has no known form; see the head of extras/human/records.py"
            cli.fail(f"row {number} of {name} {problem}")
        result.append(record)
    return result or cli.fail(f"no row of {name} has valid feedback")


def filled_in(row) -> dict:
    """Checks a record that people filled in, and spells each quote as the response does."""
    from t2g import annotator  # here, because it needs openai, and published rows do not

    fields = {"critique": None, "good_spans": [], "poor_spans": [], **row}
    record = fields | annotator.checked(fields, row["response"])
    read_feedback(record)
    return record


def defacto(row) -> dict:
    """Critique: explanation and instructions. Poor: what these quote or the correction removed."""
    text, feedback = row["candidate"], row["feedback"]
    wrong = changes(text, feedback["summary"]) if row["has_error"] else []
    for line in feedback["instruction_list"]:
        if match := INSTRUCTION.fullmatch(line.strip()):
            kind, places = find(text, match[1])
            wrong += places if kind in ("exact", "normalised") else []
    poor = joined(text, [place for place in wrong if not LINK.fullmatch(text[slice(*place)])])
    known, good = summarize.words_of(row["article"]), []
    for place in summarize.names_and_numbers(text):
        is_kept = not any(overlap(place, other) for other in wrong)
        if is_kept and summarize.words_of(text[slice(*place)]) <= known:
            good.append(place)
    kind = " and ".join(kind for kind in ("intrinsic", "extrinsic") if row[f"{kind}_error"])
    prompt = summarize.INSTRUCTION.format(row["article"].strip())
    critique = f"{feedback['explanation']} {feedback['instruction']}"
    return record_of(prompt, text, critique, good[:MAX_GOOD], poor, kinds=[kind] * len(poor))


def finegrained_qa(row) -> dict:
    """Critique: a sentence for each error, and what is missing. Poor: the marked ranges."""
    text, passages, feedback = row["prediction 1"], row["passages"], row["feedback"]
    errors = sorted(feedback["errors"], key=lambda error: error["start"])
    ranges, remarks = [], []
    for error in errors:
        ranges.append((error["start"], error["end"]))
        note = ""
        if error["error type"] == "Wrong-Grounding":
            note = sentences(passages, json.loads(error["explanation"])).removesuffix(".")
        remark = ERRORS[error["error type"]].format(f": {note}" if note else "")
        remarks.append(f'"{opening(text[slice(*ranges[-1])])}" {remark}.')
    for missing in feedback["missing-info"][:1]:
        remarks.append(f"It leaves out: {sentences(passages, missing)}")
    paragraphs = "\n".join(" ".join(passage[1:]).strip() for passage in passages)
    prompt = QUESTION.format(row["question"], paragraphs)
    critique = " ".join(remarks) or "It answers the question from the passages."
    kinds = [error["error type"] for error in errors]
    return record_of(prompt, text, critique, longest_kept(text, ranges), ranges, kinds=kinds)


def ilf(row) -> dict:
    """Critique: the feedback. Poor: lines that the mended program lacks."""
    text = f"```python\n{row['original_model_completion'].strip()}\n```"
    mended = {one_line(line) for line in row["unedited_annotator_completion"].splitlines()}
    head = row["prompt"].rstrip().rpartition("\n")[2]
    body = text.index(head) + len(head)
    docstrings = [match.span() for match in re.finditer('""".*?"""', text, re.DOTALL)]
    lines, poor = set(), []
    for line in list(re.finditer(r"\S.*", text))[:-1]:
        in_docstring = any(start <= line.start() < end for start, end in docstrings)
        if line.start() >= body and not in_docstring:
            lines.add(line.span())
            poor += [] if one_line(line[0]) in mended else [line.span()]
    good = sorted(lines - set(poor), key=lambda place: place[0] - place[1])[:MAX_GOOD]
    prompt = problems.INSTRUCTION.format(f"Complete this program.\n\n{row['prompt'].strip()}")
    return record_of(prompt, text, row["Feedback"], sorted(good), poor)


FORMS = {  # by a field that only this form has
    "candidate": defacto,
    "prediction 1": finegrained_qa,
    "original_model_completion": ilf,
}


def record_of(prompt, response, critique, good, poor, **more) -> dict:
    return {
        "prompt": prompt,
        "response": response,
        "critique": one_line(critique),
        "good_spans": [quote_of(response, *place) for place in good],
        "poor_spans": [quote_of(response, *place) for place in poor],
        **more,
    }


def changes(text: str, corrected: str) -> list[tuple[int, int]]:
    """Returns the ranges of words of a text that its correction lacks."""
    words = list(WORD.finditer(text))
    before = [word[0].casefold() for word in words]
    after = [word[0].casefold() for word in WORD.finditer(corrected)]
    steps = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    removed = [(i, j) for step, i, j, _, _ in steps if step in ("replace", "delete")]
    return [(words[i].start(), words[j - 1].end()) for i, j in removed]


def sentences(passages, place) -> str:
    """Returns what {"passage_id": i, "sentence_id": [j, ...]} points at; passages count from 1."""
    passage = passages[place["passage_id"] - 1]
    return opening(" ".join(passage[j] for j in place["sentence_id"] if j < len(passage)))


def opening(text) -> str:
    """Returns the first words of a text, and dots if there are more.

    >>> opening("One two three four five six seven eight nine")
    'One two three four five six seven eight ...'
    """
    words = text.split()
    return " ".join(words[:QUOTED_WORDS]) + (" ..." if len(words) > QUOTED_WORDS else "")


def joined(text, places) -> list[tuple[int, int]]:
    """Returns ranges in order; joins those that overlap or have only link words between them."""
    whole = []
    for start, end in sorted(places):
        if whole and (start <= whole[-1][1] or LINK.fullmatch(text[whole[-1][1] : start])):
            whole[-1] = (whole[-1][0], max(end, whole[-1][1]))
        else:
            whole.append((start, end))
    return whole


def longest_kept(text, wrong) -> list[tuple[int, int]]:
    """Returns the longest runs of words within a sentence and outside the wrong ranges."""
    runs, continues = [], False
    for word in WORD.finditer(text):
        is_kept = not any(overlap(word.span(), other) for other in wrong)
        if word[0] in ".;!?" or not is_kept:
            continues = False
        elif continues:
            runs[-1].append(word)
        else:
            runs.append([word])
            continues = True
    longest = sorted((run for run in runs if len(run) >= MIN_GOOD_WORDS), key=len, reverse=True)
    return sorted((run[0].start(), run[-1].end()) for run in longest[:MAX_GOOD])


def overlap(a, b) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def one_line(text) -> str:
    return " ".join(text.split())


@cli.friendly_errors()
def main():
    parser = cli.parser(__doc__)
    kinds = "what people marked, or rows of DeFacto, FineGrainedRLHF or ILF"
    parser.add_argument("file", help=kinds)
    parser.add_argument("--out", required=True, help="the annotations to write, a .jsonl file")
    only = "leave out responses without a fault"
    parser.add_argument("--with_faults", action="store_true", help=only)
    args = parser.parse_args()
    cli.keep_input(args.out, args.file, "--out")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    kept = records(read_jsonl(args.file), args.file)
    if args.with_faults:
        kept = [record for record in kept if record["poor_spans"]]
    write_whole(Path(args.out), kept)
    print(f"annotations: {args.out}, {len(kept)} records")


if __name__ == "__main__":
    main()
