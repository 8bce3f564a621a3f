"""An error on one rank ends all of them: the others would wait for it in a collective."""

import time
from functools import partial

import pytest
import torch
from forking import two_ranks

import train_ppo
from t2g.cli import fail

SECONDS = 30  # within which all ranks are gone
FLAGS = (
    "--critic", "rule", "--max_steps", 3, "--per_device_train_batch_size", 2, "--eval_samples", 2,
    "--response_length", 8, "--num_mini_batches", 1,
)  # fmt: skip


def too_long(*_, **__):
    fail("prompt tokens exceed the model's context")


def out_of_memory(*_, **__):
    torch.empty(2**60)


def unlike_ratio(*_, **__):
    raise RuntimeError("the first ratio of a step must be 1")


def server_fails(*_, **__):
    fail("the server gave no critique")


def not_a_number(*_, **__):
    return {"shift_good": float("nan")}


CAUSES = {  # what fails, by the name that train_ppo.py calls it; the sentence that must be shown
    "a context that is too small": ("sample", too_long, "exceed the model's context"),
    "memory": ("response_logprobs", out_of_memory, "out of memory"),
    "the first ratio": ("check_first_ratio", unlike_ratio, "first ratio of a step must be 1"),
    "a critic's server": ("token_rewards", server_fails, "the server gave no critique"),
    "a metric that is not a number": ("shift", not_a_number, "not JSON compliant"),
}


def break_one(cause, rank):
    """Makes the cause strike on rank 1; on rank 0 if it is one of metrics, which rank 0 logs."""
    name, failing, _ = CAUSES[cause]
    if rank == (0 if name == "shift" else 1):
        setattr(train_ppo, name, failing)


@pytest.mark.parametrize("cause", CAUSES)
def test_whatever_one_rank_dies_of_both_are_gone_and_say_why(cause, model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    flags = [*FLAGS, "--policy", tmp_path / "sft", "--output_dir", tmp_path / "ppo"]
    errors = [tmp_path / "errors0", tmp_path / "errors1"]
    end = time.monotonic() + SECONDS
    ranks = two_ranks(partial(break_one, cause), flags, errors)
    for process in ranks:
        process.join(max(end - time.monotonic(), 0.1))
    alive = [process.is_alive() for process in ranks]
    for process in ranks:
        process.kill()
    assert alive == [False, False] and all(process.exitcode for process in ranks)
    assert CAUSES[cause][2] in "".join(path.read_text() for path in errors)
