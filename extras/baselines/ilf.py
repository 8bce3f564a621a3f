"""Imitation learning from language feedback: responses -> critiques -> revisions -> fine-tuning on those that the critic prefers.

    y ~ pi(. | x),  c its critique,  y' ~ pi(. | x, y, c)        L = - E[ log pi(y* | x) ],  y* the best y' of a prompt

    python train_ilf.py                                            # the toy's, into runs/toy/ilf
    python train_ilf.py --task summarize --policy HUB_ID --data posts.jsonl --critic rule --output_dir runs/posts/ilf

After Chen et al. 2023 (arXiv 2303.16749) and Scheurer et al. 2023 (arXiv 2303.16755). Left out: a model of its own that revises;
the policy does, so it must be able to.
"""

import itertools
import random
import time
from pathlib import Path

import torch

from extras.baselines import offline
from extras.baselines.reflection import fitting_revision
from t2g import cli, critics, policy, stages, supervised, tasks
from t2g.log import write_json


def main():
    parser = cli.parser(__doc__)
    add = parser.add_argument
    tasks.add_flags(add)
    offline.add_flags(add, num_prompts=256, samples_per_prompt=2)
    add("--output_dir", help="where the run goes; runs/TASK/ilf if not given")
    supervised.add_flags(add)
    task, args = tasks.parse(parser, "train_ilf")
    args.output_dir = args.output_dir or f"runs/{task.NAME}/ilf"
    root = Path(args.output_dir).parent
    stages.ensure(["sft", *critics.stages_before(args)], args, root, args.policy)
    start = time.perf_counter()

    torch.manual_seed(args.seed)
    tokenizer, model = policy.load(args.policy or root / "sft", policy.device())
    critic = critics.load_critic(task, args, root, policy.device())
    examples = offline.prompts_of(task, args, tokenizer)
    first, stats = offline.scored(
        examples, [e.prompt for e in examples], critic, tokenizer, model, args
    )

    # The second try, with the critique before its eyes; where that was unreadable there is nothing to revise by.
    first = [row for row in first if row.feedback]
    length = args.response_length
    prompts = [
        fitting_revision(model, tokenizer, row.example.prompt, row.text, row.feedback, length)
        for row in first
    ]
    second, revised = offline.scored(
        [row.example for row in first], prompts, critic, tokenizer, model, args, desc="revising"
    )
    pairs = chosen(first, second)
    random.Random(args.seed).shuffle(pairs)  # samples come in order of their prompts' length
    revised |= {"prompts_kept": len(pairs) / len({example.prompt for example in examples})}
    print(
        f"reward of a response {stats['reward']:.2f}, of a revision {revised['reward']:.2f}; {len(pairs)} prompts to learn from"
    )
    saved = supervised.finetune(model, tokenizer, pairs, args, desc="ILF")
    write_json(Path(args.output_dir) / "sampling.json", [stats, revised])
    print(f"policy: {saved} ({time.perf_counter() - start:.0f} s)")


def chosen(first, second) -> list[tuple[str, str]]:
    """(prompt, revision) pairs: of each prompt the revision with the highest reward, among those not below what they revise."""
    better = [
        after
        for before, after in zip(first, second)
        if after.finished and after.reward is not None and after.reward >= before.reward
    ]
    if not better:
        cli.fail(
            f"none of {len(second)} revisions is as good as what it revises; can this policy revise? See --policy and --critic"
        )
    by_prompt = itertools.groupby(better, key=lambda row: row.example.prompt)
    best = [max(rows, key=lambda row: row.reward) for _, rows in by_prompt]
    return [(row.example.prompt, row.text) for row in best]


if __name__ == "__main__":
    main()
