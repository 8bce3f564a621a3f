"""Tasks: what the policy is asked, what a program says of its answers, and how they are scored. One file a task.

A task is a .py file, one of those here or the user's own (--task PATH.py), with

    load(args) -> (train, heldout)             lists of Example; args has the flags of add_flags()
    score(example, response) -> dict           numbers that a response is judged by, averaged over held-out prompts
    METRICS                                    one sentence for each of these numbers
    critique(example, response) -> Feedback    optional: a program as a critic, `--critic rule`
    kinds(example, response) -> list           optional: the kind of each of its poor quotes
    test_log(example, response) -> str         optional: what an annotator is shown of the unit tests
    CRITERIA                                   optional: a few sentences for annotators, what is good and what is poor
    STEP_END                                   optional: a regular expression for what ends a step, for rewards by step
    DEFAULTS                                   optional: {script: {flag: default}}
    check(args, script)                        optional: ends the program with a sentence if the flags do not fit the task
    sft_pairs(args, examples)                  optional: (prompt, response) pairs in training order; by default the references
    new_model(seed)                            optional: a tokenizer and a model from scratch, for a task without a download
"""

import argparse
import importlib
from pathlib import Path
from typing import NamedTuple

from t2g import cli, critics, dist
from t2g.cli import fail, positive
from t2g.rollout import chat_text


class Example(NamedTuple):
    prompt: str  # what the user says to the policy
    reference: str  # a good response, "" if none is known
    facts: dict  # whatever the task's own critic and scores need


BUILT_IN = ("qa", "summarize", "toy")


def load_task(name: str):
    """The module of a built-in task, or of a task in a .py file of the user's own.

    Its NAME, by which runs/NAME/ is called, is the name of the file; of a file task.py, that of its folder.
    """
    if name in BUILT_IN:
        module = importlib.import_module(f"t2g.tasks.{name}")
    else:
        module = cli.load_file(name, "--task", BUILT_IN)
    path = Path(module.__file__)
    module.NAME = path.parent.name if path.stem == "task" else path.stem
    return module


def add_flags(add):
    """The flags that say which examples a script works on, and where its run lies."""
    add("--task", default="toy", help="the task, a file of t2g/tasks")
    add(
        "--data",
        help="examples: a .jsonl, .json or .parquet file or a hub id, NAME or NAME:SPLIT (the toy makes its own)",
    )
    add(
        "--heldout_data",
        help="held-out examples, in the same forms; a fifth of --data if not given",
    )
    add(
        "--source_field",
        default="article",
        help="the field of --data that holds the text to work on",
    )
    add(
        "--reference_field",
        default="abstract",
        help="the field of --data that holds a good response",
    )
    add(
        "--max_prompt_length",
        type=positive(int),
        help="examples with a longer prompt, in tokens, are left out and counted",
    )
    add(
        "--allow_code_execution",
        action="store_true",
        help="code: run what the policy writes, in a sandbox; see t2g/sandbox.py",
    )
    add("--bf16", action="store_true", help="matrix products in bf16, weights in fp32")
    add("--seed", type=int, default=0, help="seed of every random choice")


def data_flags(args) -> list[str]:
    """The flags that tell an earlier stage to work on the same data in the same way."""
    given = {
        "task": args.task,
        "seed": args.seed,
        "max_prompt_length": args.max_prompt_length,
        "heldout_data": args.heldout_data,
    }
    if args.data:
        given |= {
            "data": args.data,
            "source_field": args.source_field,
            "reference_field": args.reference_field,
        }
    flags = [
        word
        for name, value in given.items()
        if value is not None
        for word in (f"--{name}", str(value))
    ]
    return flags + [f"--{name}" for name in ("allow_code_execution", "bf16") if getattr(args, name)]


def short_enough(examples, tokenizer, max_prompt_length) -> list[Example]:
    """The examples whose prompt has at most max_prompt_length tokens, what is left out being counted on the console."""
    if not max_prompt_length:
        return examples
    chats = [chat_text(tokenizer, example.prompt) for example in examples]
    lengths = map(
        len, tokenizer(chats, add_special_tokens=False)["input_ids"]
    )  # as encode_prompts counts them
    kept = [example for example, length in zip(examples, lengths) if length <= max_prompt_length]
    if not kept:
        fail(
            f"all {len(examples)} examples have prompts of more than {max_prompt_length} tokens; raise --max_prompt_length"
        )
    print(
        f"{len(kept)} of {len(examples)} examples have prompts of at most {max_prompt_length} tokens; the others are left out"
    )
    return kept


def parse(parser, script: str):
    """The arguments of a script, with the defaults of its task, and that task.

    A task's DEFAULTS are read, and the flags of a critic in a .py file are added, before the command
    line is parsed as a whole.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default=parser.get_default("task"))
    first.add_argument("--critic", default=parser.get_default("critic"))
    named = first.parse_known_args()[0]
    task = load_task(named.task)
    if named.critic and named.critic.endswith(".py"):
        file = cli.load_file(named.critic, "--critic", critics.BUILT_IN)
        getattr(file, "add_flags", lambda add: None)(cli.flags(parser))
    parser.set_defaults(**getattr(task, "DEFAULTS", {}).get(script, {}))
    args = parser.parse_intermixed_args()  # positional arguments may stand on either side of flags
    if dist.processes() > 1 and script != "train_ppo":
        fail(f"{script}.py works in one process; start it without --nproc_per_node")
    if hasattr(task, "check"):
        task.check(args, script)
    return task, args
