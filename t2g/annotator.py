"""Dual-feedback annotation by a model behind a server: it reasons, criticises, and then quotes.

Every span is one that the critique supports (Text2Grad, sec. 3.1), and every quote occurs in the
response. An invalid answer is sent back with its fault, and a record without a valid answer fails
with a reason. annotate.py is the command line; server.py sends the requests.
"""

import asyncio
import json

from tqdm import tqdm

from t2g import server
from t2g.align import find
from t2g.feedback import Feedback, FeedbackError, quoted
from t2g.server import NoAnswer, OverBudget, Refused, Stop, Tokens

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

KINDS = {"reasoning": str, "critique": str, "good_spans": list, "poor_spans": list}
STRING = {"type": "string"}
STRINGS = {"type": "array", "items": STRING}
SCHEMA = {
    "type": "object",
    "properties": {key: STRINGS if kind is list else STRING for key, kind in KINDS.items()},
    "required": list(KINDS),
    "additionalProperties": False,
}
JSON_SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "annotation", "strict": True, "schema": SCHEMA},
}
SILENCE = 10  # records without an answer in a row, after which the server itself is at fault


# ---- the question and its answer ---------------------------------------------------------------
def question(record, criteria, max_spans) -> str:
    """Returns what an annotator is asked about a record, its "test_log" included if it has one."""
    texts = {"prompt": record["prompt"], "response": record["response"]}
    asked = QUESTION.format(criteria=criteria, max_spans=max_spans, **texts)
    return asked + (TEST_LOG.format(record["test_log"]) if record.get("test_log") else "")


def read_annotation(text: str, response: str, max_spans: int) -> dict:
    """Returns the fields of an annotator's answer.

    Raises: FeedbackError for an invalid answer; it names the fault for the annotator to repair.
    """
    # Some servers return the model's own thoughts in front of the answer.
    fields = json_object(text) or json_object(text.partition("</think>")[2])
    if not fields:
        raise FeedbackError("it is not a JSON object")
    if not all(isinstance(fields.get(key), kind) for key, kind in KINDS.items()):
        raise FeedbackError(
            "reasoning and critique must be strings, good_spans and poor_spans lists"
        )
    for key in ("good_spans", "poor_spans"):
        if not all(isinstance(quote, str) for quote in fields[key]):
            raise FeedbackError(f"{key} must be a list of strings")
        if len(fields[key]) > max_spans:
            raise FeedbackError(f"{key} has {len(fields[key])} quotes; at most {max_spans} may be")
    reasoning = fields["reasoning"].encode(errors="replace").decode()  # without lone surrogates
    return {"reasoning": reasoning, **checked(fields, response)}


def json_object(text: str) -> dict | None:
    """Returns the JSON from the first brace of a text to the last one; None if it is invalid."""
    try:
        return json.loads(text[text.find("{") : text.rfind("}") + 1])
    except (ValueError, RecursionError):
        return None


def checked(fields: dict, response: str) -> dict:
    """Returns critique, good_spans and poor_spans, with each quote as the response spells it.

    Raises: FeedbackError, whose message contains no words of the response.
    """
    critique = fields["critique"]
    if not isinstance(critique, str) or not critique.strip():
        raise FeedbackError("the critique is empty or not a string")
    Feedback(critique, fields["good_spans"], fields["poor_spans"])  # checks the types
    spans = {}
    for key, place in (("good_spans", 0), ("poor_spans", -1)):  # the place that align.py marks
        spans[key] = [as_spelled(quote, response, place) for quote in fields[key]]
        if None in spans[key]:
            number = spans[key].index(None) + 1
            fault = "does not occur in the response; copy it character for character"
            raise FeedbackError(f"quote {number} of {key} {fault}")
    critique = critique.strip()
    Feedback.parse(Feedback(critique, *spans.values()).render())
    return {"critique": critique, **spans}


def as_spelled(quote, response, place):
    """Returns a quote in the very characters of the response; None if it does not occur there."""
    kind, places = find(response, quoted(quote)[0])
    if kind not in ("exact", "normalised"):
        return None
    text = response[slice(*places[place])]
    return text if isinstance(quote, str) else {**quote, "text": text}


# ---- asking ------------------------------------------------------------------------------------
class Annotator:
    """Asks about records until the answers are valid; remembers which options the server refuses.

    Args: args has the flags of annotate.py.
    """

    def __init__(self, args, criteria, meter):
        self.args, self.criteria, self.meter = args, criteria, meter
        self.client = server.client(args.base_url, args.timeout, args.max_retries)
        self.options = {"model": args.model, "max_tokens": args.max_tokens}
        self.options |= {"temperature": args.annotator_temperature, "response_format": JSON_SCHEMA}
        self.answered = False  # whether the server has accepted these options
        self.silence = 0  # number of records without an answer since the last answer

    def annotate_all(self, records, save):
        """Calls save(record) for each record, as soon as it is finished.

        Skips records that the budget does not allow. Records without any answer are saved at the
        end, as failed, if the server answered others; otherwise the next run asks about them.
        Raises: Stop.
        """
        unanswered = []

        async def annotate(record):
            try:
                record = await self.annotate(record)
            except OverBudget:
                return
            if any(tokens_of(record)):
                save(record)
            else:
                unanswered.append(record)
            if self.silence >= SILENCE:
                raise silent(record)

        def silent(record):
            count = f"{self.silence} records in a row"
            return Stop(f"{record['reason']}, {count}; {server.CHECK}")

        server.ask_all(self.client, records, annotate, self.args.concurrency)
        if unanswered and not self.answered:
            raise silent(unanswered[-1])
        for record in unanswered:
            save(record)

    async def annotate(self, record) -> dict:
        """Returns the finished record, "ok" or "failed".

        Raises: Stop; OverBudget if nothing has been paid for this record yet.
        """
        asked = question(record, self.criteria, self.args.max_spans)
        opening = messages = [{"role": "user", "content": asked}]
        used, heard, reason = Tokens(), False, ""
        for _ in range(self.args.max_retries + 1):
            try:
                answer = await self.ask(messages)
            except (NoAnswer, OverBudget) as error:
                if isinstance(error, OverBudget) and used == Tokens():
                    raise
                reason = str(error)
                break
            used += answer.tokens
            if answer.text is None:
                reason = "the server's answer is not a chat completion"
                await asyncio.sleep(1)
                continue
            heard = True
            try:
                fields = read_annotation(answer.text, record["response"], self.args.max_spans)
                return finished(record, fields | {"annotator": self.args.model}, used)
            except FeedbackError as error:
                cut_off = f"it was cut off after {self.args.max_tokens} tokens; be shorter"
                fault = cut_off if answer.finish_reason == "length" else error
            reason = f"the answer is invalid: {fault}"
            said = {"role": "assistant", "content": answer.text.strip() or "{}"}
            messages = [*opening, said, {"role": "user", "content": REPAIR.format(fault=fault)}]
        self.silence += not heard
        return finished(record, {"critique": "", "good_spans": [], "poor_spans": []}, used, reason)

    async def ask(self, messages) -> server.Answer:
        """Asks once, or again with fewer options where the server refuses them."""
        options = self.options
        while True:
            try:
                answer = await self.meter.ask(self.client, messages=messages, **options)
                break
            except Refused as refusal:
                if self.answered and options is self.options:
                    raise  # these options are accepted, so the record is at fault
                options = self.options if self.answered else fewer(options, refusal.param)
                if not options:
                    raise
        if answer.text is not None:
            if options is not self.options and not self.answered:
                tqdm.write(f"the server refuses some options; left are {', '.join(options)}")
                self.options = options
            self.answered, self.silence = True, 0
        return answer


def fewer(options, refused) -> dict | None:
    """Returns the options without the one that the server names, or with a looser answer format."""
    rest = dict(options)
    if refused in ("temperature", "max_tokens") and refused in rest:
        value = rest.pop(refused)
        return rest | ({"max_completion_tokens": value} if refused == "max_tokens" else {})
    answer_format = rest.pop("response_format", None)
    if answer_format == JSON_SCHEMA:
        rest["response_format"] = {"type": "json_object"}
    return rest if answer_format else None


def finished(record, fields, used: Tokens, reason="") -> dict:
    """Returns a record with its fields, its status and all that it has cost so far."""
    usage = (tokens_of(record) + used)._asdict()
    status = "failed" if reason else "ok"
    return {**record, **fields, "status": status, "reason": reason, "usage": usage}


def tokens_of(record) -> Tokens:
    """Returns what a record has cost so far."""
    return Tokens(**record.get("usage") or {})
