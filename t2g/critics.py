"""Critics: where feedback comes from during training.

A critic is a function (examples, responses) -> list of Feedback, with None where the feedback is
unreadable. It exchanges only text with the policy, so a reward model may have a tokenizer of its
own. The scalar critic in extras/baselines returns numbers instead of Feedback.
"""

import math
from collections.abc import Sized

from t2g import dist, policy
from t2g.align import locate, token_offsets
from t2g.chat import encode_chats
from t2g.cli import fail, load_file
from t2g.feedback import Feedback, FeedbackError, reward_prompt
from t2g.grammar import CRITIQUE_AND_HEAD, FeedbackGrammar, feedback_grammar, parse_cut
from t2g.log import print_once, valid_text
from t2g.rollout import respond

BUILT_IN = ("rm", "rule", "openai")


def add_flags(add):
    """Adds the flags that choose a critic, with the add() of cli.flags."""
    add("--critic", "rm", "rm: reward model; rule: the task's program; openai: a server; or a .py")
    add("--reward_model", None, "a run, folder, hub id, .gguf file, or name on the server")
    add("--base_url", None, "openai: server, such as http://localhost:8000/v1")
    add("--critique_length", 200, "maximum tokens of a critique")
    add("--free_critiques", False, "rm and openai: sample critiques without a grammar")


def stages_before(args) -> list[str]:
    """Returns the stages that train the reward model: none if the user names one, or no "rm".

    Fails with one sentence if the flags of the critic do not fit together.
    """
    if args.critic == "openai" and not (args.base_url and args.reward_model):
        fail("--critic openai needs --base_url and --reward_model, the model's name on that server")
    if args.critic not in BUILT_IN:
        load_critic_file(args.critic)  # a wrong name fails before the stages
    return ["annotate", "rm"] if args.critic == "rm" and not args.reward_model else []


def load_critic(task, args, root, device):
    """Returns the critic that --critic names.

    A .py file defines critic(task, args), which returns a critic, and may define add_flags(add).
    The learned reward model lies in root/rm unless --reward_model names another one.
    """
    if args.critic == "rule":
        return rule_critic(task)
    if args.critic not in BUILT_IN:
        return checked(load_critic_file(args.critic).critic(task, args))
    options = dict(critique_length=args.critique_length, free=args.free_critiques)
    if args.critic == "openai":
        return checked(openai_critic(args.base_url, args.reward_model, **options))
    tokenizer, model = policy.load(args.reward_model or root / "rm", empty=True)
    model = dist.frozen(model, args)
    return checked(reward_model_critic(model, tokenizer, bf16=args.bf16, **options))


def load_critic_file(path):
    return load_file(path, "--critic", BUILT_IN, ("critic(task, args)",), ("add_flags(add)",))


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

    A grammar makes z readable and its quotes verbatim, unless free is True; see grammar.py.
    Long prompts are shortened, see fitting_prompt(). Where that is not enough the feedback is None.
    desc labels a progress bar.
    """
    context = policy.context_length(model)
    room = context - critique_length
    if room <= 0:
        fail(f"--critique_length {critique_length} exceeds the critic's context of {context}")
    if not free:
        FeedbackGrammar(tokenizer, model, [], critique_length)  # fails now if it cannot be used

    def critic(examples, responses):
        texts = []
        for example, response in zip(examples, responses):
            text = fitting_prompt(tokenizer, example.prompt, response, room)
            texts.append(text if token_count(tokenizer, text) <= room else None)
        if None in texts:
            limit = f"the critic's context of {context} tokens"
            print_once(f"some responses are too long for {limit}; they count as unreadable")
        fitting = [text for text in texts if text is not None]
        options = dict(temperature=0, bf16=bf16, desc=desc)
        if not free:
            options["about"] = [r for r, text in zip(responses, texts) if text is not None]
        answers = iter(respond(model, tokenizer, fitting, critique_length, **options)[0])
        read = parse_or_none if free else parse_cut
        return [None if text is None else read(next(answers)) for text in texts]

    return critic


def openai_critic(base_url, model, critique_length=200, timeout=600.0, max_retries=5, free=False):
    """Returns a reward model behind an OpenAI-compatible server as a critic.

    Unless free is True, a grammar goes along, for vLLM; a server that refuses it goes without. A
    critique that does not arrive is None; if none of a batch arrives, the program ends. The
    server's context must hold everything: without its tokenizer no prompt can be shortened.
    """
    from t2g import server  # importing openai takes most of a second

    server.client(base_url, timeout, max_retries)  # fails now if the address or the key is wrong
    options = dict(model=model, max_tokens=critique_length, temperature=0)
    # A server's grammar cannot count tokens: 3 characters for each leave room for the quotes.
    head = CRITIQUE_AND_HEAD.replace("*", f"{{0,{3 * critique_length}}}")
    refused, read = free, parse_or_none if free else parse_cut

    async def ask(client, request, response):
        nonlocal refused
        if refused:
            return await server.ask(client, **request)
        grammar = {"structured_outputs": {"grammar": feedback_grammar(response, head)}}
        try:
            return await server.ask(client, **request, extra_body=grammar)
        except server.Refused:
            answer = await server.ask(client, **request)  # fails if more than that is wrong
        print_once("the server takes no grammar, so its critiques are free")
        refused = True
        return answer

    def critic(examples, responses):
        feedback, errors = [None] * len(responses), []
        client = server.client(base_url, timeout, max_retries)

        async def ask_one(i):
            content = reward_prompt(examples[i].prompt, responses[i])
            request = dict(messages=[{"role": "user", "content": content}], **options)
            try:
                answer = await ask(client, request, responses[i])
                feedback[i] = read(answer.text)
            except server.NoAnswer as error:
                errors.append(error)

        try:
            server.ask_all(client, range(len(responses)), ask_one, concurrency=16)
        except server.Stop as error:
            fail(str(error))
        if len(errors) == len(responses):
            fail(f"no critique arrived: {errors[-1]}; {server.CHECK}, or try --free_critiques")
        return feedback

    return critic


def fitting_prompt(tokenizer, prompt, response, max_tokens: int, question=reward_prompt) -> str:
    """Returns question(prompt, response), with a prompt short enough for max_tokens tokens.

    Tokens are removed from the middle of the prompt, because the instruction is at its beginning
    or its end and the source text between. The response is never shortened.
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
    """Returns the number of tokens of a question in the chat format of the model."""
    return len(encode_chats(tokenizer, [text])[0])


def parse_or_none(z: str) -> Feedback | None:
    """Parses feedback; returns None if it is unreadable."""
    try:
        return Feedback.parse(z)
    except FeedbackError:
        return None


def quote_of(text: str, start: int, end: int) -> str:
    """Returns a quote that locate() finds at text[start:end] and nowhere else, if there is one.

    The quote grows to the left, word by word, until it is unique.

    >>> quote_of("is 27, is 27", 9, 12)
    ' is 27'
    """
    while start > 0 and locate(text, text[start:end]) != [(start, end)]:
        start = max(text.rfind(" ", 0, start), text.rfind(",", 0, start), 0)
    return text[start:end]
