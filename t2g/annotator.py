"""How a model behind a server annotates: asked, checked, asked again, many records at once; nothing is lost, nothing is paid twice.

It reasons first, then criticises, then quotes, so that every span is one that the critique supports (Text2Grad, sec. 3.1), and
every quote must stand in the response. A record is written as soon as it is there. The command line is in annotate.py.
"""

import asyncio
import json
import random

from tqdm import tqdm

from t2g import critics, server
from t2g.align import find
from t2g.feedback import Feedback, FeedbackError, quoted
from t2g.server import OverBudget, added

CRITERIA = """\
Good is what the writer should keep: right, to the point, well said. Poor is what the writer should change: wrong, made up,
misleading, repeated, beside the point, badly said."""  # unless the task has its own

QUESTION = """\
Review a response to a prompt: say what is good and what is poor in it, and where.
{criteria}

Answer with one JSON object and nothing else. Its keys, in this order:
"reasoning": your thoughts: go through the response step by step and hold it against the prompt
"critique": what you would tell the writer, in a few plain sentences: what is wrong, what is right, and why
"good_spans": at most {max_spans} quotes from the response that the critique praises, [] if there are none
"poor_spans": at most {max_spans} quotes from the response that the critique faults, [] if there are none
A quote is copied from the response, character for character. It is as short as it can be and still shows the place: mostly a few
words. Quote nothing that the critique does not speak of.

### Prompt
{prompt}

### Response
{response}
"""
TEST_LOG = "\n### Log of the unit tests\n{}\n"

KINDS = {"reasoning": str, "critique": str, "good_spans": list, "poor_spans": list}
TEXTS = {"type": "array", "items": {"type": "string"}}
SCHEMA = {
    "type": "object",
    "properties": {
        name: TEXTS if kind is list else {"type": "string"} for name, kind in KINDS.items()
    },
    "required": list(KINDS),
    "additionalProperties": False,
}
JSON_SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "annotation", "strict": True, "schema": SCHEMA},
}

SILENCE = (
    10  # records without an answer, one after the other: then the server is at fault and not they
)


# ---- what is asked, and what may come back -------------------------------------------------------------------------------


def question(record, criteria, max_spans) -> str:
    """What the annotator is asked about a record; with the log of its unit tests, where the record has a "test_log"."""
    asked = QUESTION.format(
        criteria=criteria, max_spans=max_spans, prompt=record["prompt"], response=record["response"]
    )
    return asked + (TEST_LOG.format(record["test_log"]) if record.get("test_log") else "")


def read_annotation(text: str, response: str, max_spans: int) -> dict:
    """The fields of an annotator's answer. Raises: FeedbackError for any other text, naming the fault for the annotator to mend."""
    said = json_object(text) or json_object(
        text.partition("</think>")[2]
    )  # some servers leave a model's own thoughts in
    if not said:
        raise FeedbackError("it is no JSON object")
    typed = all(isinstance(said.get(name), kind) for name, kind in KINDS.items())
    if not typed or not all(
        isinstance(quote, str) for quote in said["good_spans"] + said["poor_spans"]
    ):
        raise FeedbackError(
            "it needs reasoning and critique, each a text, and good_spans and poor_spans, each a list of texts"
        )
    for name in ("good_spans", "poor_spans"):
        if len(said[name]) > max_spans:
            raise FeedbackError(
                f"{name} holds {len(said[name])} quotes, and at most {max_spans} are wanted"
            )
    reasoning = (
        said["reasoning"].encode(errors="replace").decode()
    )  # half of a surrogate pair would not go into the file
    return {"reasoning": reasoning, **checked(said, response)}


def json_object(text: str) -> dict | None:
    """What stands from the first brace of a text to the last one, None if that is no JSON."""
    try:
        return json.loads(text[text.find("{") : text.rfind("}") + 1])
    except (ValueError, RecursionError):
        return None


def checked(said: dict, response: str) -> dict:
    """critique, good_spans and poor_spans, each quote as it stands in the response.

    Raises: FeedbackError that names the fault without words of the response.
    """
    if not isinstance(said["critique"], str) or not said["critique"].strip():
        raise FeedbackError("the critique is empty, or no text")
    Feedback(said["critique"], said["good_spans"], said["poor_spans"])
    spans = {}
    for name, which in (
        ("good_spans", 0),
        ("poor_spans", -1),
    ):  # the place that the quote marks, see align.py
        spans[name] = [as_it_stands(quote, response, which) for quote in said[name]]
        if None in spans[name]:
            number = spans[name].index(None) + 1
            raise FeedbackError(
                f"quote {number} of {name} does not stand in the response; copy it character for character"
            )
    critique = said["critique"].strip()
    Feedback.parse(Feedback(critique, *spans.values()).render())
    return {"critique": critique, **spans}


def as_it_stands(quote, response, which):
    """A quote, with or without a severity, in the very characters of the response; None if it stands nowhere."""
    kind, places = find(response, quoted(quote)[0])
    if kind not in ("exact", "normalised"):
        return None
    text = response[slice(*places[which])]
    return text if isinstance(quote, str) else {**quote, "text": text}


def prompted_critic(
    model, tokenizer, criteria, critique_length=400, max_spans=2, bf16=False, desc=None
):
    """A critic out of any chat model that is loaded here: asked once, as a server is, and read as strictly. See critics.py."""
    ask = critics.asker(model, tokenizer, critique_length, desc=desc, bf16=bf16)

    def read_or_none(text, response):
        try:
            said = read_annotation(text, response, max_spans)
        except FeedbackError:
            return None
        return Feedback(said["critique"], said["good_spans"], said["poor_spans"])

    def asked_of(prompt, response):
        return question({"prompt": prompt, "response": response}, criteria, max_spans)

    def critic(examples, responses):
        texts = ask(examples, responses, asked_of)
        return [
            None if text is None else read_or_none(text, response)
            for text, response in zip(texts, responses)
        ]

    return critic


# ---- asking --------------------------------------------------------------------------------------------------------------


class Annotator:
    """Asks for one record at a time, as often as it takes; what it learns of the server it keeps for all the others."""

    def __init__(self, client, args, criteria, meter):
        self.client, self.criteria, self.meter = client, criteria, meter
        self.max_spans, self.max_retries, self.max_tokens = (
            args.max_spans,
            args.max_retries,
            args.max_tokens,
        )
        self.options = {"model": args.model, "max_tokens": args.max_tokens, "temperature": args.annotator_temperature,
                        "response_format": JSON_SCHEMA}  # fmt: skip
        self.answered = False  # whether the server has ever taken these options
        self.silence = 0  # records without an answer since the last answer

    async def annotate(self, record) -> dict:
        """The finished record, "ok" or "failed". Raises: Stop; OverBudget before anything of this record was paid."""
        opening = {"role": "user", "content": question(record, self.criteria, self.max_spans)}
        messages, used, heard, reason = [opening], (0, 0), False, ""
        for attempt in range(self.max_retries + 1):
            try:
                answer, paid = await self.ask(messages)
                used, heard = added(used, paid), True
                if answer.finish_reason == "length":
                    raise FeedbackError(
                        f"it was cut off after {self.max_tokens} tokens; be shorter"
                    )
                said = read_annotation(answer.text, record["response"], self.max_spans)
                return finished(record, said | {"annotator": self.options["model"]}, used)
            except FeedbackError as fault:
                reason = f"the answer is of no use: {fault}"
                again = f"That is of no use: {fault}. Give the whole JSON object again, mended."
                messages = [
                    opening,
                    {"role": "assistant", "content": answer.text.strip() or "{}"},
                    {"role": "user", "content": again},
                ]
            except server.Unreadable as error:
                reason, used = str(error), added(used, self.most(messages))
                await asyncio.sleep(min(0.5 * 2**attempt, 8) * random.uniform(0.5, 1))
            except server.NoAnswer as error:  # the client has asked again already
                reason = str(error)
                break
            except OverBudget:
                if used == (0, 0):
                    raise
                reason = "the budget was reached before an answer was of use"
                break
        self.silence += not heard
        return finished(record, {"critique": "", "good_spans": [], "poor_spans": []}, used, reason)

    async def ask(self, messages) -> tuple[server.Answer, tuple[int, int]]:
        """One answer and the tokens it cost. Options that the server refuses are given up, for good once it has answered."""
        options = self.options
        while True:
            most, used = self.most(messages), (0, 0)
            await self.meter.begin(most)
            try:
                answer = await server.ask(self.client, messages=messages, **options)
                used = answer.tokens or most
                break
            except server.Unreadable:
                used = most  # it was written, and so it is charged
                raise
            except server.Refused as refusal:
                if self.answered and options is self.options:
                    raise
                options = self.options if self.answered else easier(options, refusal.param)
                if not options:
                    raise
            finally:
                await self.meter.end(most, used)
        if not self.answered and options is not self.options:
            said = ", ".join(
                f"{k} {v['type'] if isinstance(v, dict) else v}"
                for k, v in options.items()
                if k != "model"
            )
            tqdm.write(
                f"the server refuses some options; from now on it is asked with {said} and no others"
            )
            self.options = options
        self.answered, self.silence = True, 0
        return answer, used

    def most(self, messages) -> tuple[int, int]:
        """The tokens that a request may cost at most: a token of the prompt has a byte at least."""
        return len(json.dumps([messages, self.options])), self.max_tokens


def easier(options, param) -> dict | None:
    """The options without the one that the server names as refused, else with less of JSON; None if nothing is left to give up."""
    rest = {name: value for name, value in options.items() if name != param}
    if param == "temperature" and param in options:
        return rest
    if param == "max_tokens" and param in options:
        return rest | {"max_completion_tokens": options["max_tokens"]}
    rest = {name: value for name, value in options.items() if name != "response_format"}
    if options.get("response_format") == JSON_SCHEMA:
        return rest | {"response_format": {"type": "json_object"}}
    return rest if "response_format" in options else None


def finished(record, fields, used, reason="") -> dict:
    used = added(tokens_of(record), used)
    usage = {"prompt_tokens": used[0], "completion_tokens": used[1]}
    return {
        **record,
        **fields,
        "status": "failed" if reason else "ok",
        "reason": reason,
        "usage": usage,
    }


def tokens_of(record) -> tuple[int, int]:
    """The tokens that a record has cost so far, of prompts and of answers."""
    usage = record.get("usage") or {}
    return usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)


async def annotate_all(records, save, annotator, concurrency):
    """Annotates records, `concurrency` at once, and saves each one as soon as it is there; ends early where the budget does.

    A record without an answer is saved only once the server has answered another: else it is asked again in the next run.
    Raises: Stop.
    """
    waiting, todo = [], iter(records)

    async def work():
        for record in todo:
            try:
                done = await annotator.annotate(record)
            except OverBudget:
                return
            if any(tokens_of(done)):
                save(done)
            else:
                waiting.append(done)
            if annotator.silence >= SILENCE:
                raise silent(done)
            while waiting and not annotator.silence:
                save(waiting.pop())

    def silent(record):
        return server.Stop(
            f"{record['reason']}, and so for {annotator.silence} records in succession; see to the server"
        )

    try:
        async with annotator.client, asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    if waiting and not annotator.answered:
        raise silent(waiting[-1])
    for record in waiting:
        save(record)
