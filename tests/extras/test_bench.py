"""The benches of a step in short: what their figures are made of, on a model of two small layers."""

import json
import math
import sys

import pytest

from extras.speed import growth, step
from t2g import policy
from t2g.tasks import toy

MACHINE = {"gib": 24.0, "bf16": 0.5, "fp32": 0.2, "bandwidth": 50.0}
SIZES = {"weights": 3_000_000, "head": 1_000_000}
PARTS = dict(
    rollout=1.0, critique=0.0, score=2.0, update=4.0, shift=1.0, step=8.0, memory=2.0, tokens=1000
)
PEERS = dict(rollout=3.0, update=12.0, step=16.0, memory=4.0)


def test_ratios_are_medians_over_turns_of_the_peers_seconds_by_ours():
    turns = [
        [PARTS],
        [PARTS | {"step": 4.0}],
        [PARTS | {"step": 2.0}, PARTS | {"step": 14.0}],
    ]  # steps of 8, 4 and 8 seconds
    found = step.summary("fp32", turns, [[PEERS]] * 3, SIZES, MACHINE)
    assert (
        found["step_ratio"] == 2.0
        and found["rollout_ratio"] == 3.0
        and found["memory_ratio"] == 0.5
    )
    assert (
        found["update_ratio"] == 2.0
    )  # the peer's update holds its forward passes for old log-probabilities and reference
    assert (
        found["seconds"]["step"] == 8.0 and found["tokens_per_second"] == step.ROWS * step.NEW / 8
    )


def test_shares_count_six_flops_a_weight_and_token_and_one_reading_of_the_weights_a_token():
    found = step.summary("fp32", [[PARTS]], None, SIZES, MACHINE)
    flops = 6 * 2e6 * 1000 + 6 * 1e6 * step.ROWS * step.NEW * step.EPOCHS
    assert found["update_mfu"] == pytest.approx(flops / 4.0 / 0.2e12) and "step_ratio" not in found
    assert found["decode_bandwidth"] == pytest.approx(3e6 * 4 * step.NEW / 1.0 / 50e9)
    lora = step.summary("bf16, LoRA", [[PARTS]], None, SIZES, MACHINE)
    assert lora["update_mfu"] == pytest.approx(flops * 2 / 3 / 4.0 / 0.5e12)
    assert lora["decode_bandwidth"] == pytest.approx(found["decode_bandwidth"] / 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer, model = toy.new_model(0)
    return policy.save(model, tokenizer, tmp_path_factory.mktemp("toy"), 0)


def test_growth_ends_with_slopes_and_draws_them(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        growth,
        "SIZES",
        {"response tokens": [8, 16], "responses": [4, 8], "vocabulary": [512, 1024]},
    )
    monkeypatch.setattr(
        sys, "argv", ["growth", str(folder), "--plot", str(tmp_path / "growth.png")]
    )
    growth.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == set(growth.SIZES) and set(result["responses"]) == set(growth.PARTS)
    for row in (row for parts in result.values() for row in parts.values()):
        (small, before), (large, after) = row["seconds"].items()
        assert int(large) == 2 * int(small) and row["slope"] == pytest.approx(
            math.log2(after / before)
        )
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_a_slope_of_one_is_linear():
    assert (
        growth.slope({32: 0.5, 64: 1.0, 128: 4.0}) == 2.0
        and growth.slope({32: 0.5, 64: 1.0}) == 1.0
    )


def test_the_work_never_ends_a_response(folder, tmp_path):
    tokenizer, _ = step.prepare(tmp_path, folder)
    work = json.loads((tmp_path / "work.json").read_text())
    assert (
        len(work["prompts"]) == step.ROWS
        and work["special_tokens"]["eos_token"] == tokenizer.eos_token
    )
    again, reloaded = policy.load(tmp_path / "model")
    assert again.eos_token == tokenizer.eos_token and tokenizer.eos_token_id in policy.eos_ids(
        again, reloaded
    )
