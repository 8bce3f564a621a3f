"""Feedback: a critique and the quotes it marks, as one text that models write and programs read.

    z = [critique ; span map]      for example:   The age is 41, not 27. The city is right.
                                                  {"good": [" Porto"], "poor": [" 27"]}

The critique comes first, so that a model reasons before it marks (Text2Grad, sec. 3.2). The span
map is one line of JSON. A quote is a string, or an object {"text": ..., "severity": ...} if the
critic also says how much it matters.
"""

import json
import re
from dataclasses import dataclass, field
from typing import NamedTuple

REWARD_PROMPT = "{prompt}\n\n### Response\n{response}\n\n### Critique and quotes"
REVISION_PROMPT = (
    "{prompt}\n\n### Response\n{response}\n\n### Critique\n{critique}\n\n### Better response"
)


class FeedbackError(ValueError):
    """Raised for a text that is not feedback; the message says what is wrong with it."""


class Span(NamedTuple):
    """A half-open range of characters [start, end) of a response, and its score in [-1, 1]."""

    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Feedback:
    """A critique of a response, and the quotes from the response that are good or poor.

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
                items = 'strings, or {"text", "severity"} with a severity in [-1, 1]'
                raise FeedbackError(f'"{key}" must be a list of {items}')

    def render(self) -> str:
        """Returns z: the critique, a line break, and the span map as one line of JSON."""
        span_map = {"good": self.good, "poor": self.poor}
        return f"{self.critique}\n{json.dumps(span_map, ensure_ascii=False)}"

    @classmethod
    def parse(cls, z: str) -> "Feedback":
        """Inverts render(). The last line of z must be {"good": [...], "poor": [...]}.

        Raises: FeedbackError, and nothing else, for any other text.
        """
        critique, line_break, last_line = z.rstrip().rpartition("\n")
        if not line_break:
            raise FeedbackError("feedback needs a critique and, on the last line, a span map")
        try:
            span_map = json.loads(last_line, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise FeedbackError(f"the last line is not JSON: {error}") from None
        if not isinstance(span_map, dict) or span_map.keys() != {"good", "poor"}:
            raise FeedbackError('the span map must be an object with just the keys "good", "poor"')
        feedback = cls(critique, **span_map)
        plain = feedback.plain()
        if re.search("[\ud800-\udfff]", "".join([critique, *plain.good, *plain.poor])):
            raise FeedbackError("the feedback contains a lone surrogate, which UTF-8 cannot encode")
        return feedback

    def plain(self) -> "Feedback":
        """Returns the same feedback without severities."""
        good = [quoted(quote)[0] for quote in self.good]
        poor = [quoted(quote)[0] for quote in self.poor]
        return Feedback(self.critique, good, poor)


def quoted(quote) -> tuple[str, float]:
    """Returns the text of a quote and its severity in [0, 1], which is 1 for a plain string.

    The sign of a severity is ignored: the list of a quote says whether it is good or poor.

    >>> quoted("27"), quoted({"text": "27", "severity": -0.5})
    (('27', 1.0), ('27', 0.5))
    """
    return (quote, 1.0) if isinstance(quote, str) else (quote["text"], abs(quote["severity"]))


def _is_quote(value) -> bool:
    if not isinstance(value, dict):
        return isinstance(value, str)
    if value.keys() != {"text", "severity"} or not isinstance(value["text"], str):
        return False
    severity = value["severity"]
    number = isinstance(severity, int | float) and not isinstance(severity, bool)
    return number and -1 <= severity <= 1


def _unique_keys(pairs) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


def reward_prompt(prompt: str, response: str) -> str:
    """Returns the input of the reward model: the prompt and the response as text, never as ids."""
    return REWARD_PROMPT.format(prompt=prompt, response=response)


def revision_prompt(prompt: str, response: str, feedback: Feedback) -> str:
    return REVISION_PROMPT.format(prompt=prompt, response=response, critique=feedback.critique)
