"""Reflection, a baseline without training: the policy revises its response after a critique.

    y ~ pi(. | x),  c its critique,  y' ~ pi(. | x, y, c); y' is measured

The command prints the scores of `eval.py policy`, as one JSON object, for these revisions.

python -m extras.baselines.reflection runs/toy/sft                  # with the toy's reward model
python -m extras.baselines.reflection runs/toy/sft --critic rule
"""

import json
from functools import partial
from pathlib import Path

from extras.baselines.common import fitting_revision
from t2g import cli, critics, dist, policy, stages, tasks, torchrun
from t2g.metrics import evaluate
from t2g.rollout import respond


def reflect(model, tokenizer, prompts, response_length, examples, critic, **sampling):
    """Responds to prompts and rewrites each response after its critique.

    A response whose critique is unreadable or too long stays as it is.

    Returns: the texts, and for each whether it ended with EOS.
    """
    texts, finished = respond(model, tokenizer, prompts, response_length, **sampling)
    questions = {}
    for row, parts in enumerate(zip(prompts, texts, critic(examples, texts))):
        prompt = fitting_revision(model, tokenizer, *parts, response_length)
        if prompt:
            questions[row] = prompt
    revisions = respond(model, tokenizer, [*questions.values()], response_length, **sampling)
    for row, text, end in zip(questions, *revisions):
        texts[row], finished[row] = text, end
    return texts, finished


@cli.friendly_errors()
def main():
    parser = cli.parser(__doc__)
    parser.add_argument("runs", nargs="+", help="the policies: runs, folders or hub ids")
    add = cli.flags(parser)
    tasks.add_flags(add)
    critics.add_flags(add)
    add("--response_length", 64, "maximum tokens of a response")
    add("--temperature", 1.0, "temperature of sampled responses")
    add("--eval_samples", 256, "number of held-out prompts")
    task, args = tasks.parse(parser, "eval")
    root, examples = Path(args.runs[0]).parent, tasks.load(task, args)[1]
    args.replicate_frozen, args.cpu_offload = True, False  # ranks call it unequally often
    args.output_dir = args.runs[0]  # critics look for their models beside it
    scores = {}
    earlier = partial(stages.ensure, critics.stages_before(args), args, root)
    with torchrun.session(run_first=earlier):
        critic = critics.load_critic(task, args, root)
        for run in args.runs:
            tokenizer, model = policy.load(run, policy.device())
            heldout = tasks.short_enough(examples, tokenizer, model, args)
            heldout = heldout[: args.eval_samples]
            revise = partial(reflect, examples=dist.share(heldout), critic=critic)
            scores[run] = evaluate(task, model, tokenizer, heldout, args, run, revise)
            del model  # before the next one is loaded
        print(json.dumps(scores))


if __name__ == "__main__":
    main()
