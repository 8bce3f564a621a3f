"""Where feedback comes from. A critic is a function (examples, responses) -> a list of Feedback, None where it is unreadable.

Critic and policy talk in text only: a reward model has its own tokenizer and may be of another family.
"""

from t2g.align import locate
from t2g.feedback import Feedback, FeedbackError, reward_prompt
from t2g.rollout import respond


def rule_critic(task):
    """The task's own program as the critic."""
    return lambda examples, responses: [task.critique(example, response) for example, response in zip(examples, responses)]


def reward_model_critic(model, tokenizer, critique_length=200, bf16=False):
    """A generative reward model: it writes z = [critique ; span map], greedily, and what does not parse is None."""

    def critic(examples, responses):
        prompts = [reward_prompt(example.prompt, response) for example, response in zip(examples, responses)]
        texts, _ = respond(model, tokenizer, prompts, critique_length, temperature=0, bf16=bf16)
        return [parse_or_none(z) for z in texts]

    return critic


def parse_or_none(z: str) -> Feedback | None:
    try:
        return Feedback.parse(z)
    except FeedbackError:
        return None


def quote_of(text: str, start: int, end: int) -> str:
    """A quote for text[start:end], lengthened to the left word by word until it stands in one place only.

    The inverse of locate, for critics that are programs: what comes second ("27 ... 27") cannot be quoted alone.

    >>> quote_of("is 27, is 27", 9, 12)
    ' is 27'
    """
    while start > 0 and locate(text, text[start:end]) != [(start, end)]:
        start = max(text.rfind(" ", 0, start), text.rfind(",", 0, start), 0)
    return text[start:end]
