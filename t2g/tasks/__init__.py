"""Tasks: what the policy is asked, how its responses are scored, and perhaps a rule as a critic.

A task is a .py file, built in or the user's own (--task PATH.py), that defines

    load(args) -> (train, heldout)             two lists of Example
    score(example, response) -> dict           the numbers by which a response is judged
    METRICS                                    a sentence for each of these numbers

and, where the task needs them,

    critique(example, response) -> Feedback    the rule, a program as a critic: --critic rule
    kinds(example, response) -> list           the kind of each poor quote of that critique
    test_log(example, response) -> str         the unit tests' output, which annotators are shown
    example_of_record(record)                  an Example from annotate.py's record, or None
    CRITERIA                                   what is good and what is poor, for annotators
    STEP_END                                   a regular expression for the end of a step (prm)
    DEFAULTS                                   {script: {flag: default}}
    add_flags(add)                             flags of its own, with the add() of cli.flags
    check(args, script)                        fails with a sentence if flags do not fit the task
    sft_pairs(args, examples)                  (prompt, response) pairs in training order
    new_model(seed)                            a tokenizer and a model to train from scratch
"""

import argparse
import importlib
from pathlib import Path
from typing import NamedTuple

import torch

from t2g import cli, critics, log
from t2g.chat import EXAMPLE_KWARGS, chat_text, encode_chats, use_kwargs
from t2g.cli import fail, positive
from t2g.log import valid_text
from t2g.policy import context_length

BUILT_IN = ("qa", "summarize", "toy")
REQUIRED = ("load(args)", "score(example, response)", "METRICS")
OPTIONAL = ("critique(example, response)", "kinds(example, response)", "new_model(seed)")
OPTIONAL += ("test_log(example, response)", "example_of_record(record)", "add_flags(add)")
OPTIONAL += ("check(args, script)", "sft_pairs(args, examples)")


class Example(NamedTuple):
    prompt: str  # the user's message to the policy
    reference: str  # a good response, "" if none is known
    facts: dict  # whatever the task's own critic and scores need


def load_task(name: str):
    """Imports a task by its name or path, and sets task.NAME for the folder runs/NAME."""
    if name in BUILT_IN:
        module = importlib.import_module(f"t2g.tasks.{name}")
    else:
        module = cli.load_file(name, "--task", BUILT_IN, REQUIRED, OPTIONAL)
    names = module.METRICS
    if not isinstance(names, dict) or not set(map(type, (*names, *names.values()))) <= {str}:
        fail(f"METRICS of {name} must be a dict with a sentence for each number of score()")
    if taken := names.keys() & {*log.METRICS, *(f"{name}_greedy" for name in names)}:
        fail(f"METRICS of {name} uses names of other metrics, {', '.join(taken)}; rename them")
    path = Path(module.__file__)
    module.NAME = path.parent.name if path.stem == "task" else path.stem
    return module


def load(task, args) -> list[list[Example]]:
    """Returns the task's examples for training and the held-out ones, with valid_text()."""
    parts = task.load(args)
    if not isinstance(parts, tuple | list) or [type(part) for part in parts] != [list, list]:
        fail(f"load() of {args.task} must return (train, heldout), two lists of Example")
    if not all(parts):
        fail(f"{args.task} has no examples to train on, or none held out; check --data")
    return [list(map(valid_example, part)) for part in parts]


def valid_example(example) -> Example:
    if not isinstance(example, Example) or not all(isinstance(x, str) for x in example[:2]):
        fail(f"the task made {example!r}, not an Example with strings as prompt and reference")
    prompt, reference = (valid_text(text, "an example of the task") for text in example[:2])
    return Example(prompt, reference, example.facts)


def add_flags(add):
    add("--task", "toy", f"{', '.join(BUILT_IN)}, or a .py file")
    add("--data", None, "examples: a .jsonl, .json or .parquet file, or a hub id NAME[:SPLIT]")
    add("--heldout_data", None, "held-out examples; a fifth of --data if not given")
    add("--max_prompt_length", None, "maximum tokens of a prompt", positive(int))
    add("--chat_template_kwargs", None, f"arguments of the chat template: '{EXAMPLE_KWARGS}'")
    add("--bf16", False, "matrix products in bf16, weights in fp32")
    add("--seed", 0, "seed of every random choice", int)


def data_flags(args) -> dict:
    """Returns the flags that make an earlier stage use the same data in the same way."""
    names = []
    for add_names in (add_flags, getattr(load_task(args.task), "add_flags", lambda add: None)):
        add_names(lambda name, *_, **__: names.append(name.removeprefix("--").replace("-", "_")))
    return {name: getattr(args, name) for name in names}


def short_enough(examples, tokenizer, model, args) -> list[Example]:
    """Drops the examples whose prompts are too long, and prints how many remain.

    A prompt has at most --max_prompt_length tokens, and leaves room for a response in the context.
    """
    context = context_length(model)
    room = context - getattr(args, "response_length", 0)
    limit = min(args.max_prompt_length or room, room)
    # Only long texts are encoded, because a token has at least one byte.
    spare = limit - len(chat_text(tokenizer, "").encode())
    texts = [example.prompt for example in examples if len(example.prompt.encode()) > spare]
    lengths = map(len, encode_chats(tokenizer, texts))
    too_long = {text for text, length in zip(texts, lengths) if length > limit}
    kept = [example for example in examples if example.prompt not in too_long]
    if too_long:
        why = "--max_prompt_length" if limit < room else f"the context of {context} less a response"
        counts = f"{len(kept)} of {len(examples)} prompts have at most {limit} tokens ({why})"
        if not kept:
            fail(f"{counts}, so none is left; shorten the prompts or raise this limit")
        print(f"{counts}; the others are dropped")
    return kept


def parse(parser, script: str, **defaults):
    """Parses the command line of a script, and returns its task and its arguments.

    defaults, TASK={flag: default}, are for a script that DEFAULTS of the task does not name.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default=parser.get_default("task"))
    first.add_argument("--critic", default=parser.get_default("critic"))
    named = first.parse_known_args()[0]  # first, because both may add flags, and a task defaults
    task = load_task(named.task)
    files = [task]
    if named.critic and named.critic.endswith(".py"):
        files.append(critics.load_critic_file(named.critic))
    for file in files:
        try:
            getattr(file, "add_flags", lambda add: None)(cli.flags(parser))
        except argparse.ArgumentError as error:
            fail(f"add_flags of {file.__file__} uses a flag of {script}: {error}; rename it")
    own_defaults = getattr(task, "DEFAULTS", {})
    own_defaults = own_defaults.get(script, defaults.get(task.NAME, {}))
    if unknown := set(own_defaults) - {action.dest for action in parser._actions}:
        fail(f"DEFAULTS of {named.task} names flags that {script} lacks: {', '.join(unknown)}")
    parser.set_defaults(**own_defaults)
    args = parser.parse_intermixed_args()  # positional arguments may stand between flags
    torch.manual_seed(args.seed)
    use_kwargs(args.chat_template_kwargs)
    if getattr(args, "critic", None) == "rule" and not hasattr(task, "critique"):
        fail(f"the task {args.task} has no rule; choose another --critic")
    if hasattr(task, "check"):
        task.check(args, script)
    return task, args
