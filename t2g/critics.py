"""Where feedback comes from. A critic is a function (examples, responses) -> a list of Feedback, None where it is unreadable;
the scalar critic, a baseline, says numbers instead.

Critic and policy talk in text only: a reward model has its own tokenizer and may be of another family.
"""

import asyncio

from tqdm import tqdm

from t2g import dist, policy
from t2g.align import locate, token_offsets
from t2g.cli import fail, load_file, positive
from t2g.feedback import Feedback, FeedbackError, reward_prompt
from t2g.rollout import chat_text, respond

BUILT_IN = ("rm", "rule", "openai")


def add_flags(add):
    who = "rm: a reward model; rule: the task's program; openai: a server; or a .py file"
    add("--critic", default="rm", help=f"where feedback comes from. {who}")
    add(
        "--reward_model", help="reward model: a run, folder, hub id, .gguf file or name on a server"
    )
    add("--base_url", help="openai: the server, such as http://localhost:8000/v1")
    add("--critique_length", type=positive(int), default=200, help="maximum tokens of a critique")


def stages_before(args) -> list[str]:
    """The stages that make the reward model; none for other critics, or if the user names one.

    Raises: SystemExit with one sentence if the critic's flags do not fit together.
    """
    if args.critic == "openai" and not (args.base_url and args.reward_model):
        fail("--critic openai needs --base_url and --reward_model, the model's name on that server")
    if args.critic not in BUILT_IN:
        load_file(args.critic, "--critic", BUILT_IN)  # a misspelt name fails before hours of stages
    return ["annotate", "rm"] if args.critic == "rm" and not args.reward_model else []


def load_critic(task, args, root, device):
    """The critic that --critic names: a function (examples, responses) -> list of Feedback or None.

    A .py file defines critic(task, args), which returns such a function, and may define add_flags(add)
    for flags of its own. The learned reward model lies in root/rm unless --reward_model names it.
    """
    if args.critic == "rule":
        return rule_critic(task)
    if args.critic == "openai":
        return warning(openai_critic(args.base_url, args.reward_model, args.critique_length))
    if args.critic != "rm":
        return warning(load_file(args.critic, "--critic", BUILT_IN).critic(task, args))
    tokenizer, model = policy.load(args.reward_model or root / "rm")
    model = dist.frozen(model, args)
    return warning(reward_model_critic(model, tokenizer, args.critique_length, args.bf16))


def warning(critic):
    """The same critic; the first time that none of a batch's critiques can be read, it says what that means."""
    warned = False

    def warning_critic(examples, responses):
        nonlocal warned
        said = critic(examples, responses)
        if not warned and all(one is None for one in said):
            warned = True
            tqdm.write(
                f"warning: none of the {len(said)} critiques of this batch can be read, so nothing is learnt from it. If that goes "
                "on, see unparsable in metrics.jsonl, --reward_model must name one that train_rm.py trained, and "
                "--critique_length leave room for its whole critique"
            )
        return said

    return warning_critic


def rule_critic(task):
    """The task's own program as the critic."""
    return lambda examples, responses: [
        task.critique(example, response) for example, response in zip(examples, responses)
    ]


def reward_model_critic(model, tokenizer, critique_length=200, bf16=False, desc=None):
    """A generative reward model: it writes z = [critique ; span map], greedily, and what does not parse is None.

    desc shows a progress line.
    """
    ask = asker(model, tokenizer, critique_length, desc=desc, bf16=bf16)

    def critic(examples, responses):
        return [
            None if z is None else parse_or_none(z) for z in ask(examples, responses, reward_prompt)
        ]

    return critic


def asker(model, tokenizer, critique_length, **options):
    """ask(examples, responses, question) -> a model's greedy answers to question(prompt, response), None where that is too long.

    Long prompts are shortened: see fitting_prompt(). What is too long even so does not fit the context with critique_length
    tokens more; it is left out, and how many are is printed the first time.
    """
    context, warned = policy.context_length(model), False
    if critique_length >= context:
        fail(
            f"--critique_length {critique_length} leaves no room in the context of {context} tokens of the model that criticises"
        )

    def ask(examples, responses, question):
        nonlocal warned
        room, pairs = context - critique_length, zip(examples, responses)
        asked = [
            fitting_prompt(tokenizer, example.prompt, response, room, question)
            for example, response in pairs
        ]
        fits = [token_count(tokenizer, text) <= room for text in asked]
        if not warned and not all(fits):
            warned = True
            tqdm.write(
                f"{fits.count(False)} of {len(fits)} responses are too long to be criticised: with the critique they do not fit "
                f"the context of {context} tokens. They count as unreadable, as later ones will"
            )
        some = [text for text, fit in zip(asked, fits) if fit]
        answers = iter(
            respond(model, tokenizer, some, critique_length, temperature=0, **options)[0]
        )
        return [next(answers) if fit else None for fit in fits]

    return ask


def openai_critic(
    base_url, model, critique_length=200, concurrency=16, timeout=600.0, max_retries=5
):
    """The same behind a server that speaks OpenAI's API, under the name `model`, with its own tokenizer.

    A critique that does not come, after max_retries, is None as well; where none of a batch comes, the program ends. The server's
    context must hold the whole text and critique_length tokens more: without its tokenizer nothing can be shortened here.
    """
    from t2g import server  # the package openai takes most of a second to load

    server.client(base_url, timeout, max_retries)  # a wrong address or a missing key shows now

    async def judge(prompts):
        client, room = server.client(base_url, timeout, max_retries), asyncio.Semaphore(concurrency)
        options = dict(model=model, max_tokens=critique_length, temperature=0)

        async def one(prompt):
            async with room:
                try:
                    return (
                        await server.ask(
                            client, messages=[{"role": "user", "content": prompt}], **options
                        )
                    ).text
                except server.NoAnswer as error:
                    return error

        async with client:
            return await asyncio.gather(*map(one, prompts))

    def critic(examples, responses):
        prompts = [
            reward_prompt(example.prompt, response)
            for example, response in zip(examples, responses)
        ]
        try:
            answers = asyncio.run(judge(prompts))
        except server.Stop as error:
            fail(f"the reward model gave no critique: {error}")
        if not any(isinstance(answer, str) for answer in answers):
            fail(
                f"the reward model gave none of {len(answers)} critiques: {answers[-1]}; see --base_url and --reward_model"
            )
        return [parse_or_none(answer) if isinstance(answer, str) else None for answer in answers]

    return critic


def fitting_prompt(
    tokenizer, prompt: str, response: str, max_tokens: int, question=reward_prompt
) -> str:
    """question(prompt, response), with as much left out of the middle of the prompt as it takes to have at most max_tokens tokens.

    What is asked stands at the head of a prompt or at its end, and the source text between them. The response and the headers stay.
    """
    tokens, kept, asked = None, len(prompt), question(prompt, response)
    while kept and (excess := token_count(tokenizer, asked) - max_tokens) > 0:
        tokens = tokens or token_offsets(
            tokenizer, tokenizer(prompt, add_special_tokens=False)["input_ids"]
        )
        kept = max(0, min(kept, len(tokens)) - excess)
        head, tail = tokens[: kept - kept // 2], tokens[len(tokens) - kept // 2 :]
        parts = prompt[: head[-1][1]] if head else "", prompt[tail[0][0] :] if tail else ""
        asked = question(" [...] ".join(parts), response)
    return asked


def token_count(tokenizer, asked: str) -> int:
    """How many tokens a model gets that is asked this."""
    return len(tokenizer(chat_text(tokenizer, asked), add_special_tokens=False)["input_ids"])


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
