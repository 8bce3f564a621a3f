"""Two processes make the step and the run of one; no split into ranks or microbatches matters."""

import random
from types import SimpleNamespace

import one_step
import pytest
import torch
from forking import TORCHRUN, in_two, output, python, run_ranks
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import train_ppo
from t2g import checkpoint, critics, dist
from t2g.feedback import Feedback
from t2g.log import read_jsonl
from t2g.policy import Policy
from t2g.rollout import sample

FLAGS = (
    "--max_steps", 2, "--num_ppo_epochs", 2, "--num_mini_batches", 1, "--response_length", 12,
    "--per_device_train_batch_size", 2, "--eval_samples", 2, "--learning_rate", 3e-4,
    "--reward", "prm", "--kl_target", 0.5, "--missing_eos_penalty", 0.5, "--critique_length", 12,
    "--free_critiques",  # of random weights
)  # fmt: skip
LEARNED_CRITIC = critics.reward_model_critic


@pytest.fixture(scope="module")
def two_processes(folder):
    """Each case's step, made by two processes of torchrun: weights and statistics by name."""
    python(*TORCHRUN, one_step.__file__, folder / "model", folder)
    return lambda case: load_file(folder / f"{case}.safetensors")


@pytest.mark.parametrize("case", one_step.CASES)
def test_two_processes_make_the_step_of_one(model, two_processes, case):
    weights, stats = one_step.one_step(model, case)
    start, sharded = Policy(model).state_dict(), two_processes(case)
    assert sharded["stats.processes"] == 2
    assert set(weights) == {name for name in sharded if not name.startswith("stats.")}
    if case == "bf16":  # autocast and FSDP round in other places, and Adam starts with signs
        states = (weights, sharded)
        moves = [torch.cat([(s[name] - start[name]).flatten() for name in weights]) for s in states]
        assert torch.cosine_similarity(*moves, dim=0) > 0.95
        assert all(sharded[name].dtype == torch.float32 for name in weights)
    else:
        for name, weight in weights.items():
            assert_close(sharded[name], weight, atol=1e-6, rtol=1e-5)
    for name, value in stats.items():
        expected = pytest.approx(value, rel=0.1 if case == "bf16" else 1e-4, abs=1e-6)
        assert sharded[f"stats.{name}"].item() == expected, name
    moved = any((start[name] != weights[name]).any() for name in weights.keys() & start.keys())
    adapted = any("lora_B" in name and weight.any() for name, weight in weights.items())
    assert (moved or adapted) == (case != "all_are_unreadable")


def test_no_split_into_microbatches_changes_a_step(model):
    """Rows have unequal lengths, so that a mean of the microbatches' means would differ."""
    ones, stats = one_step.one_step(model, "uneven_lengths")
    twos, same = one_step.one_step(model, "microbatches")
    assert stats == pytest.approx(same, rel=1e-4, abs=1e-6)
    assert_close(ones, twos, atol=1e-6, rtol=1e-5)


def sample_by_prompt(model, tokenizer, prompts, *shape, **options):
    """sample(), with random numbers that depend on the prompt alone, whichever rank has it."""
    generators = [random.Random(prompt) for prompt in prompts]

    def rand(*_, **__):
        return torch.tensor([generator.random() for generator in generators])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        return sample(model, tokenizer, prompts, *shape, **options)


def readable_critic(*model, **options):
    """The learned critic, except that what its random weights write is made readable, or not."""
    ask = LEARNED_CRITIC(*model, **options)

    def judge(z, text):
        readable = len(z) % 2 and text.strip()
        return Feedback(z, [text[: len(z) % 9 + 1]], [text[-3:]]) if readable else None

    return lambda examples, texts: [judge(*pair) for pair in zip(ask(examples, texts), texts)]


def prepare(rank, patch=setattr):
    patch(train_ppo, "sample", sample_by_prompt)
    patch(critics, "reward_model_critic", readable_critic)
    patch(critics, "parse_or_none", str)  # leaves the text as it is


def test_two_processes_with_a_learned_critic_make_the_run_of_one(folder, monkeypatch):
    flags = [*FLAGS, "--policy", folder / "model", "--reward_model", folder / "model"]
    codes, errors = in_two("train_ppo", [*flags, "--output_dir", folder / "ppo2"], prepare)
    assert codes == [0, 0], errors
    prepare(0, monkeypatch.setattr)
    whole = ["--gradient_accumulation_steps", 2, "--output_dir", folder / "ppo1"]
    output("train_ppo", *flags, *whole)

    one, two = (read_jsonl(folder / name / "metrics.jsonl") for name in ("ppo1", "ppo2"))
    for ours, theirs in zip(one, two, strict=True):
        assert 0 < ours["unparsable"] < 1 and ours["tokens_good"] > 0 and ours["clipfrac"] >= 0
        assert ours.keys() == theirs.keys()
        for name in {name for name in ours if "seconds" not in name} - {"peak_memory_gib"}:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6), name
    for name in ("model.safetensors", "value_head/value_head.safetensors"):
        one, two = (load_file(folder / run / "checkpoint-2" / name) for run in ("ppo1", "ppo2"))
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def load_state(state, saved):
    """Loads a state into a sharded layer, and saves the whole of its weights."""
    layer = dist.shard(torch.nn.Linear(3, 5))
    optimizer = torch.optim.AdamW(layer.parameters())
    assert checkpoint.load(state, layer, [optimizer]) == {"step": 7}
    weights = dist.whole_state(layer)
    weights["moments"] = dist.plain(optimizer.state_dict()["state"][0]["exp_avg"])
    if dist.rank() == 0:
        save_file(weights, saved)


def test_two_processes_load_the_state_of_one(tmp_path):
    layer = torch.nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path / "one", layer, [optimizer], step=7)
    assert run_ranks(load_state, tmp_path / "one", tmp_path / "two") == [0, 0]
    expected = layer.state_dict() | {"moments": optimizer.state_dict()["state"][0]["exp_avg"]}
    assert_close(load_file(tmp_path / "two"), expected, rtol=0, atol=0)


def test_data_have_the_same_hash_in_each_process():
    def data(*words):
        own = SimpleNamespace(words=set(words))
        return [("p", "r", {"words": set(words), "object": object(), (1, 2): own})]

    one, other = data(0, 8), data(8, 0)
    assert str(one) != str(other) and checkpoint.hash_of(one) == checkpoint.hash_of(other)
    assert checkpoint.hash_of(one) != checkpoint.hash_of(data(0, 9))
