"""Runs the baselines as a user does, but in this process."""

import importlib
import sys

import pytest

from t2g import policy
from t2g.tasks import toy


def run(command, **paths):
    """Runs a command such as "dpo --max_steps 2"; each of paths is appended as a flag."""
    name, *flags = command.split()
    for flag, path in paths.items():
        flags += [f"--{flag}", str(path)]
    before, sys.argv = sys.argv, [f"{name}.py", *flags]
    try:
        importlib.import_module(f"extras.baselines.{name}").main()
    finally:
        sys.argv = before


def save_start(root):
    """Saves an untrained starting policy of the toy as root/sft; returns it and its tokenizer."""
    tokenizer, model = toy.new_model(0)
    policy.save(model, tokenizer, root / "sft", 1)
    return tokenizer, model.eval()


def noisy_examples(rng, n):
    """Returns n of the toy's examples, each with a noisy summary."""
    examples = [toy.make_example(rng) for _ in range(n)]
    return [(example, toy.noisy_summary(example, rng)) for example in examples]


def refused(capsys, command, **paths) -> str:
    """Runs a command that must end with exit code 2, and returns its one sentence."""
    with pytest.raises(SystemExit) as stopped:
        run(command, **paths)
    assert stopped.value.code == 2
    return capsys.readouterr().err.rpartition("error: ")[2]
