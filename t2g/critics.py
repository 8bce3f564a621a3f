"""Critics: where feedback comes from during training.

A critic is a function (examples, responses) -> list of Feedback, with None where the feedback is
unreadable, or a float for the whole response. It exchanges only text with the policy.
"""

import importlib
import math
from collections.abc import Sized

from t2g import dist, policy
from t2g.align import locate, token_offsets
from t2g.chat import encode_chats
from t2g.cli import fail, load_file
from t2g.feedback import Feedback, FeedbackError, reward_prompt
from t2g.grammar import parse_cut
from t2g.log import print_once, valid_text
from t2g.rollout import respond

BUILT_IN = ("rm", "rule", "openai")


def add_flags(add):
    add("--critic", "rm", "rm: reward model; rule: the task's program; openai: a server; or a .py")
    add("--reward_model", None, "rm: run, folder, hub id or .gguf file; openai: name on the server")
    add("--base_url", None, "openai: server, such as http://localhost:8000/v1")
    add("--critique_length", 200, "maximum tokens of a critique")
    add("--free_critiques", False, "rm and openai: generate critiques without a grammar")
    add("--replicate_frozen", False, "do not shard reference and reward model: faster, more memory")


def stages_before(args) -> list[str]:
    """Returns the stages that train the reward model, if --critic needs them."""
    if args.critic == "openai" and not (args.base_url and args.reward_model):
        fail("--critic openai needs --base_url and --reward_model, the model's name on that server")
    if args.critic not in ("rm", "rule"):
        load_critic_file(args.critic)  # a wrong name fails before the stages
    return ["annotate", "rm"] if args.critic == "rm" and not args.reward_model else []


def load_critic(task, args, root):
    """Returns the critic that --critic names; the learned one lies in root/rm by default."""
    if args.critic == "rule":
        return rule_critic(task)
    if args.critic != "rm":
        return checked(load_critic_file(args.critic).critic(task, args))
    tokenizer, model = policy.load(args.reward_model or root / "rm", empty=True)
    options = dict(bf16=args.bf16, free=args.free_critiques)
    model = dist.frozen(model, args)
    return checked(reward_model_critic(model, tokenizer, args.critique_length, **options))


def load_critic_file(name):
    if name == "openai":
        return importlib.import_module("t2g.openai_critic")  # importing openai takes a second
    return load_file(name, "--critic", BUILT_IN, ("critic(task, args)",), ("add_flags(add)",))


def checked(critic):
    """Returns the same critic, checked; it warns once if all critiques are unreadable."""
    if not callable(critic):
        fail(f"critic(task, args) must return a function, not {critic!r}")

    def checked_critic(examples, responses):
        try:
            feedback = critic(examples, responses)
            count = len(feedback) if isinstance(feedback, Sized) else "no list of"
            if count != len(responses):
                fail(f"the critic returned {count} values for {len(responses)} responses")
            feedback = [valid_feedback(one) for one in feedback]
        except FeedbackError as error:
            fail(f"the critic made an invalid Feedback: {error}")
        if all(one is None for one in feedback):
            cause = "check --critique_length and whether train_rm.py made --reward_model"
            print_once(f"warning: no critique of a batch is readable; {cause}")
        return feedback

    return checked_critic


def valid_feedback(one):
    """Returns what a critic may return, with valid_text(); fails for anything else."""
    if isinstance(one, Feedback) and isinstance(one.critique, str):
        return Feedback.parse(valid_text(one.render(), "the critic's feedback"))
    if not (one is None or (isinstance(one, float) and math.isfinite(one))):
        fail(f"the critic returned {one!r}, not a Feedback, a finite float or None")
    return one


def rule_critic(task):
    """Returns the task's own program as a critic, which must return Feedback."""

    def critic(examples, responses):
        feedback = [task.critique(*pair) for pair in zip(examples, responses)]
        for one in feedback:
            if not isinstance(one, Feedback):
                fail(f"critique() of the task returned {one!r}, not a Feedback")
        return feedback

    return checked(critic)


def reward_model_critic(model, tokenizer, critique_length=200, bf16=False, desc=None, free=False):
    """Returns a reward model as a critic: it writes z = [critique ; span map] greedily.

    Unless free is True, a grammar makes z readable. If a response is too long even with a shortened
    prompt, its feedback is None. desc labels a progress bar.
    """
    context = policy.context_length(model)
    room = context - critique_length
    if room <= 0:
        fail(f"--critique_length {critique_length} exceeds the critic's context of {context}")

    def critic(examples, responses):
        feedback, fitting = [None] * len(responses), {}  # the prompts that fit, by row
        for row, (example, response) in enumerate(zip(examples, responses)):
            text = fitting_prompt(tokenizer, example.prompt, response, room)
            if token_count(tokenizer, text) <= room:
                fitting[row] = text
        if len(fitting) < len(responses):
            limit = f"the critic's context of {context} tokens"
            print_once(f"some responses are too long for {limit}; they count as unreadable")
        options = dict(temperature=0, bf16=bf16, desc=desc, readable=not free)
        prompts = list(fitting.values())
        answers, _ = respond(model, tokenizer, prompts, critique_length, **options)
        for row, answer in zip(fitting, answers):
            feedback[row] = parse_or_none(answer) if free else parse_cut(answer)
        return feedback

    return critic


def fitting_prompt(tokenizer, prompt, response, max_tokens: int, question=reward_prompt) -> str:
    """Returns question(prompt, response), with a prompt short enough for max_tokens tokens.

    Its middle is left out, because an instruction is at its beginning or its end.
    """
    text = question(prompt, response)
    excess = token_count(tokenizer, text) - max_tokens
    if excess <= 0:
        return text
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    offsets = token_offsets(tokenizer, ids)
    kept = len(offsets)
    while kept and excess > 0:
        kept = max(0, kept - excess)
        head, tail = offsets[: kept - kept // 2], offsets[len(offsets) - kept // 2 :]
        first = prompt[: head[-1][1]] if head else ""
        last = prompt[tail[0][0] :] if tail else ""
        text = question(f"{first} [...] {last}", response)
        excess = token_count(tokenizer, text) - max_tokens
    return text


def token_count(tokenizer, text: str) -> int:
    return len(encode_chats(tokenizer, [text])[0])


def parse_or_none(z: str) -> Feedback | None:
    try:
        return Feedback.parse(z)
    except FeedbackError:
        return None


def quote_of(text: str, start: int, end: int) -> str:
    """Returns text[start:end], grown word by word until locate() finds it only there.

    It grows to the left, and at the beginning of the text to the right.

    >>> quote_of("is 27, is 27", 9, 12), quote_of("is 27, is 41", 0, 2)
    (' is 27', 'is 27,')
    """
    while len(text) > end - start and locate(text, text[start:end]) != [(start, end)]:
        if start > 0:
            start = max(text.rfind(" ", 0, start), text.rfind(",", 0, start), 0)
        else:
            space = text.find(" ", end + 1)
            end = space if space > 0 else len(text)
    return text[start:end]
