"""Asks servers with OpenAI's /v1/chat/completions: vLLM, llama.cpp, transformers serve, OpenAI.

The openai package repeats a request after 429, 5xx, a timeout or a broken connection. Error
messages never quote an answer, which may contain the key.
"""

import asyncio
import os
import re
from typing import NamedTuple

import openai

from t2g.cli import fail
from t2g.log import parse_json

ADDRESS = re.compile(r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d{1,5})?(/\S*)?$")
CHECK = "check the address, the name of the model, OPENAI_API_KEY and your account"


class Stop(Exception):
    """The server cannot be used like this, whatever the request."""


class NoAnswer(Exception):
    """A request got no answer after all retries; the message says why."""


class Refused(NoAnswer):
    """The server rejects the request itself, for its texts or its options."""


class Tokens(NamedTuple):
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other):
        return Tokens(self[0] + other[0], self[1] + other[1])


class Answer(NamedTuple):
    text: str
    finish_reason: str | None = None  # "length" if max_tokens cut the answer off
    tokens: Tokens | None = None  # None if the server does not count them


def client(base_url, timeout, max_retries) -> openai.AsyncOpenAI:
    """Returns a client for one event loop. Fails if the address or the key cannot be right."""
    base_url = base_url or os.environ.get("OPENAI_BASE_URL")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if base_url and not ADDRESS.match(base_url):
        fail("--base_url, or OPENAI_BASE_URL, is not an address such as http://localhost:8000/v1")
    if not base_url and not key:
        fail("OpenAI needs a key: set OPENAI_API_KEY, or name another server with --base_url")
    if not (key.isascii() and key.isprintable()):
        fail("OPENAI_API_KEY contains characters that no key has; set it again")
    options = dict(timeout=timeout, max_retries=max_retries)
    return openai.AsyncOpenAI(api_key=key or "none", base_url=base_url, **options)


async def ask(client, **request) -> Answer:
    """Sends a request, and again if its answer is damaged. Raises: Stop, NoAnswer, Refused."""
    for _ in range(client.max_retries + 1):
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
                raise Refused(f"the server refused the request with status {status}") from None
            raise NoAnswer(f"the server answered with status {status}") from None
        if answer := read(raw.content):
            return answer
    raise NoAnswer("the server's answer is not a chat completion")


def read(body: bytes) -> Answer | None:
    """Reads the body of a chat completion; returns None for anything else.

    >>> read(b'{"choices": [{"message": {"content": "Yes."}, "finish_reason": "stop"}]}')
    Answer(text='Yes.', finish_reason='stop', tokens=None)
    >>> read(b"<html>")
    """
    try:
        completion = parse_json(body.decode(errors="replace"), "an answer")
        choice, usage = completion["choices"][0], completion.get("usage") or {}
        counts = [usage.get(key) for key in Tokens._fields]
        counted = all(type(count) in (int, float) and 0 <= count < 1e9 for count in counts)
        tokens = Tokens(*map(int, counts)) if counted else None  # some servers write 12.0
        text = choice["message"].get("content") or ""
        if isinstance(text, list):  # of parts, as some servers write it
            text = "".join(part["text"] for part in text if part.get("type") == "text")
        return Answer(text + "", choice.get("finish_reason"), tokens)  # a TypeError if no string
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def ask_all(client, records, ask_one, concurrency):
    """Awaits ask_one(record) for all records, some at a time. Raises: its first exception."""
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
