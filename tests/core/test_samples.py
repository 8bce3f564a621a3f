"""The samples that a run keeps for its page: its tokens with their numbers, at held-out prompts too."""

from types import SimpleNamespace

import pytest
import torch

import train_ppo
from t2g.feedback import Feedback
from t2g.log import read_jsonl
from t2g.page import Samples, quotes_with_tokens
from t2g.score import Scores


def test_a_quote_knows_the_tokens_that_it_marks():
    text, offsets = "no and no and no", [(0, 2), (2, 6), (6, 9), (9, 13), (13, 16), (16, 16)]
    quotes = ["no", {"text": "no", "severity": 0.5}, "and", "severe"]
    poor = quotes_with_tokens(text, offsets, "poor", quotes)
    assert [quote["tokens"] for quote in poor] == [[2, 4], [2, 4], [3], []], "the last places"
    assert poor[1] == {"text": "no", "severity": 0.5, "tokens": [2, 4]}
    assert quotes_with_tokens(text, offsets, "good", ["and no"])[0]["tokens"] == [1, 2]


ARGS = dict(response_length=12, temperature=1.0, bf16=False, seed=3, span_weights="uniform")


def watch(samples, model, tokenizer, step, critic=lambda *_: [None] * 3, **args):
    """Shows three held-out prompts after a step; values and KL number the tokens."""
    run = SimpleNamespace(args=SimpleNamespace(**ARGS | args), samples=samples, first=1)
    run.heldout = [SimpleNamespace(prompt=f"Post {i}.") for i in range(3)]
    run.tokenizer = tokenizer

    def score(actor, reference, rollout, args):
        places = rollout.mask * torch.arange(1.0, rollout.mask.shape[1] + 1)
        return Scores(None, None, places, places / 100)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ppo, "score", score)
        train_ppo.show_heldout(step, SimpleNamespace(model=model), None, critic, run)
    return read_jsonl(samples.folder / "samples.jsonl")[-3:]


def test_held_out_prompts_meet_the_same_random_numbers_at_each_step(model, tokenizer, tmp_path):
    """They are not the random numbers of the run."""
    samples, state = Samples(tmp_path, 100), torch.get_rng_state()
    rows = [watch(samples, model, tokenizer, step) for step in (0, 1, 2, 100)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [row["step"] for row in rows[2]] == [1] * 3, "step 2 is none of the dozen"
    tokens = [[row["tokens"] for row in part] for part in rows]
    assert tokens[0] == tokens[1] == tokens[3] and rows[0][0]["heldout"]
    assert tokens[0][0] != tokens[0][1], "each response has its own numbers"
    for number, token in enumerate(tokens[0][0], 1):
        assert (token["delta"], token["value"], token["kl"]) == (0, number, number / 100)
    cold = watch(samples, model, tokenizer, 100, temperature=0.01)
    assert cold[0]["tokens"] != tokens[0][0], "sampled at the run's temperature"


def test_a_resumed_run_keeps_what_was_seen_before_its_first_update(model, tokenizer, tmp_path):
    for step in (0, 1, 12):
        watch(Samples(tmp_path, 12, keep_until=step), model, tokenizer, step)
    Samples(tmp_path, 12, keep_until=11)
    assert [row["step"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [0] * 3 + [1] * 3
    Samples(tmp_path, 12)
    assert not read_jsonl(tmp_path / "samples.jsonl")


def test_held_out_responses_are_rewarded_as_those_of_the_run(model, tokenizer, tmp_path):
    def critic(examples, texts):
        severe = Feedback("poor", poor=[{"text": texts[0], "severity": 0.5}])
        return [severe, 0.25, None]

    plain = watch(Samples(tmp_path, 1), model, tokenizer, 0, critic)
    severe = watch(Samples(tmp_path, 1), model, tokenizer, 0, critic, span_weights="severity")
    for rows, reward in ((plain, -1), (severe, -0.5)):
        text, number, unreadable = ([token["delta"] for token in row["tokens"]] for row in rows)
        for token in rows[0]["tokens"]:  # special tokens are no part of the text
            special = token["text"] in tokenizer.all_special_tokens
            assert token["delta"] == (0 if special else reward)
        marked = [t for t, delta in enumerate(text) if delta]
        assert rows[0]["poor"][0]["tokens"] == marked
        assert number == [0] * (len(number) - 1) + [0.25] and set(unreadable) == {0}
    assert [row["critique"] for row in plain] == ["poor", "+0.25", None]
