"""Feedback: a critique and the quotes it marks, as one text that a model can write and a program can read.

    z = [critique ; span map]      for instance:   The age is 41, not 27. The city is right.
                                                   {"good": [" Porto"], "poor": [" 27"]}

The critique comes first, so that a model reasons before it marks (Text2Grad, sec. 3.2); the span map is one line of JSON.
Neutral text is never marked. This module knows nothing of tokens: see align.py.
"""

import itertools
import json
import re
from dataclasses import dataclass, field
from typing import NamedTuple

REWARD_PROMPT = "{prompt}\n\n### Response\n{response}\n\n### Critique and quotes"


class FeedbackError(ValueError):
    """A text that is no feedback. The message says what is wrong with it."""


class Span(NamedTuple):
    """A half-open range of characters [start, end) of a response, and its score in [-1, 1]."""

    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Feedback:
    """What somebody says of a response: a critique, and quotes from the response that are good or poor.

    >>> z = Feedback("The age is 41, not 27.", good=[" Porto"], poor=[" 27"]).render()
    >>> print(z)
    The age is 41, not 27.
    {"good": [" Porto"], "poor": [" 27"]}
    >>> Feedback.parse(z).poor
    [' 27']
    """

    critique: str
    good: list[str] = field(default_factory=list)
    poor: list[str] = field(default_factory=list)

    def render(self) -> str:
        """z: the critique, a line break, and the span map as one line of JSON."""
        return self.critique + "\n" + json.dumps({"good": self.good, "poor": self.poor}, ensure_ascii=False)

    @classmethod
    def parse(cls, z: str) -> "Feedback":
        """The inverse of render(), and strict: the last line must be {"good": [...], "poor": [...]} with texts inside.

        Raises: FeedbackError, and nothing else, for any other text.
        """
        critique, line_break, last_line = z.rstrip().rpartition("\n")
        if not line_break:
            raise FeedbackError("the feedback has one line; it needs a critique and, on the last line, the span map")
        try:
            span_map = json.loads(last_line, object_pairs_hook=_each_key_once)
        except (ValueError, RecursionError) as error:
            raise FeedbackError(f"the last line is not JSON: {error}") from None
        if not isinstance(span_map, dict) or span_map.keys() != {"good", "poor"}:
            raise FeedbackError('the span map must be a JSON object with the keys "good" and "poor", and no other')
        for key, quotes in span_map.items():
            if not isinstance(quotes, list) or not all(isinstance(quote, str) for quote in quotes):
                raise FeedbackError(f'"{key}" must be a list of texts')
        if re.search("[\ud800-\udfff]", critique + "".join(itertools.chain(*span_map.values()))):
            raise FeedbackError("the feedback holds half of a surrogate pair, which no file can")
        return cls(critique, **span_map)


def _each_key_once(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def reward_prompt(prompt: str, response: str) -> str:
    """What the reward model is asked: the prompt and the response, as text and never as token ids."""
    return REWARD_PROMPT.format(prompt=prompt, response=response)
