"""The toy with a starting policy that heeds critiques, for methods in which the policy revises.

Reflection, ILF and SDPO show the policy a critique of its own response. A chat model can use that;
the toy's starting policy, after 400 steps, hardly can. Here it learns for 600 steps more: half of
the pairs are revisions, the other half noisy summaries, so that its first tries stay as they were.

python train_sft.py --task extras/studies/reviser.py --model runs/toy/sft   # into runs/reviser/sft
python -m extras.baselines.sdpo --policy runs/reviser/sft
"""

import random

from t2g import dist
from t2g.tasks import toy
from t2g.tasks.toy import METRICS, load, score

__all__ = ["METRICS", "load", "score", "sft_pairs"]

DEFAULTS = {"train_sft": toy.DEFAULTS["train_sft"] | dict(max_steps=600)}
REVISIONS = 0.5  # share of the pairs that ask for a revision


def sft_pairs(args, examples):
    """Returns revisions by incomplete critiques, and noisy summaries, in random order."""
    rng, pairs = random.Random(f"revisions {args.seed}"), []
    for _ in range(args.max_steps * dist.batch_size(args)):
        example = rng.choice(examples)
        if rng.random() < REVISIONS:
            pairs.append(toy.revision_pair(example, rng))
        else:
            pairs.append((example.prompt, toy.noisy_summary(example, rng)))
    return pairs
