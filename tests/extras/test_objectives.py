"""A step of a baseline is the same however its rows are split into microbatches."""

import argparse
import random

import pytest
import torch
from torch.testing import assert_close
from toys import scorer_of

from extras.baselines import dpo, scalar_rm
from t2g import supervised

ARGS = argparse.Namespace(beta=0.3, bf16=False, per_device_train_batch_size=2, max_grad_norm=1e9)
RNG, NATS = random.Random(0), -6.7  # of a token, before training


def ids(n):
    return RNG.choices(range(4, 800), k=n)


LENGTHS = [(9 + 5 * n, 4 + 3 * n, 19 - 2 * n) for n in range(6)]
PAIRS = [[*map(ids, (p, y, z)), NATS * y + p / 5, NATS * z] for p, y, z in LENGTHS]
TEXTS = [(ids(p + y), [1], 0.5 * n - 1) for n, (p, y, _) in enumerate(LENGTHS)]


@pytest.mark.parametrize(
    ("objective", "rows", "wrap"),
    [(dpo.PREFERENCE, PAIRS, lambda model: model), (scalar_rm.REGRESSION, TEXTS, scorer_of)],
    ids=["dpo", "scalar_rm"],
)
def test_no_split_into_microbatches_changes_the_step(fresh, objective, rows, wrap):
    gradients, metrics = [], []
    for parts in ([rows], [rows[:1], rows[1:4], rows[4:]]):
        tokenizer, model = fresh()
        model = wrap(model)
        parts = [objective.collate(part, tokenizer.pad_token_id, "cpu") for part in parts]
        metrics.append(supervised.train_step(model, parts, ARGS, objective))
        trained = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(trained) / metrics[-1]["grad_norm"])
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)
    assert_close(*gradients, atol=1e-6, rtol=1e-3)
