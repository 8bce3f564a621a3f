"""Summarise real texts in one sentence: articles or posts with a human summary, from a file or a hub data set.

--data is SLF5K (JeremyAlain/SLF5K: download its train.jsonl and validation.jsonl), known by its fields, or rows with a text and a
summary under --source_field and --reference_field.

The critic that comes with it is a program for any English text. Poor: names, numbers and quoted words that the source does not
contain; what is said twice; a broken-off ending; all that runs on past MAX_WORDS. Good: content words of the human summary, at
most MAX_GOOD of them, so that naming more and more does not pay.
"""

import re
from functools import cache

from t2g import data
from t2g.cli import fail
from t2g.critics import quote_of
from t2g.feedback import Feedback
from t2g.metrics import rouge_l
from t2g.tasks import Example

INSTRUCTION = "Summarize this text in one sentence.\n\n{}"
MAX_WORDS = 40
MAX_GOOD = 8
SLF5K = ("title", "post", "ideal_human_summary")

CRITERIA = """\
Hold the summary against the text. Good: a phrase that gives the point of the text, or a detail without which it would be another
story, rightly and in few words. Poor: what the text does not say or says otherwise, a detail that takes the place of something
that matters more, what is said twice, a phrase that leaves the reader wondering who or what is meant, a broken-off end. If the
point of the text is missing, the critique says so, and the words that stand in its place are poor."""
METRICS = {
    "invented": "share of the names and numbers of the summary that its source does not contain (0 if it has none)",
    "names": "names and numbers in the summary",
    "poor": "spans that the program marks as poor",
    "good": "spans that the program marks as good",
    "words": "words of the summary",
    "rouge_l": "F1 of ROUGE-L against the human summary",
}
DEFAULTS = {
    "annotate": dict(response_length=56),
    "train_ppo": dict(learning_rate=1e-5, max_steps=20, per_device_train_batch_size=4, gradient_accumulation_steps=2,
                      num_mini_batches=2, num_ppo_epochs=2, response_length=56, eval_samples=32),
    "eval": dict(response_length=56, eval_samples=32),
}  # fmt: skip


def load(args):
    def reader(rows, name):
        if data.has(rows, *SLF5K):
            return from_slf5k
        for field in (args.source_field, args.reference_field):
            if not data.has(rows, field):
                fail(
                    f"{name} has no field {field!r}; it has {', '.join(rows[0])}: see --source_field and --reference_field"
                )
        return lambda row: example_of(row.get(args.source_field), row.get(args.reference_field))

    return data.load(args, reader)


def example_of(source, reference, **facts):
    source = data.text(source)
    return (
        Example(INSTRUCTION.format(source), data.text(reference), {"source": source, **facts})
        if source
        else None
    )


def from_slf5k(row):
    """A post under its title; with what a person said of a model's summary of it, where that is there."""
    post = data.text(row.get("post"))
    said = {
        "candidate": data.text(row.get("generated_summary_for_feedback")),
        "feedback": data.text(row.get("feedback")),
    }
    facts = said if all(said.values()) else {}
    return example_of(
        post and f"{data.text(row.get('title'))}\n\n{post}", row.get("ideal_human_summary"), **facts
    )


# ---- the program as a critic -------------------------------------------------------------------------------------------

WORD = re.compile(r"\d[\d,.:]*\d|\d|[^\W\d_]+(?:['’-][^\W\d_]+)*")
QUOTED = re.compile(r"[\"“]([^\"“”]{3,})[\"”]")
COMMON = set(
    (
        "a an the and or but nor so yet if of in on at by to from for with as is are was were be been being has have had do "
        "does did will would can could may might must shall should not no it its this that these those he she they we you i "
        "his her their our your my him them us me who whom which what when where why how there here then than also after "
        "before over under about into out up down all some any each more most other such only own same very just while "
        "during between both through because against said says"
    ).split()
)


def critique(example, response: str) -> Feedback:
    """Sentences about what is poor, in the order of the kinds above, then one about what is good, and the quotes."""
    known, reference = words_of(example.facts["source"]), words_of(example.reference) - COMMON
    words = list(WORD.finditer(response))
    remarks, bad, good, poor = [], [], [], []

    def mark(start, end, remark):
        bad.append((start, end))
        poor.append(quote_of(response, start, end))
        remarks.append(remark)

    for start, end in names_and_numbers(response):
        if not stands_in(response[start:end], known):
            kind = "number" if response[start].isdigit() else "name"
            mark(start, end, f"The {kind} {response[start:end]} is not in the source.")
    for quoted in QUOTED.finditer(response):
        if quoted[1].casefold() not in example.facts["source"].casefold():
            mark(*quoted.span(1), f'Nobody says "{quoted[1]}" in the source.')
    for start, end in repetitions(response, words):
        mark(start, end, f"It says {response[start:end].strip()} twice.")
    if len(words) > MAX_WORDS:
        mark(
            words[MAX_WORDS].start(), len(response.rstrip()), f"It runs on after {MAX_WORDS} words."
        )
    elif words and not re.search(r"[.!?][\"”')\]]*$", response.rstrip()):
        mark(words[-1].start(), len(response.rstrip()), f"It breaks off at {words[-1][0]}.")

    for word in words:
        clean = not any(start < word.end() and word.start() < end for start, end in bad)
        if (
            clean
            and stands_in(word[0], reference)
            and word[0].casefold() not in map(str.casefold, good)
            and len(word[0]) > 3
        ):
            good.append(word[0])
    good = good[:MAX_GOOD]
    remarks.append(
        f"It rightly speaks of {', '.join(good)}." if good else "It has nothing of what matters."
    )
    return Feedback(" ".join(remarks), good, poor)


@cache
def words_of(text: str) -> frozenset:
    return frozenset(
        word[0].casefold().removesuffix("'s").removesuffix("’s") for word in WORD.finditer(text)
    )


def stands_in(name: str, known) -> bool:
    return all(word in known for word in words_of(name))


def names_and_numbers(text: str) -> list[tuple[int, int]]:
    """Numbers, and capitalised words; a single capitalised word that opens a sentence may be no name and does not count."""
    found = []
    for word in WORD.finditer(text):
        if word[0][0].isdigit():
            found.append(word.span())
        elif word[0][0].isupper() and word[0].casefold() not in COMMON:
            opens = not text[: word.start()].strip() or bool(
                re.search(r"[.!?:\"“]\s*$", text[: word.start()])
            )
            joined = (
                found
                and text[found[-1][1] : word.start()] == " "
                and not text[found[-1][0]].isdigit()
            )
            if joined:
                found[-1] = (found[-1][0], word.end())
            elif not opens:
                found.append(word.span())
    return found


def repetitions(text: str, words) -> list[tuple[int, int]]:
    """Three words in a row that stood there before, joined where they touch."""
    seen, found = set(), []
    for triple in zip(words, words[1:], words[2:]):
        key = tuple(word[0].casefold() for word in triple)
        if key in seen:
            start, end = triple[0].start(), triple[-1].end()
            if found and start < found[-1][1]:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
        seen.add(key)
    return found


def score(example, response: str) -> dict[str, float]:
    feedback = critique(example, response)
    named = [response[start:end] for start, end in names_and_numbers(response)]
    known = words_of(example.facts["source"])
    invented = [name for name in named if not stands_in(name, known)]
    return {
        "invented": len(invented) / max(len(named), 1),
        "names": len(named),
        "poor": len(feedback.poor),
        "good": len(feedback.good),
        "words": len(response.split()),
        "rouge_l": rouge_l(example.reference, response),
    }
