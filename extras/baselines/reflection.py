"""Reflection, a baseline without training: the policy rewrites its response after reading a critique.

    y ~ pi(. | x),  c its critique,  y' ~ pi(. | x, y, c); y' is measured

The command is `eval.py policy` for second responses: it prints the same scores, as one JSON object.

python -m extras.baselines.reflection runs/toy/sft                  # with the toy's reward model
python -m extras.baselines.reflection runs/toy/sft --critic rule
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch

from t2g import cli, critics, dist, policy, stages, tasks
from t2g.critics import fitting_prompt
from t2g.feedback import revision_prompt
from t2g.metrics import mean_scores
from t2g.rollout import respond


def fitting_revision(model, tokenizer, prompt, response, feedback, response_length) -> str:
    """Returns revision_prompt(), the middle of the prompt left out where the context is too short."""
    room = policy.context_length(model) - response_length
    question = partial(revision_prompt, feedback=feedback)
    return fitting_prompt(tokenizer, prompt, response, room, question)


def revise(model, tokenizer, examples, texts, critic, response_length, **sampling):
    """Rewrites each response after its critique.

    A response whose critique is unreadable stays as it is and counts as finished.

    Returns: the texts, and for each whether it ended with EOS.
    """
    feedback = critic(examples, texts)
    prompts = [
        fitting_revision(model, tokenizer, example.prompt, text, one, response_length)
        for example, text, one in zip(examples, texts, feedback)
        if one is not None
    ]
    revisions = zip(*respond(model, tokenizer, prompts, response_length, **sampling))
    pairs = [(text, True) if one is None else next(revisions) for text, one in zip(texts, feedback)]
    return [text for text, _ in pairs], [finished for _, finished in pairs]


def evaluate(task, model, tokenizer, examples, critic, args) -> dict[str, float]:
    """Returns the task's mean scores of revisions, sampled and greedy, as metrics.evaluate() does."""
    generator = torch.Generator(dist.device()).manual_seed(args.seed)
    prompts, means = [example.prompt for example in examples], {}
    for suffix, temperature in (("", 1.0), ("_greedy", 0)):
        desc = f"revisions{suffix}"
        sampling = dict(temperature=temperature, bf16=args.bf16, generator=generator, desc=desc)
        texts, _ = respond(model, tokenizer, prompts, args.response_length, **sampling)
        texts, finished = revise(
            model, tokenizer, examples, texts, critic, args.response_length, **sampling
        )
        means |= {name + suffix: mean for name, mean in mean_scores(task, examples, texts).items()}
        means["eos_rate" + suffix] = float(np.mean(finished))
    return means


def main():
    parser = cli.parser(__doc__)
    add = cli.flags(parser)
    add("runs", help="the policies to measure: runs, folders or hub ids", nargs="+")
    tasks.add_flags(add)
    critics.add_flags(add)
    add("--response_length", 64, "maximum tokens of a response")
    add("--eval_samples", 256, "number of held-out prompts")
    task, args = tasks.parse(parser, "eval")
    torch.manual_seed(args.seed)
    root, examples = Path(args.runs[0]).parent, task.load(args)[1]
    stages.ensure(critics.stages_before(args), args, root)
    critic, rows = critics.load_critic(task, args, root, policy.device()), {}
    for run in args.runs:
        tokenizer, model = policy.load(run, policy.device())
        heldout = tasks.short_enough(examples, tokenizer, args.max_prompt_length)
        heldout = heldout[: args.eval_samples]
        rows[run] = evaluate(task, model, tokenizer, heldout, critic, args)
        for name, mean in rows[run].items():
            print(f"{name:24}{mean:10.3f}  {run}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
