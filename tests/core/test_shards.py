"""Two ranks read their shards from the files: the weights of one process, in half the memory."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from forking import run_ranks
from one_step import PLAIN
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from t2g import dist, policy
from train_ppo import make_models

CASES = {"plain": {}, "lora": {"lora_r": 2}, "replicated_reference": {"replicate_frozen": True}}


def save_small_model(model, tokenizer, folder, tied):
    config = type(model.config)(**model.config.to_dict() | {"tie_word_embeddings": tied})
    for part in (LlamaForCausalLM(config).to(torch.bfloat16), tokenizer):
        part.save_pretrained(folder, max_shard_size=1000)
    assert len(list(folder.glob("*.safetensors"))) > 5


def weights_of(options, folder):
    """The weights and buffers of the policy and the reference, whole on rank 0."""
    _, model = policy.load(folder, empty=True)
    assert model.device.type == ("meta" if dist.size() > 1 else "cpu")
    models = make_models(model, argparse.Namespace(**PLAIN | options), "nowhere")
    state = {}
    for number, part in enumerate(filter(None, models)):
        state |= {f"{number}.{name}": x.clone() for name, x in dist.whole_state(part).items()}
        state |= {f"{number}.{name}": x.clone() for name, x in part.named_buffers()}
        state[f"{number}.weights"] = torch.tensor(len(list(part.parameters())))
    return state


def save_weights(options, folder, path):
    state = weights_of(options, folder)
    if dist.rank() == 0:
        save_file(state, path)


def save_checkpoint(folder, run):
    tokenizer, model = policy.load(folder, empty=True)
    policy.save(dist.shard(model), tokenizer, run, 1)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_many_files_is_saved_by_two_ranks(model, tokenizer, tmp_path, tied):
    save_small_model(model, tokenizer, tmp_path / "model", tied)
    assert run_ranks(save_checkpoint, tmp_path / "model", tmp_path / "run") == [0, 0]
    (_, one), (_, two) = (policy.load(tmp_path / name) for name in ("model", "run"))
    assert_close(two.state_dict(), one.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_read_the_weights_of_one(model, tokenizer, tmp_path, case, tied):
    """From many files in bf16; the head has a weight of its own or that of the embeddings."""
    save_small_model(model, tokenizer, tmp_path / "model", tied)
    files = tmp_path / "model", tmp_path / "weights"
    assert run_ranks(save_weights, CASES[case], *files) == [0, 0]
    one = weights_of(CASES[case], tmp_path / "model")
    assert_close(load_file(tmp_path / "weights"), one, rtol=0, atol=0)


def measure(options, folder, path):
    """Saves the peak of the memory that loading and sharding took, in bytes."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    _, model = policy.load(folder, empty=True)
    models = make_models(model, argparse.Namespace(**PLAIN | options), "nowhere")
    assert all(dist.parts(part.model) for part in models if part)
    path.with_suffix(f".{dist.rank()}").write_text(json.dumps(memory("VmHWM") - before))


def memory(name) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lora_r": 16}])
def test_a_rank_needs_little_more_memory_than_its_shards(tokenizer, tmp_path, options):
    """300M weights, in two ranks: at most 1.2 times a rank's share, and one block."""
    sizes = dict(vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=18)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=16))
    block = sum(x.nbytes for x in model.model.layers[0].parameters())
    share = sum(x.nbytes for x in model.parameters()) // 2 * (1 if options else 2)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    del model
    assert run_ranks(measure, options, tmp_path / "model", tmp_path / "peak") == [0, 0]
    for rank in (0, 1):
        peak = json.loads((tmp_path / f"peak.{rank}").read_text())
        assert peak <= 1.2 * share + block, f"{peak / share:.2f} times the share"
