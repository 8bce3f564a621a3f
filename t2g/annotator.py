"""Dual-feedback annotation by a model behind a server: it reasons, criticises, and then quotes.

The prompt asks for quotes that the critique supports (Text2Grad, sec. 3.1); the code checks only
that they occur in the response. An invalid answer is sent back with the reason, to be corrected.
"""

import asyncio
import json

import pydantic
from tqdm import tqdm

from t2g import server
from t2g.align import find
from t2g.feedback import Feedback, FeedbackError, quoted
from t2g.server import NoAnswer, Refused, Stop, Tokens

CRITERIA = """\
Good is what the writer should keep: right, to the point, well said. Poor is what the writer \
should change: wrong, made up,
misleading, repeated, beside the point, badly said."""  # unless the task has its own

QUESTION = """\
Review a response to a prompt: say what is good and what is poor in it, and where.
{criteria}

Answer with one JSON object and nothing else. Its keys, in this order:
"reasoning": your thoughts: go through the response step by step and hold it against the prompt
"critique": what you would tell the writer, in a few plain sentences: what is wrong, what is \
right, and why
"good_spans": at most {max_spans} quotes from the response that the critique praises, [] if there \
are none
"poor_spans": at most {max_spans} quotes from the response that the critique faults, [] if there \
are none
A quote is copied from the response, character for character. It is as short as it can be and \
still shows the place: mostly a few
words. Quote nothing that the critique does not speak of.

### Prompt
{prompt}

### Response
{response}
"""
TEST_LOG = "\n### Log of the unit tests\n{}\n"
REPAIR = "That is of no use: {fault}. Give the whole JSON object again, mended."

NOTHING = {"critique": "", "good_spans": [], "poor_spans": []}
SILENCE = 10  # records without an answer in a row, after which the server itself is at fault


class Annotation(pydantic.BaseModel, json_schema_extra={"additionalProperties": False}):
    reasoning: str
    critique: str
    good_spans: list[str]
    poor_spans: list[str]


SCHEMA = {"name": "annotation", "strict": True, "schema": Annotation.model_json_schema()}
JSON_SCHEMA, JSON_OBJECT = {"type": "json_schema", "json_schema": SCHEMA}, {"type": "json_object"}


class OverBudget(NoAnswer):
    """The request was not sent because it might exceed the budget."""


# ---- the question and its answer ---------------------------------------------------------------
def question(record, criteria, max_spans) -> str:
    """Returns what an annotator is asked about a record, its "test_log" included if it has one."""
    asked = QUESTION.format_map(record | {"criteria": criteria, "max_spans": max_spans})
    return asked + (TEST_LOG.format(record["test_log"]) if record.get("test_log") else "")


def read_annotation(text: str, response: str, max_spans: int) -> dict:
    """Returns the fields of an annotator's answer. Raises: FeedbackError that names its fault."""
    rest = text.partition("</think>")[2]  # some servers put the model's own thoughts in front
    text = rest if "{" in rest else text
    try:
        answer = Annotation.model_validate_json(text[text.find("{") : text.rfind("}") + 1])
    except pydantic.ValidationError as error:
        fault = error.errors(include_input=False)[0]
        raise FeedbackError(": ".join([*map(str, fault["loc"]), fault["msg"]])) from None
    for key in ("good_spans", "poor_spans"):
        if (count := len(getattr(answer, key))) > max_spans:
            raise FeedbackError(f"{key} has {count} quotes; at most {max_spans} are allowed")
    return answer.model_dump() | checked(answer.model_dump(), response)


def checked(fields: dict, response: str) -> dict:
    """Returns critique, good_spans and poor_spans, with each quote as the response spells it.

    Raises: FeedbackError, whose message contains no words of the response.
    """
    critique = fields["critique"]
    if not isinstance(critique, str) or not critique.strip():
        raise FeedbackError("the critique is empty or not a string")
    Feedback(critique, fields["good_spans"], fields["poor_spans"])  # checks the types
    spans = {"good_spans": [], "poor_spans": []}
    for key, place in (("good_spans", 0), ("poor_spans", -1)):  # the place that align.py marks
        for number, quote in enumerate(fields[key], 1):
            kind, places = find(response, quoted(quote)[0])
            if kind not in ("exact", "normalised"):
                fault = "does not occur in the response; copy it character for character"
                raise FeedbackError(f"quote {number} of {key} {fault}")
            text = response[slice(*places[place])]
            spans[key].append(text if isinstance(quote, str) else {**quote, "text": text})
    return {"critique": critique.strip(), **spans}


# ---- asking ------------------------------------------------------------------------------------
class Annotator:
    """Asks about records until the answers are valid. args are the flags of annotate.py."""

    def __init__(self, args, criteria, spent: Tokens):
        self.args, self.criteria = args, criteria
        self.spent, self.pending = spent, []  # pending: the most that each open request may cost
        self.client = server.client(args.base_url, args.timeout, args.max_retries)
        usual = {"temperature": args.annotator_temperature, "max_tokens": args.max_tokens}
        reasoning = {"max_completion_tokens": args.max_tokens}  # the names of reasoning models
        formats = [{"response_format": JSON_SCHEMA}, {"response_format": JSON_OBJECT}, {}]
        self.options = [{**names, **form} for names in (usual, reasoning) for form in formats]

    def annotate_all(self, records, save):
        """Calls save(record) for each record, as soon as it is finished.

        Skips records that the budget does not allow. A record without any answer fails as soon as
        the server answers another one; otherwise the next run asks about it.
        Raises: Stop if the server answers none, or stays silent for several records in a row.
        """
        silent = []  # the records without an answer since the last answer

        async def annotate(record):
            try:
                save(await self.annotate(record))
            except OverBudget:
                return
            except NoAnswer as error:
                silent.append(finished(record, NOTHING, Tokens(), str(error)))
                if len(silent) >= SILENCE:
                    raise Stop(f"{error}, {SILENCE} records in a row; {server.CHECK}") from None
                return
            while silent:
                save(silent.pop())

        server.ask_all(self.client, records, annotate, self.args.concurrency)
        if silent and len(self.options) > 1:  # which the first answer would have settled
            raise Stop(f"{silent[-1]['reason']}; {server.CHECK}")
        for record in silent:
            save(record)

    async def annotate(self, record) -> dict:
        """Returns the finished record. Raises: Stop; NoAnswer if the server answers nothing."""
        asked = question(record, self.criteria, self.args.max_spans)
        opening = messages = [{"role": "user", "content": asked}]
        used, reason = Tokens(), ""
        for _ in range(self.args.max_retries + 1):
            try:
                answer = await self.ask(messages)
            except NoAnswer as error:
                if messages is opening:
                    raise
                reason = str(error)
                break
            used += answer.tokens
            try:
                fields = read_annotation(answer.text, record["response"], self.args.max_spans)
                return finished(record, fields | {"annotator": self.args.model}, used)
            except FeedbackError as error:
                cut_off = f"it was cut off after {self.args.max_tokens} tokens; be shorter"
                fault = cut_off if answer.finish_reason == "length" else error
            reason = f"the answer is invalid: {fault}"
            reply = {"role": "assistant", "content": answer.text.strip() or "{}"}
            messages = [*opening, reply, {"role": "user", "content": REPAIR.format(fault=fault)}]
        return finished(record, NOTHING, used, reason)

    async def ask(self, messages) -> server.Answer:
        """Asks with the first options that the server does not refuse, and keeps to these."""
        for options in self.options:
            try:
                answer = await self.ask_within_budget(messages, options)
            except Refused as error:
                refusal = error
                continue
            if len(self.options) > 1 and options is not self.options[0]:
                tqdm.write(f"the server refuses some options; now using {', '.join(options)}")
            self.options = [options]
            return answer
        raise refusal

    async def ask_within_budget(self, messages, options) -> server.Answer:
        """Asks once the worst case fits the budget, and charges it if the answer has no usage."""
        request = {"model": self.args.model, "messages": messages, **options}
        worst = Tokens(len(json.dumps(request)), self.args.max_tokens)  # a token is a byte or more
        while price(sum([*self.pending, worst], self.spent), self.args) > self.args.budget:
            if not self.pending:
                raise OverBudget("the budget was reached before a valid answer")
            await asyncio.sleep(0.05)
        self.pending.append(worst)
        used = Tokens()
        try:
            answer = await server.ask(self.client, **request)
            used = answer.tokens or worst
            return answer._replace(tokens=used)
        finally:
            self.pending.remove(worst)
            self.spent += used


def price(tokens: Tokens, args) -> float:
    return (args.input_price * tokens[0] + args.output_price * tokens[1]) / 1e6


def finished(record, fields, used: Tokens, reason="") -> dict:
    """Returns a record with its fields, its status and all that it has cost so far."""
    status = {"status": "failed" if reason else "ok", "reason": reason}
    return {**record, **fields, **status, "usage": (tokens_of(record) + used)._asdict()}


def tokens_of(record) -> Tokens:
    usage = record.get("usage") or {}
    return Tokens(*(usage.get(key, 0) for key in Tokens._fields))
