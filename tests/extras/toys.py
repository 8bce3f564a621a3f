"""Untrained starting policies and noisy examples of the toy."""

import torch

from t2g import policy
from t2g.tasks import toy


def save_start(root):
    """Saves an untrained starting policy of the toy as root/sft; returns it and its tokenizer."""
    tokenizer, model = toy.new_model(0)
    policy.save(model, tokenizer, root / "sft", 1)
    return tokenizer, model.eval()


def scorer_of(model) -> policy.Policy:
    """A scalar reward model with a head that is not zero."""
    scorer = policy.Policy(model).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(scorer.value_head.weight)
    torch.nn.init.ones_(scorer.value_head.bias)
    return scorer


def noisy_examples(rng, n):
    """Returns n of the toy's examples, each with a noisy summary."""
    examples = [toy.make_example(rng) for _ in range(n)]
    return [(example, toy.noisy_summary(example, rng)) for example in examples]
