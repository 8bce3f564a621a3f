"""Summarise real texts in one sentence: articles or posts with a human summary.

--data is SLF5K (JeremyAlain/SLF5K: download its train.jsonl and validation.jsonl), recognised by
its fields, or any rows with a text and a summary under --source_field and --reference_field.

The rule of this task works for any English text. Poor are names, numbers and quotations that the
source does not contain, repetitions, the first word of a second sentence, words after MAX_WORDS,
an unfinished end, and a whole response of less than MIN_WORDS, because it is no sentence. Good
are at most MAX_GOOD short phrases that the source supports and that share a word with the human
summary. So silence earns nothing, a few words lose, and a list of names earns no more than a
sentence.
"""

import re
from functools import cache

from t2g import data
from t2g.cli import fail
from t2g.critics import quote_of
from t2g.feedback import Feedback
from t2g.statistics import rouge
from t2g.tasks import Example

INSTRUCTION = "Summarize this text in one sentence.\n\n{}"
MIN_WORDS, MAX_WORDS = 6, 40
MAX_GOOD, PHRASE_WORDS = 5, 6  # phrases marked as good, and words of one
SLF5K = ("title", "post", "ideal_human_summary")

CRITERIA = """\
Hold the summary against the text. Good: a phrase that gives the point of the text, or a detail
without which it would be another story, rightly and in few words. Poor: what the text does not
say or says otherwise, a detail that takes the place of something that matters more, what is said
twice, a phrase that leaves the reader wondering who or what is meant, a broken-off end. If the
point of the text is missing, the critique says so, and the words that stand in its place are
poor."""
METRICS = {
    "invented": "share of the names and numbers of the summary that the source does not contain",
    "names": "names and numbers in the summary",
    "poor": "spans that the rule marks as poor",
    "good": "spans that the rule marks as good",
    "sentence": "1 if it is one whole sentence of at least MIN_WORDS",
    "words": "words of the summary",
    "rouge_l": "F1 of ROUGE-L against the human summary",
}
LENGTHS = dict(response_length=56, eval_samples=32)
STEPS = dict(max_steps=20, per_device_train_batch_size=4, gradient_accumulation_steps=2)
DEFAULTS = {
    "annotate": dict(response_length=56),
    "train_ppo": dict(learning_rate=1e-5, num_mini_batches=2, num_ppo_epochs=2, **STEPS, **LENGTHS),
    "eval": LENGTHS,
}


def add_flags(add):
    add("--source_field", "article", "field of --data with the text to summarise")
    add("--reference_field", "abstract", "field of --data with a human summary")


def load(args):
    def reader(rows, name):
        if data.has(rows, *SLF5K):
            return from_slf5k
        for flag in ("source_field", "reference_field"):
            field = getattr(args, flag)
            if not data.has(rows, field):
                fail(f"{name} has no field {field!r}; it has {', '.join(rows[0])}: see --{flag}")
        return lambda row: example_of(row.get(args.source_field), row.get(args.reference_field))

    return data.load(args, reader)


def example_of(source, reference, **facts) -> Example | None:
    source, reference = data.text(source), data.text(reference)
    if not source:
        return None
    return Example(INSTRUCTION.format(source), reference, {"source": source, **facts})


def from_slf5k(row) -> Example | None:
    """Reads a post with its title, and the human feedback on a model's summary if there is any."""
    names = (*SLF5K, "generated_summary_for_feedback", "feedback")
    title, post, reference, candidate, feedback = (data.text(row.get(name)) for name in names)
    facts = dict(candidate=candidate, feedback=feedback) if candidate and feedback else {}
    return example_of(f"{title}\n\n{post}" if post else "", reference, **facts)


# ---- the rule -----------------------------------------------------------------------------------

WORD = re.compile(r"\d[\d,.:]*\d|\d|[^\W\d_]+(?:['’-][^\W\d_]+)*")
TITLES = r"(?<!\b[A-Z])(?<!\b(?:Mr|Dr|St|Ms))(?<!\bMrs)"  # whose full stops end no sentence
SECOND_SENTENCE = re.compile(TITLES + r"[.!?][\"”')\]]*\s+(?=[A-Z\"“])(\S+)")
ENDED = re.compile(r"[.!?][\"”')\]]*$")
SENTENCE = re.compile(r"[\"“‘']?[A-Z0-9£$€].*[.!?][\"”')\]]*$", re.DOTALL)
SAME_PHRASE = re.compile(r"[ \-'’/&%$£€]*")
QUOTED = re.compile(r"[\"“]([^\"“”]{3,})[\"”]")
COMMON_WORDS = """
a an the and or but nor so yet if of in on at by to from for with as is are was were be been being
has have had do does did will would can could may might must shall should not no it its this that
these those he she they we you i his her their our your my him them us me who whom which what when
where why how there here then than also after before over under about into out up down all some any
each more most other such only own same very just while during between both through because against
said says"""
COMMON = set(COMMON_WORDS.split())


def critique(example, response: str) -> Feedback:
    """Writes a sentence about each fault and one about what is good, and quotes both."""
    source = example.facts["source"]
    known, words = words_of(source), list(WORD.finditer(response))
    remarks, faults = [], []

    def mark(start, end, remark):
        faults.append((start, end))
        remarks.append(remark)

    for place in names_and_numbers(response):
        for word in WORD.finditer(response, *place):
            if not words_of(word[0]) <= known:
                kind = "number" if word[0][0].isdigit() else "name"
                mark(*word.span(), f"The {kind} {word[0]} is not in the source.")
    for quotation in QUOTED.finditer(response):
        if quotation[1].casefold() not in source.casefold():
            mark(*quotation.span(1), f'Nobody says "{quotation[1]}" in the source.')
    for start, end in repetitions(words):
        mark(start, end, f"It says {response[start:end].strip()} twice.")
    stripped = response.rstrip()
    second_sentence = SECOND_SENTENCE.search(stripped)
    if second_sentence:
        mark(*second_sentence.span(1), "It goes on after the first sentence.")
    elif len(words) > MAX_WORDS:
        mark(words[MAX_WORDS].start(), len(stripped), f"It runs on after {MAX_WORDS} words.")
    elif words and not ENDED.search(stripped):
        mark(words[-1].start(), len(stripped), f"It breaks off at {words[-1][0]}.")
    if 0 < len(words) < MIN_WORDS:
        mark(0, len(stripped), "It is no sentence.")

    good = good_phrases(response, words, faults, known, words_of(example.reference))
    named = ", ".join(response[start:end] for start, end in good)
    remarks.append(f"It rightly says {named}." if good else "It has nothing of what matters.")
    quotes = ([quote_of(response, *place) for place in places] for places in (good, faults))
    return Feedback(" ".join(remarks), *quotes)


def good_phrases(response, words, faults, known, wanted) -> list[tuple[int, int]]:
    """Returns the ranges of the first MAX_GOOD phrases that deserve praise.

    A phrase is a run of at most PHRASE_WORDS words between faults, punctuation marks and content
    words that are not known. It must have a content word of the human summary that no phrase before
    it had, and it begins and ends with a content word.
    """
    phrases, praised = [[]], set()
    for word in words:
        key = words_of(word[0])
        is_faulty = any(start < word.end() and word.start() < end for start, end in faults)
        supported = not is_faulty and key <= known | COMMON
        last = phrases[-1]
        continues = last and SAME_PHRASE.fullmatch(response[last[-1].end() : word.start()])
        if not supported or not continues or len(last) == PHRASE_WORDS:
            phrases.append([])
        if supported and (phrases[-1] or not key <= COMMON):
            phrases[-1].append(word)
    ranges = []
    for phrase in phrases:
        while phrase and words_of(phrase[-1][0]) <= COMMON:
            phrase.pop()
        new = {key for word in phrase for key in words_of(word[0])} & wanted - COMMON - praised
        if new:
            praised |= new
            ranges.append((phrase[0].start(), phrase[-1].end()))
    return ranges[:MAX_GOOD]


@cache
def words_of(text: str) -> frozenset:
    """Returns the words of a text in lower case, without a possessive 's."""
    words = (word[0].casefold() for word in WORD.finditer(text))
    return frozenset(word.removesuffix("'s").removesuffix("’s") for word in words)


def names_and_numbers(text: str) -> list[tuple[int, int]]:
    """Returns the ranges of numbers and of capitalised words, adjacent ones joined.

    A single capitalised word at the start of a sentence is left out: it may not be a name.
    """
    ranges = []
    for word in WORD.finditer(text):
        before = text[: word.start()]
        if word[0][0].isdigit():
            ranges.append(word.span())
        elif word[0][0].isupper() and word[0].casefold() not in COMMON:
            opens_sentence = not before.strip() or re.search(r"[.!?:\"“]\s*$", before)
            follows = ranges and before[ranges[-1][1] :] == " "
            if follows and not text[ranges[-1][0]].isdigit():
                ranges[-1] = (ranges[-1][0], word.end())
            elif not opens_sentence:
                ranges.append(word.span())
    return ranges


def repetitions(words) -> list[tuple[int, int]]:
    """Returns the ranges of three words in a row that occurred before, overlapping ones joined."""
    seen, ranges = set(), []
    for triple in zip(words, words[1:], words[2:]):
        key = tuple(word[0].casefold() for word in triple)
        start, end = triple[0].start(), triple[-1].end()
        if key in seen and ranges and start < ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], end)
        elif key in seen:
            ranges.append((start, end))
        seen.add(key)
    return ranges


def score(example, response: str) -> dict[str, float]:
    feedback, known = critique(example, response), words_of(example.facts["source"])
    names = [response[start:end] for start, end in names_and_numbers(response)]
    is_whole = SENTENCE.match(response.strip()) and not SECOND_SENTENCE.search(response)
    invented = [name for name in names if not words_of(name) <= known]
    return {
        "invented": len(invented) / max(len(names), 1),
        "names": len(names),
        "poor": len(feedback.poor),
        "good": len(feedback.good),
        "sentence": float(bool(is_whole) and len(WORD.findall(response)) >= MIN_WORDS),
        "words": len(response.split()),
        "rouge_l": rouge(example.reference, response, "rougeL")["rougeL"],
    }
