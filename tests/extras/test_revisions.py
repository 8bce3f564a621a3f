"""Revisions: how responses are sampled and scored, reflection, and ILF."""

import argparse
import random

import pytest
import torch
from forking import output, result_of
from toys import noisy_examples

from extras.baselines import common, ilf, reflection
from t2g.align import token_offsets
from t2g.feedback import Feedback, revision_prompt
from t2g.rollout import sample
from t2g.tasks import toy


def test_the_reward_of_a_sample_is_the_sum_of_its_token_rewards(fresh):
    tokenizer, model = fresh()
    examples = [example for example, _ in noisy_examples(random.Random(0), 3)]
    prompts = [example.prompt for example in examples]
    args = argparse.Namespace(response_length=6, temperature=1.0, bf16=False)
    args.missing_eos_penalty, args.span_weights = 0.25, "uniform"

    def critic(examples, texts):
        return [Feedback("All.", [], [text]) if text.strip() else None for text in texts]

    torch.manual_seed(0)
    rows, stats = common.sample_and_score(examples, critic, tokenizer, model, args, size=2)
    torch.manual_seed(0)
    rollouts = [sample(model, tokenizer, part, 6) for part in (prompts[:2], prompts[2:])]
    assert [row.text for row in rows] == [text for rollout in rollouts for text in rollout.texts]
    assert [row.example for row in rows] == examples and stats["samples"] == 3
    ids = [rollout.ids(b) for rollout in rollouts for b in range(len(rollout))]
    for row, tokens in zip(rows, ids):
        first, last = len(row.text) - len(row.text.lstrip()), len(row.text.rstrip())
        offsets = token_offsets(tokenizer, tokens)
        poor = sum(max(start, first) < min(end, last) for start, end in offsets)
        assert row.reward == -poor - 0.25 * (not row.finished) and poor > 1
    assert stats["response_tokens"] == pytest.approx(sum(map(len, ids)) / 3)


def test_a_response_is_revised_after_its_critique_and_stays_without_one(fresh, monkeypatch):
    tokenizer, model = fresh()
    calls, answers = [], [["Ana is 27.", "Bo."], ["better"]]

    def answer(model, tokenizer, prompts, response_length, **sampling):
        calls.append(prompts)
        return [*answers[len(calls) - 1]], [len(calls) == 2] * len(prompts)

    monkeypatch.setattr(reflection, "respond", answer)
    examples = [toy.make_example(random.Random(n)) for n in range(2)]
    feedback, prompts = Feedback("The age is 41.", [], [" 27"]), [e.prompt for e in examples]
    options = dict(examples=examples, critic=lambda *_: [feedback, None])
    texts, finished = reflection.reflect(model, tokenizer, prompts, 8, **options)
    assert texts == ["better", "Bo."] and finished == [True, False]
    assert calls == [prompts, [revision_prompt(prompts[0], "Ana is 27.", feedback)]]
    for part in (prompts[0], "Ana is 27.", "The age is 41."):
        assert part in calls[1][0]
    calls.clear()
    texts, _ = reflection.reflect(model, tokenizer, prompts, 10**9, **options)
    assert texts == ["Ana is 27.", "Bo."] and calls[1] == [], "no critique leaves room for as much"


def test_reflection_measures_the_revisions(untrained, monkeypatch):
    def perfect(model, tokenizer, prompts, response_length, examples, critic, **sampling):
        return [example.reference for example in examples], [True] * len(examples)

    monkeypatch.setattr(reflection, "reflect", perfect)
    flags = "--critic rule --eval_samples 2 --response_length 4"
    printed = output(f"extras.baselines.reflection {untrained} {flags}")
    scores = result_of(printed)[str(untrained)]
    for name in ("perfect", "perfect_greedy", "eos_rate", "eos_rate_greedy"):
        assert scores[name] == 1


def scored(text, reward, prompt="p", finished=True):
    example = toy.Example(prompt, "", {})
    return common.Scored(example, text, finished, Feedback("Well."), reward)


def test_the_best_revision_of_a_prompt_is_kept_unless_it_is_worse_than_its_response(capsys):
    first = [scored("a", 1), scored("b", 0), scored("c", 3), scored("d", 0, "q")]
    second = [scored("a2", 1), scored("b2", 2), scored("c2", 2), scored("d2", 9, "q", False)]
    first.append(scored("e", 0, "r"))
    second.append(scored("e2", None, "r"))
    assert ilf.best_revisions(first, second) == [("p", "b2")]
    with pytest.raises(SystemExit):
        ilf.best_revisions(first[2:], second[2:])
