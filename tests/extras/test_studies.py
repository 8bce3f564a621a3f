"""The studies' own commands: details of the official code, and what a healthy run looks like."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forking import output, result_of
from safetensors.torch import load_file

import train_ppo
from extras.studies import deviations, rule_check
from t2g.log import read_json
from t2g.notes import write_whole

ROOT = Path(__file__).parents[2]
PATCHED = ("parse_args", "sample", "whiten", "gae", "token_rewards", "policy_loss", "value_loss")


SHORT = "--critic rule --max_steps 1 --num_ppo_epochs 1 --response_length 24 --eval_samples 1"
SHORT += " --per_device_train_batch_size 16"


@pytest.fixture(scope="module")
def flags(untrained, tmp_path_factory):
    """The flags of a step of an untrained policy, up to its folder; plain is a step of train_ppo."""
    flags = f"{SHORT} --policy {untrained} --output_dir {tmp_path_factory.mktemp('steps')}"
    output(f"train_ppo {flags}/plain")
    return flags


def weights(folder):
    return load_file(folder / "checkpoint-1" / "model.safetensors")


@pytest.mark.parametrize("detail", [detail.__name__ for detail in deviations.DETAILS])
def test_each_detail_changes_a_step_of_training(detail, flags, monkeypatch):
    folder = Path(flags.split()[-1])
    for name in PATCHED:
        monkeypatch.setattr(train_ppo, name, getattr(train_ppo, name))
    output(f"extras.studies.deviations {detail} {flags}/{detail}")
    plain, changed = weights(folder / "plain"), weights(folder / detail)
    assert any((plain[name] != changed[name]).any() for name in plain)
    assert read_json(folder / detail / "config.json")["detail"] == detail


def test_healthy_prints_a_table_and_draws_the_curves(tmp_path):
    for run, level in (("a", 1.0), ("b", 3.0)):
        (tmp_path / run).mkdir()
        row = dict(response_tokens=10, reward=level)
        rows = [row | {"step": n, "kl": level * n} for n in range(1, 13)]
        write_whole(tmp_path / run / "metrics.jsonl", rows)
    a, b, plot = (tmp_path / name for name in ("a", "b", "plot.png"))
    printed = output(f"extras.studies.healthy {a} {b} --beside alone {a} --plot {plot}")
    result = result_of(printed)
    both, alone = result["healthy: step 1 → 10 → 12"], result["alone: step 1 → 10 → 12"]
    assert both["kl"] == [2.0, 20.0, 24.0] and alone["kl"] == [1.0, 10.0, 12.0]
    assert "| `kl` | 2.00 → 20.00 → 24.00 | 1.00 → 10.00 → 12.00 |" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_rule_check_compares_rewards_with_silence_and_with_scores(tmp_path, untrained):
    flags = f"--critic rule --policy {untrained} --num_prompts 2 --samples_per_prompt 2"
    flags += f" --response_length 8 --output_dir {tmp_path}/check"
    result = result_of(output(f"extras.studies.rule_check {flags}"))
    assert result["rewards"]["silence"] == 0 and result["rewards"]["references"] > 4
    scores = [{"up": x, "down": -x} for x in (1, 2, 3, 2, 1, 3)]
    table = rule_check.agree(np.array([0.0, 5, 9, -2, -3, 1]), scores, 3)
    assert table["up"]["correlation"]["mean"] == 1 and table["down"]["correlation"]["mean"] == -1
    assert table["up"]["of the best"] == 3 and table["up"]["of the worst"] == 1


def test_ctrl_c_during_the_imports_leaves_no_traceback(tmp_path):
    for package in ("torch", "numpy"):
        (tmp_path / f"{package}.py").write_text("raise KeyboardInterrupt")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "extras.baselines.dpo"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted")
