"""The benchmarks of the paper. Each module is one command, which --help explains.

    python -m extras.benchmarks.text        ROUGE, BLEU and BERTScore against references
    python -m extras.benchmarks.code        HumanEval(+) and MBPP(+), run in the sandbox
    python -m extras.benchmarks.arc         ARC-Challenge, by lm-evaluation-harness
    python -m extras.benchmarks.answers     answers for alpaca_eval and for MT-Bench
    python -m extras.benchmarks.win_rate    pairwise verdicts of any OpenAI-compatible server

Figures have 95% intervals. The last line of those that score is one JSON object, {"scores": {model:
figures}, ...}.
"""

import json

import numpy as np
import torch

from t2g import cli, data, policy, statistics, tasks
from t2g.rollout import respond


def parser(doc, task=False, samples=True):
    """Returns a parser with the flags of all benchmarks, and its add() of cli.flags.

    task adds the flags that choose held-out prompts of a task.
    """
    parser = cli.parser(doc)
    add = cli.flags(parser)
    if task:
        tasks.add_flags(add)
        add("--eval_samples", 500, "number of held-out prompts")
        length = "maximum tokens of a response; the task's own if not given"
        add("--response_length", None, length, cli.positive(int))
    else:
        add("--seed", 0, "random seed", int)
        add("--bf16", False, "matrix products in bf16, weights in fp32")
    if samples:
        add("--temperature", 0.0, "sampling temperature; 0 is greedy", cli.between(0, 2))
    return parser, add


def respond_to(prompts, name, args, response_length, loaded=None) -> list[str]:
    """Returns the responses of a model to prompts; loaded: its tokenizer and itself."""
    tokenizer, model = loaded or policy.load(name, policy.device())
    generator = torch.Generator(model.device).manual_seed(args.seed)
    sampling = dict(temperature=args.temperature, bf16=args.bf16, generator=generator)
    return respond(model, tokenizer, prompts, response_length, desc=name, **sampling)[0]


def respond_to_heldout(name, args) -> tuple[list, list[str]]:
    """Returns the held-out examples of the task and a model's responses to them."""
    task = tasks.load_task(args.task)
    _, examples = tasks.load(task, args)
    default = getattr(task, "DEFAULTS", {}).get("eval", {}).get("response_length", 64)
    args.response_length = args.response_length or default
    loaded = policy.load(name, policy.device())
    if args.max_prompt_length:
        examples = tasks.short_enough(examples, *loaded, args)
    examples = examples[: args.eval_samples]
    prompts = [example.prompt for example in examples]
    return examples, respond_to(prompts, name, args, args.response_length, loaded)


def read_texts(path, *fields) -> list[dict]:
    """Returns the rows of a file, in which each of these fields must be a text."""
    rows = data.read_rows(path)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        cli.fail(f"{path} must hold a list of objects")
    for number, row in enumerate(rows, 1):
        for field in fields:
            if not isinstance(row.get(field), str):
                cli.fail(f"row {number} of {path} needs {field}, a text")
    return rows


def bootstrap(values, seed=0) -> dict:
    """Returns the mean and its 95% interval, a percentile bootstrap over the values.

    >>> bootstrap([1, 1, 1])
    {'value': 1.0, 'low': 1.0, 'high': 1.0}
    """
    values = np.asarray(values, dtype=float)
    return statistics.bootstrapped(statistics.resamples(len(values), seed) @ values / len(values))


def normal_interval(value, half_width) -> dict:
    """Returns an interval for a share, whose half width another library has computed."""
    return {"value": value, "low": max(value - half_width, 0), "high": min(value + half_width, 1)}


def report(scores, **more):
    """Prints {model: {metric: figure}} as a table, and everything as one line of JSON."""
    for name, figures in scores.items():
        print(f"\n{name}")
        for metric, figure in figures.items():
            print(f"  {metric:14}" + "{value:8.4f}  [{low:.4f}, {high:.4f}]".format(**figure))
    print(json.dumps({"scores": scores, **more}))
