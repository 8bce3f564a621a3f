"""A client of servers that speak OpenAI's /v1/chat/completions: vLLM, llama.cpp, transformers serve, OpenAI and the like.

The openai package does the asking again: after 429, 5xx, a time-out or a broken connection it waits, longer each time and as
long as Retry-After says, at most max_retries times. What is told of a failure is its status or its class, in our words: the
bodies of answers may hold texts, and even the key.
"""

import asyncio
import json
import math
import os
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx2  # which openai is built on
import openai

from t2g.cli import fail

HOPELESS = {  # what every further request would end in
    401: "the server does not accept the key (401); set OPENAI_API_KEY to one that it knows",
    402: "the server wants to be paid first (402); see to your account there",
    403: "the server forbids this (403); see whether your key may use this model",
    404: "the server knows no such model, or has no /chat/completions under this --base_url, which mostly ends in /v1 (404)",
    405: "the server has no /chat/completions under this --base_url, which mostly ends in /v1 (405)",
}


class Stop(Exception):
    """The server cannot be used like this. The message is one sentence that says what to do."""


class NoAnswer(Exception):
    """This request got no answer, after all retries. The message says why."""


class Refused(NoAnswer):
    """The server will not take this request; param is the option that it names as the reason, if it names one."""

    def __init__(self, status, param):
        super().__init__(f"the server refused the request ({status})")
        self.param = param


class Unreadable(NoAnswer):
    """An answer came and was no chat completion: cut off, empty, or something else."""

    def __init__(self):
        super().__init__("the server's answer was no chat completion")


class Answer(NamedTuple):
    text: str
    finish_reason: str | None  # "length" if max_tokens cut it off
    tokens: (
        tuple[int, int] | None
    )  # of the prompt and of the answer, as the server counts them, None if it does not


class InTime(openai.DefaultAsyncHttpxClient):
    """Bounds a whole answer by the time that is allowed for each read of it: a server may send a byte now and then for ever."""

    async def send(self, request, **options):
        try:
            async with asyncio.timeout(request.extensions["timeout"]["read"]):
                return await super().send(request, **options)
        except TimeoutError:
            raise httpx2.ReadTimeout("the answer was not whole in time", request=request) from None


def client(base_url, timeout, max_retries) -> openai.AsyncOpenAI:
    """A client for one event loop; use it as `async with client(...)`. The key comes from the environment and from nowhere else."""
    base_url, key = (
        base_url or os.environ.get("OPENAI_BASE_URL"),
        os.environ.get("OPENAI_API_KEY", "").strip(),
    )
    if base_url and not is_address(base_url):
        fail("--base_url is no address of a server, such as http://localhost:8000/v1")
    if not base_url and not key:
        fail(
            "there is no key for OpenAI: set OPENAI_API_KEY, or name another server with --base_url"
        )
    if not (key.isascii() and key.isprintable()):
        fail("OPENAI_API_KEY holds characters that stand in no key; set it anew")
    options = dict(timeout=timeout, max_retries=max_retries, http_client=InTime())
    return openai.AsyncOpenAI(api_key=key or "none", base_url=base_url, **options)


def is_address(url) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, say
        return False


async def ask(client, **request) -> Answer:
    """One chat completion. Raises: Stop, NoAnswer, Refused or Unreadable, and nothing else of the server's."""
    try:
        raw = await client.chat.completions.with_raw_response.create(**request)
    except openai.APITimeoutError:
        raise NoAnswer("the server did not answer in time") from None
    except openai.APIConnectionError:
        raise NoAnswer("the connection to the server failed") from None
    except openai.APIStatusError as error:
        if error.status_code in HOPELESS:
            raise Stop(HOPELESS[error.status_code]) from None
        if error.code == "insufficient_quota":
            raise Stop("the account at the server is used up (429, insufficient_quota)") from None
        if error.status_code == 501 or (
            error.status_code < 500 and error.status_code not in (408, 409, 429)
        ):
            raise Refused(error.status_code, error.param) from None
        raise NoAnswer(f"the server answered with status {error.status_code}") from None
    return read(raw.content)


def read(body: bytes) -> Answer:
    """The answer in the body of a chat completion. No content at all is the text "".

    >>> read(b'{"choices": [{"message": {"content": "Yes."}, "finish_reason": "stop"}]}')
    Answer(text='Yes.', finish_reason='stop', tokens=None)
    """
    try:
        completion = json.loads(body)
        choice = completion["choices"][0]
        text = choice["message"].get("content") or ""
        if not isinstance(text, str):
            raise Unreadable
        text = text.encode(
            errors="replace"
        ).decode()  # half of a surrogate pair could not be sent back
        usage = completion.get("usage") or {}
        counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
        return Answer(
            text,
            choice.get("finish_reason"),
            tuple(map(int, counts)) if all(map(is_count, counts)) else None,
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Unreadable from None


def is_count(value) -> bool:
    """Whether a number of tokens can be meant: some servers write 12.0, and what is no such number must cost no money."""
    return type(value) in (int, float) and 0 <= value <= 1e9 and value == int(value)


# ---- what is paid ------------------------------------------------------------------------------------------------------


class OverBudget(Exception):
    """The next request could pass the budget, and none is under way whose end might make room for it."""


class Meter:
    """Tokens and money so far, earlier runs into the same file included. A request waits until its worst case fits the budget."""

    def __init__(self, prices, budget, tokens):
        self.prices, self.budget, self.tokens = (
            prices,
            math.inf if budget is None else budget,
            tokens,
        )  # prices a million tokens
        self.under_way, self.changed = [], asyncio.Condition()

    def money(self, tokens) -> float:
        return sum(price * count for price, count in zip(self.prices, tokens)) / 1e6

    def fits(self, most) -> bool:
        return sum(map(self.money, [self.tokens, *self.under_way, most])) <= self.budget

    async def begin(self, most):
        """Waits for room. most: the tokens, of the prompt and of the answer, that the request may cost at most."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.fits(most) or not self.under_way)
            if not self.fits(most):
                raise OverBudget
            self.under_way.append(most)

    async def end(self, most, used):
        async with self.changed:
            self.under_way.remove(most)
            self.tokens = added(self.tokens, used)
            self.changed.notify_all()


def added(tokens, more):
    return tokens[0] + more[0], tokens[1] + more[1]
