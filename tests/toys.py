"""Noisy examples of the toy, a scalar reward model, and steps and logits of models by brute force."""

import argparse
import itertools

import pytest
import torch
from torch.testing import assert_close

from t2g import policy, supervised
from t2g.tasks import toy

STEP = argparse.Namespace(beta=0.3, bf16=False, per_device_train_batch_size=2, max_grad_norm=1e9)


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


def naive_logits(model, prompt, response):
    """The logits (tokens, V) of a response's ids after a prompt's, by a pass without padding."""
    ids = torch.tensor([[*prompt, *response]])
    return model(input_ids=ids).logits[0, len(prompt) - 1 : -1]


def naive_logprobs(model, prompt, response):
    logprobs = naive_logits(model, prompt, response).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]


def distance(one, other):
    """The norm of the difference of two sets of weights, by name."""
    return torch.cat([(one[name] - other[name]).flatten() for name in one]).norm()


def check_splits(fresh, rows_of, objective=supervised.NEXT_TOKEN):
    """Checks that a step on six rows is the same however they are split into microbatches."""
    gradients, metrics = [], []
    for cuts in ((0, 6), (0, 1, 4, 6)):
        tokenizer, model = fresh()
        rows = rows_of(tokenizer, model)
        parts = [rows[start:end] for start, end in itertools.pairwise(cuts)]
        parts = [objective.collate(part, tokenizer.pad_token_id, "cpu") for part in parts]
        metrics.append(supervised.train_step(model, parts, STEP, objective))
        trained = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(trained) / metrics[-1]["grad_norm"])
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)
    assert_close(*gradients, atol=1e-6, rtol=1e-3)
