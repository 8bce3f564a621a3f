"""No split changes a step: two processes, or microbatches, leave the weights of one."""

import subprocess
import sys
from pathlib import Path

import one_step
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from t2g import dist
from t2g.policy import Policy


@pytest.fixture(scope="module")
def two_processes(model, tokenizer, tmp_path_factory):
    """Each case's step, made by two processes of torchrun: weights and statistics by name."""
    folder = tmp_path_factory.mktemp("two")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*torchrun, Path(one_step.__file__), folder / "model", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return lambda case: load_file(folder / f"{case}.safetensors")


@pytest.mark.parametrize("case", one_step.CASES)
def test_two_processes_make_the_step_of_one(model, two_processes, case):
    weights, stats = one_step.one_step(model, case)
    start = Policy(model).state_dict()
    sharded = two_processes(case)
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


def test_without_torchrun_there_is_one_process(model):
    assert (dist.rank(), dist.size()) == (0, 1)
    x = torch.arange(6).reshape(2, 3)
    assert dist.gather(x) is x and dist.own(x).equal(x) and dist.total(x) is x
    assert dist.shard(model) is model and not dist.parts(model)
