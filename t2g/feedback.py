"""Feedback: a critique and the quotes it marks, as one text that a model can write and a program can read.

    z = [critique ; span map]      for instance:   The age is 41, not 27. The city is right.
                                                   {"good": [" Porto"], "poor": [" 27"]}

The critique comes first, so that a model reasons before it marks (Text2Grad, sec. 3.2); the span map is one line of JSON.
Neutral text is never marked. A quote is a text, or {"text": ..., "severity": ...} where the critic says how much it matters.
This module knows nothing of tokens: see align.py.
"""

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
    good: list[str | dict] = field(default_factory=list)
    poor: list[str | dict] = field(default_factory=list)

    def __post_init__(self):
        for key, quotes in (("good", self.good), ("poor", self.poor)):
            if not isinstance(quotes, list) or not all(map(_is_quote, quotes)):
                raise FeedbackError(
                    f'"{key}" must be a list of texts, or of {{"text", "severity"}} with a severity in [-1, 1]'
                )

    def render(self) -> str:
        """z: the critique, a line break, and the span map as one line of JSON."""
        return (
            self.critique
            + "\n"
            + json.dumps({"good": self.good, "poor": self.poor}, ensure_ascii=False)
        )

    @classmethod
    def parse(cls, z: str) -> "Feedback":
        """The inverse of render(), and strict: the last line must be {"good": [...], "poor": [...]} with quotes inside.

        Raises: FeedbackError, and nothing else, for any other text.
        """
        critique, line_break, last_line = z.rstrip().rpartition("\n")
        if not line_break:
            raise FeedbackError(
                "the feedback has one line; it needs a critique and, on the last line, the span map"
            )
        try:
            span_map = json.loads(last_line, object_pairs_hook=_each_key_once)
        except (ValueError, RecursionError) as error:
            raise FeedbackError(f"the last line is not JSON: {error}") from None
        if not isinstance(span_map, dict) or span_map.keys() != {"good", "poor"}:
            raise FeedbackError(
                'the span map must be a JSON object with the keys "good" and "poor", and no other'
            )
        feedback = cls(critique, **span_map)
        plain = feedback.plain()
        if re.search("[\ud800-\udfff]", "".join([critique, *plain.good, *plain.poor])):
            raise FeedbackError("the feedback holds half of a surrogate pair, which no file can")
        return feedback

    def plain(self) -> "Feedback":
        """The same without severities."""
        return Feedback(
            self.critique,
            *([quoted(quote)[0] for quote in quotes] for quotes in (self.good, self.poor)),
        )


def quoted(quote) -> tuple[str, float]:
    """The text of a quote and its severity, 1 for a plain text. Which list it stands in says whether it is good or poor.

    >>> quoted("27"), quoted({"text": "27", "severity": -0.5})
    (('27', 1.0), ('27', 0.5))
    """
    return (quote, 1.0) if isinstance(quote, str) else (quote["text"], abs(quote["severity"]))


def _is_quote(value):
    if not isinstance(value, dict):
        return isinstance(value, str)
    severity = value.get("severity")
    number = isinstance(severity, int | float) and not isinstance(severity, bool)
    return (
        value.keys() == {"text", "severity"}
        and isinstance(value["text"], str)
        and number
        and -1 <= severity <= 1
    )


def _each_key_once(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def reward_prompt(prompt: str, response: str) -> str:
    """What the reward model is asked: the prompt and the response, as text and never as token ids."""
    return REWARD_PROMPT.format(prompt=prompt, response=response)
