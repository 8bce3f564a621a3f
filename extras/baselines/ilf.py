"""ILF, imitation learning from language feedback, a baseline: trains on revised responses.

    y ~ pi(. | x),  c its critique,  y' ~ pi(. | x, y, c)
    L = - E[ log pi(y* | x) ],  y* the best revision y' of a prompt: the highest sum of delta_t,
                                   less the penalty of a missing EOS

After Chen et al. 2023 (arXiv 2303.16749) and Scheurer et al. 2023 (arXiv 2303.16755). The policy
itself revises, so it must be able to; a separate revision model is left out.

python -m extras.baselines.ilf                                      # the toy, into runs/toy/ilf
python -m extras.baselines.ilf --task summarize --policy HUB_ID --data posts.jsonl --critic rule
"""

import itertools
import random
from pathlib import Path

from extras.baselines import common
from t2g import cli, critics, dist, supervised
from t2g.log import write_json

TOY = dict(
    num_prompts=1440, samples_per_prompt=1, response_length=40, learning_rate=1.5e-3,
    max_steps=180, per_device_train_batch_size=32
)  # fmt: skip


def add_flags(add):
    common.add_sampling_flags(add, num_prompts=256, samples_per_prompt=2)
    supervised.add_flags(add)


@cli.friendly_errors()
def main():
    task, args = common.parse(__doc__, "ilf", add_flags, TOY)
    with common.started(args) as (root, tokenizer, model):
        critic = critics.load_critic(task, args, root)
        examples = common.draw_examples(task, args, tokenizer, model)
        num_prompts = len({example.prompt for example in examples})
        shared = critic, tokenizer, model, args

        # 1. Responses. Those whose critique is unreadable or too long cannot be revised.
        sampled, stats = common.sample_and_score(examples, *shared)
        first, prompts = [], []
        for row in sampled:
            parts = row.example.prompt, row.text, row.feedback, args.response_length
            prompt = common.fitting_revision(model, tokenizer, *parts)
            if prompt:
                first.append(row)
                prompts.append(prompt)

        # 2. Revisions, which the critic judges as responses to the same prompts.
        examples = [row.example for row in first]
        second, revised = common.sample_and_score(examples, *shared, prompts)

        # 3. Supervised training on the best of them.
        pairs = best_revisions(first, second)
        random.Random(args.seed).shuffle(pairs)  # the samples are sorted by length
        revised["prompts_kept"] = len(pairs) / num_prompts
        rewards = f"responses {stats['reward']:.2f}, revisions {revised['reward']:.2f}"
        print(f"mean reward: {rewards}; {len(pairs)} revisions to learn from")
        saved = supervised.finetune(model, tokenizer, pairs, args, desc="ILF")
        if dist.rank() == 0:
            write_json(Path(args.output_dir) / "sampling.json", [stats, revised])
        print(f"policy: {saved}")


def best_revisions(first, second) -> list[tuple[str, str]]:
    """Returns (prompt, revision) pairs: for each prompt the revision with the highest reward.

    Only finished revisions count whose reward is at least that of the response they revise.
    """
    better = [
        after
        for before, after in zip(first, second)
        if after.finished and after.reward is not None and after.reward >= before.reward
    ]
    if not better:
        cli.fail(f"none of {len(second)} revisions is as good as its response; see --policy")
    groups = itertools.groupby(better, key=lambda row: row.example.prompt)
    best = [max(rows, key=lambda row: row.reward) for _, rows in groups]
    return [(row.example.prompt, row.text) for row in best]


if __name__ == "__main__":
    main()
