"""The benches of a step in short, on a model of a few small layers."""

import json
import math
import sys

import pytest

from extras.speed import given, growth, step
from t2g import policy

PARTS = dict(rollout=1.0, critique=0.0, score=2.0, update=4.0, shift=1.0, step=8.0, memory=2.0)
PEER = dict(rollout=3.0, update=12.0, step=16.0, memory=4.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    given.random_model("tiny", folder)
    return folder


def test_ratios_are_medians_over_turns_of_the_peers_seconds_by_ours():
    turns = [PARTS, PARTS | {"step": 4.0}, PARTS | {"step": 8.0}]
    found = step.summary(turns, [PEER] * 3)
    assert found["step"] == 8.0 and found["step_ratio"] == 2.0
    assert found["rollout_ratio"] == 3.0 and found["memory_ratio"] == 0.5
    assert found["update_ratio"] == 2.0, "the peer's update holds what we count as score"
    assert "step_ratio" not in step.summary(turns)


def test_the_work_never_ends_a_response(folder, tmp_path):
    tokenizer, _ = step.prepare(tmp_path, folder)
    work = json.loads((tmp_path / "work.json").read_text())
    assert len(work["prompts"]) == step.ROWS
    assert work["special_tokens"]["eos_token"] == tokenizer.eos_token
    again, model = policy.load(tmp_path / "model")
    assert again.eos_token == tokenizer.eos_token
    assert tokenizer.eos_token_id in policy.eos_ids(again, model)


def test_growth_ends_with_seconds_and_slopes(folder, monkeypatch, capsys):
    sizes = {"response tokens": [8, 16], "responses": [4, 8], "vocabulary": [512, 1024]}
    monkeypatch.setattr(growth, "SIZES", sizes)
    monkeypatch.setattr(sys, "argv", ["growth", str(folder)])
    growth.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == set(sizes)
    assert set(result["responses"]) == {"rollout", "score", "update", "shift"}
    for row in (row for parts in result.values() for row in parts.values()):
        before, after = row["seconds"].values()
        assert row["slope"] == pytest.approx(math.log2(after / before))
