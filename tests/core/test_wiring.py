"""train() in two processes makes the run of one, with the learned critic."""

import random

import pytest
import torch
from forking import run, two_ranks
from safetensors.torch import load_file
from torch.testing import assert_close

import train_ppo
from t2g import critics
from t2g.feedback import Feedback
from t2g.log import read_jsonl
from t2g.rollout import sample

FLAGS = (
    "--max_steps", 2, "--num_ppo_epochs", 2, "--num_mini_batches", 1, "--response_length", 12,
    "--per_device_train_batch_size", 2, "--critique_length", 12, "--eval_samples", 2,
    "--learning_rate", 3e-4, "--reward", "prm", "--kl_target", 0.5, "--missing_eos_penalty", 0.5,
)  # fmt: skip
LEARNED_CRITIC = critics.reward_model_critic


def sample_by_prompt(model, tokenizer, prompts, *shape, **options):
    """sample(), with random numbers that depend on the prompt alone, whichever rank has it."""
    generators = [random.Random(prompt) for prompt in prompts]

    def rand(*_, **__):
        return torch.tensor([generator.random() for generator in generators])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        return sample(model, tokenizer, prompts, *shape, **options)


def readable_critic(model, tokenizer, critique_length, bf16=False, desc=None):
    """The learned critic, except that what its random weights write is made readable, or not."""
    ask = LEARNED_CRITIC(model, tokenizer, critique_length, bf16)

    def critic(examples, responses):
        feedback = []
        for z, text in zip(ask(examples, responses), responses):
            quotes = dict(good=[text[: len(z) % 9 + 1]], poor=[text[-3:]])
            feedback.append(Feedback(z, **quotes) if len(z) % 3 and text.strip() else None)
        return feedback

    return critic


def prepare(rank):
    train_ppo.sample = sample_by_prompt
    critics.reward_model_critic = readable_critic
    critics.parse_or_none = str  # leaves the text as it is


def test_two_processes_with_the_learned_critic_make_the_run_of_one(
    model, tokenizer, tmp_path, monkeypatch
):
    for name in ("sft", "rm"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    flags = [*FLAGS, "--policy", tmp_path / "sft", "--reward_model", tmp_path / "rm"]
    errors = [tmp_path / "errors0", tmp_path / "errors1"]
    ranks = two_ranks(prepare, [*flags, "--output_dir", tmp_path / "two"], errors)
    monkeypatch.setattr(train_ppo, "sample", sample_by_prompt)
    monkeypatch.setattr(critics, "reward_model_critic", readable_critic)
    monkeypatch.setattr(critics, "parse_or_none", str)
    whole = ["--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "one"]
    code, printed = run("train_ppo", [*flags, *whole])
    for process in ranks:
        process.join()
    assert code == 0, printed
    assert [process.exitcode for process in ranks] == [0, 0], errors[1].read_text()[-2000:]

    one, two = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for ours, theirs in zip(one, two, strict=True):
        assert 0 < ours["unparsable"] < 1 and ours["tokens_good"] > 0 and ours["clipfrac"] >= 0
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if "seconds" not in name and name != "peak_memory_gib":
                assert theirs[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for name in ("model.safetensors", "value_head/value_head.safetensors"):
        ours, theirs = (load_file(tmp_path / run / "checkpoint-2" / name) for run in ("one", "two"))
        for key, weight in ours.items():
            assert_close(theirs[key], weight, atol=1e-6, rtol=1e-5)
