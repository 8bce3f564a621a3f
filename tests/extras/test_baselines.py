"""Rewards by step, second tries and imitation of revisions: the baselines that use the same feedback in other ways."""

import argparse
import json
import random
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import extras.baselines.ilf as train_ilf
import train_ppo
from extras.baselines import offline
from extras.baselines.reflection import evaluate, revise
from t2g.align import SENTENCE_OR_LINE, steps, token_offsets
from t2g.feedback import Feedback, revision_prompt
from t2g.log import read_jsonl
from t2g.rollout import Rollout, sample
from t2g.tasks import toy


@pytest.fixture(scope="module")
def tiny():
    """The toy's tokenizer and a model of it that has learnt nothing."""
    torch.manual_seed(0)
    tokenizer, model = toy.new_model(0)
    return tokenizer, model.eval()


def rollout_of(tokenizer, texts, finished=None):
    """A rollout with these responses, EOS behind those that are finished."""
    finished = finished or [True] * len(texts)
    rows = [
        tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] * end
        for text, end in zip(texts, finished)
    ]
    response = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True
    )
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones(len(row)) for row in rows], batch_first=True
    ).bool()
    return Rollout(response[:, :1], mask[:, :1], response, mask, torch.tensor(finished), texts)


def placed(tokenizer, rollout, delta, reward, step_end=SENTENCE_OR_LINE, missing_eos_penalty=0.0):
    args = argparse.Namespace(reward=reward, missing_eos_penalty=missing_eos_penalty)
    return train_ppo.place(delta, tokenizer, rollout, step_end, args)


TEXT = "Ana is 41.\nShe bakes bread! She lives in Porto"


def test_a_reward_by_step_stands_on_the_last_token_of_each_sentence_or_line(tokenizers):
    tokenizer = tokenizers["byte_level"]
    rollout = rollout_of(tokenizer, [TEXT])
    offsets = token_offsets(tokenizer, rollout.response[0].tolist())
    delta = torch.ones(rollout.mask.shape)
    rewards = placed(tokenizer, rollout, delta, "prm")[0]
    ends = [TEXT.index("\n") + 1, TEXT.index("!") + 1, len(TEXT)]
    assert [offsets[t][1] for t in rewards.nonzero()[:, 0].tolist()] == [
        ends[0],
        ends[1],
        len(TEXT),
    ]
    assert rewards[-1] > 0, "the last step ends with EOS"
    assert rewards.sum() == delta.sum()


@given(st.data())
def test_however_rewards_are_placed_their_sum_is_that_of_delta_and_scalar_and_span_are_the_ends_of_prm(
    tokenizers, data
):
    tokenizer = tokenizers[data.draw(st.sampled_from(list(tokenizers)))]
    texts = data.draw(st.lists(st.text("ab.! \n", min_size=1, max_size=20), min_size=1, max_size=3))
    rollout = rollout_of(
        tokenizer,
        texts,
        [data.draw(st.booleans()) for _ in texts] if all(t.strip() for t in texts) else None,
    )
    seed = data.draw(st.integers(0, 99))
    delta = (
        torch.randint(
            -1, 2, rollout.mask.shape, generator=torch.Generator().manual_seed(seed)
        ).float()
        * rollout.mask
    )
    if not rollout.mask.any(1).all():
        return
    rewards = {
        reward: placed(tokenizer, rollout, delta, reward) for reward in ("span", "prm", "scalar")
    }
    for found in rewards.values():
        assert torch.equal(found.sum(1), delta.sum(1)) and not (found * ~rollout.mask).any()
    assert torch.equal(rewards["span"], delta)
    last = rollout.mask.sum(1) - 1
    assert torch.equal(rewards["scalar"].gather(1, last[:, None])[:, 0], delta.sum(1))
    assert torch.equal(
        placed(tokenizer, rollout, delta, "prm", step_end="$^"), rewards["scalar"]
    ), "a text without an end is one step"


def test_a_token_that_ends_several_steps_makes_one_step(tokenizers):
    assert steps([(0, 4), (4, 5)], "\n\n\n\na", r"\n") == [0, 1]


def test_a_missing_eos_costs_at_the_end_under_each_reward(tokenizers):
    tokenizer = tokenizers["byte_level"]
    rollout = rollout_of(tokenizer, [TEXT, "Ana."], [False, True])
    for reward in ("span", "prm", "scalar"):
        found = placed(
            tokenizer, rollout, torch.zeros(rollout.mask.shape), reward, missing_eos_penalty=2.0
        )
        assert (
            found.nonzero().tolist() == [[0, int(rollout.mask[0].sum()) - 1]] and found.min() == -2
        )


def test_the_steps_of_the_toy_are_its_clauses():
    text = "Ana is 27, works as a baker, lives in Porto."
    offsets = [(i, i + 1) for i in range(len(text))]
    assert "".join(map(str, steps(offsets, text, toy.STEP_END))) == "0" * 9 + "1" * 18 + "2" * 17


def test_a_learned_number_is_the_reward_of_the_last_token(tokenizers):
    tokenizer = tokenizers["byte_level"]
    rollout = rollout_of(tokenizer, [TEXT, "Ana.", "Bo."])
    args = argparse.Namespace(span_weights="uniform")
    delta, quotes = train_ppo.token_rewards(tokenizer, rollout, [1.5, None, -0.5], args)
    last = rollout.mask.sum(1) - 1
    assert (
        delta.gather(1, last[:, None])[:, 0].tolist() == [1.5, 0, -0.5]
        and delta.abs().sum() == 2
        and not any(quotes.values())
    )


# ---- second tries ------------------------------------------------------------------------------------------------------


def test_a_revision_is_asked_for_with_the_critique_and_where_there_is_none_the_first_try_stays(
    tiny, monkeypatch
):
    tokenizer, model = tiny
    asked = []

    def answer(model, tokenizer, prompts, response_length, **sampling):
        asked.extend(prompts)
        return [f"better {len(asked)}"] * len(prompts), [False] * len(prompts)

    monkeypatch.setattr("extras.baselines.reflection.respond", answer)
    examples = [toy.make_example(random.Random(n)) for n in range(2)]
    said = Feedback("The age is 41.", [], [" 27"])
    texts, finished = revise(
        model, tokenizer, examples, ["Ana is 27.", "Bo."], lambda *_: [said, None], 8
    )
    assert texts == ["better 1", "Bo."] and finished == [False, True]
    assert asked == [revision_prompt(examples[0].prompt, "Ana is 27.", said)]
    assert (
        asked[0].startswith(examples[0].prompt)
        and "Ana is 27." in asked[0]
        and "The age is 41." in asked[0]
    )


def test_the_toy_s_revisions_mend_what_the_critique_names_and_nothing_else():
    rng = random.Random(1)
    for _ in range(200):
        example = toy.make_example(rng)
        response = toy.noisy_summary(example, rng)
        remarks = toy.judge(example, response)
        assert toy.score(example, toy.revise(response, remarks))["perfect"] == 1
        kept = [remark for remark in remarks if remark.kind == "good" or rng.random() < 0.5]
        left = len(remarks) - len(kept)
        after = toy.judge(example, toy.revise(response, kept))
        assert sum(remark.kind != "good" for remark in after) <= left
        assert toy.revise(response, []) == response


def test_evaluation_with_a_critic_is_of_the_second_try(tiny, monkeypatch):
    tokenizer, model = tiny
    example = toy.make_example(random.Random(0))
    monkeypatch.setattr(
        "extras.baselines.reflection.revise", lambda *_, **__: ([example.reference] * 2, [True] * 2)
    )
    args = argparse.Namespace(response_length=4, seed=0, bf16=False)
    means = evaluate(toy, model, tokenizer, [example] * 2, None, args)
    assert means["perfect"] == means["perfect_greedy"] == means["eos_rate"] == 1


# ---- imitation ---------------------------------------------------------------------------------------------------------


def scored(text, reward, prompt="p", finished=True):
    return offline.Scored(toy.Example(prompt, "", {}), text, finished, Feedback("Well."), reward)


def test_of_a_prompt_the_best_revision_is_learnt_that_is_not_below_what_it_revises():
    first = [
        scored("a", 1),
        scored("b", 0),
        scored("c", 3),
        scored("d", 0, "q"),
        scored("e", 0, "r"),
    ]
    second = [
        scored("a2", 1),
        scored("b2", 2),
        scored("c2", 2),
        scored("d2", 9, "q", finished=False),
        scored("e2", None, "r"),
    ]
    assert train_ilf.best_revisions(first, second) == [("p", "b2")]
    with pytest.raises(SystemExit):
        train_ilf.best_revisions(first[2:], second[2:])


def test_sampled_responses_are_scored_by_the_sum_of_their_token_rewards(tiny):
    tokenizer, model = tiny
    examples = [toy.make_example(random.Random(n)) for n in range(3)]
    args = argparse.Namespace(
        response_length=6, temperature=1.0, bf16=False, missing_eos_penalty=0.0
    )

    def critic(examples, texts):
        return [Feedback("All.", [], [text]) if text.strip() else None for text in texts]

    torch.manual_seed(0)
    rows, stats = offline.sample_and_score(
        examples, [e.prompt for e in examples], critic, tokenizer, model, args, size=2
    )
    torch.manual_seed(0)
    rollouts = [
        sample(model, tokenizer, [e.prompt for e in part], 6)
        for part in (examples[:2], examples[2:])
    ]
    assert [row.text for row in rows] == [text for rollout in rollouts for text in rollout.texts]
    assert [row.example for row in rows] == examples and stats["samples"] == 3
    tokens = [
        int(mask.sum()) - bool(end)
        for rollout in rollouts
        for mask, end in zip(rollout.mask, rollout.finished)
    ]
    assert all(-count <= row.reward < 0 for row, count in zip(rows, tokens))
    assert stats["response_tokens"] == pytest.approx(
        sum(int(rollout.mask.sum()) for rollout in rollouts) / 3
    )


def test_ilf_from_end_to_end(tmp_path, tiny, monkeypatch):
    tokenizer, model = tiny
    model.save_pretrained(tmp_path / "sft"), tokenizer.save_pretrained(tmp_path / "sft")
    flags = [
        "--policy",
        tmp_path / "sft",
        "--critic",
        "rule",
        "--num_prompts",
        4,
        "--response_length",
        5,
    ]
    flags += [
        "--max_steps",
        2,
        "--per_device_train_batch_size",
        2,
        "--output_dir",
        tmp_path / "ilf",
    ]
    monkeypatch.setattr(sys, "argv", ["train_ilf.py", *map(str, flags)])
    monkeypatch.setattr(
        train_ilf,
        "best_revisions",
        lambda first, second: [(row.example.prompt, row.text) for row in second],
    )
    train_ilf.main()
    assert (tmp_path / "ilf" / "checkpoint-2").is_dir() and len(
        read_jsonl(tmp_path / "ilf" / "metrics.jsonl")
    ) == 2
    first, second = json.loads((tmp_path / "ilf" / "sampling.json").read_text())
    assert first["samples"] == 4 and second["prompt_tokens"] > first["prompt_tokens"]
