"""The benches of a step in short, on a model of a few small layers."""

import json

import pytest

from extras.speed import step, synthetic
from t2g import policy
from t2g.chat import turn_edges

OURS = dict(rollout=1.0, critique=0.0, score=2.0, update=4.0, shift=1.0, step=8.0, memory=2.0)
CHATML = "{% for m in messages %}<|user|>{{ m.content }}END{% endfor %}<|assistant|>"
PEER = dict(rollout=3.0, update=12.0, step=16.0, memory=4.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    synthetic.random_model("tiny", folder, vocab_size=100_000)  # so that hardly any response ends
    return folder


def test_ratios_are_medians_over_turns_of_the_peers_seconds_by_ours():
    turns = [OURS, OURS | {"step": 4.0}, OURS | {"step": 8.0}]
    medians = step.summary(turns, [PEER] * 3)
    assert medians["step"] == 8.0 and medians["step_ratio"] == 2.0
    assert medians["rollout_ratio"] == 3.0 and medians["memory_ratio"] == 0.5
    assert medians["update_ratio"] == 2.0, "the peer's update contains what we count as score"
    assert "step_ratio" not in step.summary(turns)


@pytest.mark.parametrize("end_of_turn", ["<|end|>", "<|pad|>"])
def test_the_work_never_ends_a_response(folder, tmp_path, end_of_turn):
    tokenizer, model = policy.load(folder)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(end_of_turn)
    tokenizer.chat_template = CHATML.replace("END", end_of_turn)
    policy.save(model, tokenizer, tmp_path, 1)
    tokenizer, _ = step.prepare(tmp_path, tmp_path / "checkpoint-1")
    work = json.loads((tmp_path / "work.json").read_text())
    assert len(work["prompts"]) == step.ROWS
    assert work["special_tokens"]["eos_token"] == tokenizer.eos_token != end_of_turn
    again, model = policy.load(tmp_path / "model")
    assert policy.eos_ids(again, model) == [tokenizer.eos_token_id] == [turn_edges(again)[1]]


def test_our_step_has_seconds_of_each_phase(folder, tmp_path):
    step.prepare(tmp_path, folder)
    ours = step.run_ours(tmp_path, 2, new=8)
    assert list(ours) == list(step.METRICS) and min(ours.values()) > 0
    phases = [ours[phase] for phase in ("rollout", "score", "update", "shift")]
    assert sum(phases) == pytest.approx(ours["step"], rel=0.2), "the critic's seconds are missing"
