"""Asks servers with OpenAI's /v1/chat/completions: vLLM, llama.cpp, transformers serve, OpenAI.

The openai package repeats a request after 429, 5xx, a timeout or a broken connection: it waits
longer each time, or as long as Retry-After says. Error messages name a status or a kind of failure
and never quote an answer, because its body may contain texts and even the key.

Left out: streaming, tools and all other endpoints. annotator.py repeats invalid answers.
"""

import asyncio
import json
import math
import os
from typing import NamedTuple

import httpx2  # the HTTP library of openai
import openai

from t2g import cli

CHECK = "check the address, the name of the model, OPENAI_API_KEY and your account"


class NoAnswer(Exception):
    """A request got no answer after all retries; the message says why."""


class Refused(NoAnswer):
    """The server rejects a request; param is the option that it names as the reason, or None."""

    def __init__(self, status, param):
        super().__init__(f"the server refused the request with status {status}")
        self.param = param


class Stop(Exception):
    """The server cannot be used like this, whatever the request."""


class OverBudget(Exception):
    """The next request might exceed the budget."""


class Tokens(NamedTuple):
    """Numbers of tokens, as in the "usage" of an answer.

    >>> Tokens(100, 50) + Tokens(10, 5)
    Tokens(prompt_tokens=110, completion_tokens=55)
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other):
        return Tokens(self[0] + other[0], self[1] + other[1])


class Answer(NamedTuple):
    text: str | None  # None if the body of the answer is not a chat completion
    finish_reason: str | None = None  # "length" if max_tokens cut the answer off
    tokens: Tokens | None = None  # None if the server does not count them


def client(base_url, timeout, max_retries) -> openai.AsyncOpenAI:
    """Returns a client for one event loop. Its key comes from OPENAI_API_KEY and nowhere else."""
    base_url = base_url or os.environ.get("OPENAI_BASE_URL")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if base_url and not is_address(base_url):
        cli.fail("--base_url is not an address such as http://localhost:8000/v1")
    if not base_url and not key:
        cli.fail("OpenAI needs a key: set OPENAI_API_KEY, or name another server with --base_url")
    if not (key.isascii() and key.isprintable()):
        cli.fail("OPENAI_API_KEY contains characters that no key has; set it again")
    options = dict(timeout=timeout, max_retries=max_retries, http_client=InTime())
    return openai.AsyncOpenAI(api_key=key or "none", base_url=base_url, **options)


def is_address(url) -> bool:
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL:
        return False
    return parts.scheme in ("http", "https") and bool(parts.host)


class InTime(openai.DefaultAsyncHttpxClient):
    """Limits the time of a whole answer; httpx alone limits the time between two bytes."""

    async def send(self, request, **options):
        try:
            async with asyncio.timeout(request.extensions["timeout"]["read"]):
                return await super().send(request, **options)
        except TimeoutError:
            raise httpx2.ReadTimeout("the answer took too long", request=request) from None


async def ask(client, **request) -> Answer:
    """Sends one request. Raises: Stop, NoAnswer or Refused, and no error of openai."""
    try:
        raw = await client.chat.completions.with_raw_response.create(**request)
    except openai.APITimeoutError:
        raise NoAnswer("the server did not answer in time") from None
    except openai.APIConnectionError:
        raise NoAnswer("the connection to the server failed") from None
    except openai.APIStatusError as error:
        status = error.status_code
        if status in (401, 402, 403, 404, 405) or error.code == "insufficient_quota":
            raise Stop(f"the server answered with status {status}; {CHECK}") from None
        if status in (400, 415, 422, 501):
            raise Refused(status, error.param) from None
        raise NoAnswer(f"the server answered with status {status}") from None
    return read(raw.content)


def read(body: bytes) -> Answer:
    """Reads the body of a chat completion. An answer without content has the text "".

    >>> read(b'{"choices": [{"message": {"content": "Yes."}, "finish_reason": "stop"}]}')
    Answer(text='Yes.', finish_reason='stop', tokens=None)
    >>> read(b"<html>")
    Answer(text=None, finish_reason=None, tokens=None)
    """
    try:
        completion = json.loads(body)
        choice = completion["choices"][0]
        text = choice["message"].get("content") or ""
        text = text.encode(errors="replace").decode()  # JSON may contain lone surrogates
        usage = completion.get("usage") or {}
        counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
        tokens = Tokens(*map(int, counts)) if all(map(is_count, counts)) else None
        return Answer(text, choice.get("finish_reason"), tokens)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Answer(None)


def is_count(value) -> bool:
    """Returns True for a plausible number of tokens; some servers write 12.0."""
    return type(value) in (int, float) and 0 <= value <= 1e9 and value == int(value)


def ask_all(client, records, ask_one, concurrency):
    """Calls `await ask_one(record)` for all records, `concurrency` at a time.

    Raises: the first exception of ask_one, after the other calls have been cancelled.
    """
    todo = iter(records)

    async def worker():
        for record in todo:
            await ask_one(record)

    async def run():
        async with client, asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())

    try:
        asyncio.run(run())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


class Meter:
    """Counts tokens and money, those of earlier runs included, and keeps requests in the budget."""

    def __init__(self, prices, budget, tokens: Tokens):
        self.prices, self.tokens = prices, tokens
        self.budget = math.inf if budget is None else budget
        self.pending, self.changed = [], asyncio.Condition()

    def money(self, tokens: Tokens) -> float:
        """Returns the price of tokens; self.prices are those of a million tokens."""
        return (self.prices[0] * tokens[0] + self.prices[1] * tokens[1]) / 1e6

    def fits(self, worst: Tokens) -> bool:
        return self.money(sum([*self.pending, worst], self.tokens)) <= self.budget

    async def ask(self, client, **request) -> Answer:
        """Asks as soon as the worst case fits the budget; the answer's tokens are never None.

        An answer without a plausible count of its tokens is charged with the worst case.
        Raises: OverBudget if no pending request can make room; and what server.ask() raises.
        """
        max_tokens = request.get("max_tokens") or request["max_completion_tokens"]
        worst = Tokens(len(json.dumps(request)), max_tokens)  # a token has at least one byte
        async with self.changed:
            await self.changed.wait_for(lambda: self.fits(worst) or not self.pending)
            if not self.fits(worst):
                raise OverBudget("the budget was reached before a valid answer")
            self.pending.append(worst)
        used = Tokens()
        try:
            answer = await ask(client, **request)
            used = answer.tokens or worst
            return answer._replace(tokens=used)
        finally:
            async with self.changed:
                self.pending.remove(worst)
                self.tokens += used
                self.changed.notify_all()
