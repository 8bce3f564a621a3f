"""A GPU makes the step of a CPU. Skipped where there is none; all other tests hide it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import one_step
import pytest
import torch
from safetensors.torch import load_file

CASES = ("uneven_lengths", "lora", "gradient_checkpointing", "bf16")
SAMPLE = """
import sys
import torch
from t2g import policy
from t2g.rollout import sample
torch.backends.cuda.matmul.allow_tf32 = False
tokenizer, model = policy.load(sys.argv[1], policy.device())
rollout = sample(model, tokenizer, ["a", "a longer prompt", "b"], 12, temperature=0)
print(policy.device(), rollout.response.tolist())
"""
pytestmark = pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no GPU")


def run(device, *command):
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    environment = {name: x for name, x in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= hidden | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu")
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    for device in ("cpu", "cuda"):
        (path / device).mkdir()
        run(device, one_step.__file__, path / "model", path / device, *CASES)
    return path


@pytest.mark.parametrize("case", CASES)
def test_a_step_on_the_gpu_is_that_of_the_cpu(model, folder, case):
    cpu, gpu = (load_file(folder / device / f"{case}.safetensors") for device in ("cpu", "cuda"))
    names = [name for name in cpu if not name.startswith("stats.")]
    ours, theirs = (torch.cat([state[name].flatten() for name in names]) for state in (gpu, cpu))
    if case == "bf16":
        start = model.state_dict()
        before = [start[name.removeprefix("model.")] for name in names if "value_head" not in name]
        before = torch.cat([weight.flatten() for weight in before])
        moves = [weights[: len(before)] - before for weights in (ours, theirs)]
        assert torch.cosine_similarity(*moves, dim=0) > 0.95
    else:
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_greedy_responses_on_the_gpu_are_those_of_the_cpu(folder):
    cpu, gpu = (
        run(device, "-c", SAMPLE, folder / "model").split(" ", 1) for device in ("cpu", "cuda")
    )
    assert (cpu[0], gpu[0]) == ("cpu", "cuda") and cpu[1] == gpu[1]
