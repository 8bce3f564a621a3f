"""Answer any request: UltraFeedback-binarized, or other rows with a prompt and a chosen answer.

--data is a file or a hub id such as HuggingFaceH4/ultrafeedback_binarized:train_prefs. The field
"chosen" is a string or a list of messages; so is "prompt", which may also be the first message of
"chosen". Only the first turn of a conversation is used.

No program can judge such answers, so this task has no rule: annotations come from models or people.
"""

import re

from t2g import data
from t2g.cli import fail
from t2g.metrics import rouge
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


def check(args, script):
    if getattr(args, "critic", None) in ("rule", "tests"):
        fail(f"the task qa has no program for --critic {args.critic}; use rm or openai")


def load(args):
    def reader(rows, name):
        if not data.has(rows, "chosen"):
            fail(f"{name} has no field 'chosen'; it has {', '.join(rows[0])}")
        return example_of

    return data.load(args, reader)


def example_of(row) -> Example:
    prompt = row.get("prompt") or row.get("chosen")
    return Example(turn(prompt, "user"), turn(row.get("chosen"), "assistant"), {})


def turn(messages, role) -> str:
    """Returns the first message of a role, or the string itself."""
    if not isinstance(messages, list):
        return data.text(messages)
    for message in messages:
        if isinstance(message, dict) and message.get("role") == role:
            return data.text(message.get("content"))
    return ""


def score(example, response: str) -> dict[str, float]:
    words = re.findall(r"\w+", response.casefold())
    runs = list(zip(words, words[1:], words[2:]))
    return {
        "rouge_l": rouge(example.reference, response, "rougeL")["rougeL"],
        "words": len(response.split()),
        "repeated": 1 - len(set(runs)) / len(runs) if runs else 0.0,
    }
