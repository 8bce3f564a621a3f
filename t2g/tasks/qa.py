"""Answer any request: UltraFeedback-binarized, or other rows with a prompt and a chosen answer.

--data is a file or a hub id such as HuggingFaceH4/ultrafeedback_binarized:train_prefs. The fields
"prompt" and "chosen" (or "completion") are strings or messages; "chosen" may also be the whole
conversation, as "messages" and "conversations" are. The reference is the last answer. A
conversation of several turns, or with a system message, becomes one prompt in which each message
follows the name of its role.

No program can judge such answers, so this task has no rule: annotations come from models or people.
"""

import re

from t2g import data
from t2g.cli import fail
from t2g.statistics import rouge
from t2g.tasks import Example

CRITERIA = """\
Judge whether the answer does what was asked, truthfully and completely. Good: the step, fact or
sentence that the request turns on, where it is right and clear. Poor: what is false or made up,
what contradicts the request or the rest of the answer, advice that would do harm, padding and
repetition that hide the answer. A polite opening is neither; a refusal is poor only where there
was nothing to refuse. If something needed is missing, the critique says what."""
METRICS = {
    "rouge_l": "F1 of ROUGE-L against the chosen answer",
    "words": "words of the answer",
    "repeated": "share of its runs of three words that occurred before",
}
LENGTHS = dict(response_length=512, critique_length=256, eval_samples=32)
DEFAULTS = {
    "annotate": dict(critic="openai", response_length=512),
    "train_ppo": dict(learning_rate=1e-5, **LENGTHS),
    "eval": LENGTHS,
}
CHATS = ("messages", "conversations")
ANSWERS = ("chosen", "completion", *CHATS)
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}  # ShareGPT's and Gemma's names


def load(args):
    def reader(rows, name):
        if not any(data.has(rows, field) for field in ANSWERS):
            fail(f"{name} has no field {', '.join(ANSWERS)}; it has {', '.join(rows[0])}")
        return example_of

    return data.load(args, reader)


def example_of(row) -> Example | None:
    before = conversation(first_of(row, "prompt", *CHATS), "user")
    messages = conversation(first_of(row, *ANSWERS), "assistant")
    if not messages:
        return None
    if messages[0][0] != "assistant" or messages == before:  # "chosen" repeats the prompt
        before = [turn for turn in before if turn not in messages]
    messages = before + messages
    while messages and messages[-1][0] != "assistant":
        messages.pop()
    if len(messages) < 2 or not all(role and text for role, text in messages):
        return None
    *context, (_, answer) = messages
    if [role for role, _ in context] == ["user"]:
        return Example(context[0][1], answer, {})
    turns = [f"{role.capitalize()}: {text}" for role, text in context]
    return Example("\n\n".join(turns), answer, {})


def first_of(row, *fields):
    return next((row[field] for field in fields if row.get(field)), [])


def conversation(messages, role) -> list[tuple[str, str]]:
    """Returns the role and the text of each message; a string is one message of the given role."""
    if isinstance(messages, str):
        return [(role, data.text(messages))]
    turns = []
    for message in messages if isinstance(messages, list) else [messages]:
        message = message if isinstance(message, dict) else {}
        role = str(message.get("role") or message.get("from") or "").lower()
        content = message.get("content") or message.get("value")
        if isinstance(content, list):  # parts such as {"type": "text", "text": "Why?"}, or images
            parts = [data.text(p.get("text") if isinstance(p, dict) else p) for p in content]
            content = "\n".join(parts) if all(parts) else ""
        if role != "system" or data.text(content):  # many rows have an empty one
            turns.append((ROLES.get(role, role), data.text(content)))
    return turns


def score(example, response: str) -> dict[str, float]:
    words = re.findall(r"\w+", response.casefold())
    runs = list(zip(words, words[1:], words[2:]))
    return {
        "rouge_l": rouge(example.reference, response, "rougeL")["rougeL"],
        "words": len(response.split()),
        "repeated": 1 - len(set(runs)) / len(runs) if runs else 0.0,
    }
