"""Untrained starting policies and noisy examples of the toy."""

from t2g import policy
from t2g.tasks import toy


def save_start(root):
    """Saves an untrained starting policy of the toy as root/sft; returns it and its tokenizer."""
    tokenizer, model = toy.new_model(0)
    policy.save(model, tokenizer, root / "sft", 1)
    return tokenizer, model.eval()


def noisy_examples(rng, n):
    """Returns n of the toy's examples, each with a noisy summary."""
    examples = [toy.make_example(rng) for _ in range(n)]
    return [(example, toy.noisy_summary(example, rng)) for example in examples]
