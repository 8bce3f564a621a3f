"""Where rewards are placed: on the tokens (span), at the end of a step (prm) or of the response."""

import argparse

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t2g.align import SENTENCE_OR_LINE, steps
from t2g.rewards import place_rewards, token_rewards
from t2g.rollout import Rollout
from t2g.tasks import toy

KINDS = ("span", "prm", "scalar")
TEXT = "Ana is 41.\nShe bakes bread! She lives in Porto"


def rollout_of(tokenizer, texts, finished):
    """Returns a rollout of these responses, with EOS after those that are finished."""
    rows = []
    for text, end in zip(texts, finished):
        ids = tokenizer.encode(text, add_special_tokens=False)
        rows.append(torch.tensor(ids + [tokenizer.eos_token_id] * end))
    response = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(response.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return Rollout(response[:, :1], mask[:, :1], response, mask, torch.tensor(finished), texts)


def placed(tokenizer, rollout, delta, reward, step_end=SENTENCE_OR_LINE, penalty=0.0):
    args = argparse.Namespace(reward=reward, missing_eos_penalty=penalty)
    task = argparse.Namespace(STEP_END=step_end)
    return place_rewards(delta, tokenizer, rollout, task, args)


@given(st.data())
def test_placing_keeps_the_sum_of_delta(tokenizers, data):
    tokenizer = tokenizers[data.draw(st.sampled_from(list(tokenizers)))]
    text = st.text("ab.! \n", min_size=1, max_size=20).filter(str.strip)
    texts = data.draw(st.lists(text, min_size=1, max_size=3))
    rollout = rollout_of(tokenizer, texts, [data.draw(st.booleans()) for _ in texts])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    delta = torch.randint(-1, 2, rollout.mask.shape, generator=generator) * rollout.mask.float()
    rewards = {kind: placed(tokenizer, rollout, delta, kind) for kind in KINDS}
    for x in rewards.values():
        assert torch.equal(x.sum(1), delta.sum(1)) and not (x * ~rollout.mask).any()
    assert torch.equal(rewards["span"], delta)
    last = rollout.mask.sum(1, keepdim=True) - 1
    assert torch.equal(rewards["scalar"].gather(1, last)[:, 0], delta.sum(1))
    one_step = placed(tokenizer, rollout, delta, "prm", step_end="$^")
    assert torch.equal(one_step, rewards["scalar"]), "without an end, the text is one step"


def test_steps_are_sentences_or_lines_and_those_of_the_toy_are_clauses():
    for text, sizes, step_end in (
        (TEXT, (11, 16, 19), SENTENCE_OR_LINE),
        ("Ana is 27, works as a baker, lives in Porto.", (9, 18, 17), toy.STEP_END),
    ):
        offsets = [(i, i + 1) for i in range(len(text))]
        assert steps(offsets, text, step_end) == [n for n in range(3) for _ in range(sizes[n])]
    assert steps([(0, 4), (4, 5)], "\n\n\n\na", r"\n") == [0, 1], "a token may end several"


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_eos_is_penalised_on_the_last_token(tokenizers, kind):
    rollout = rollout_of(tokenizers["byte_level"], [TEXT, "Ana."], [False, True])
    delta = torch.zeros(rollout.mask.shape)
    rewards = placed(tokenizers["byte_level"], rollout, delta, kind, penalty=2.0)
    assert rewards.nonzero().tolist() == [[0, int(rollout.mask[0].sum()) - 1]]
    assert rewards.min() == -2


def test_a_number_is_the_reward_of_the_last_token(tokenizers):
    tokenizer = tokenizers["byte_level"]
    rollout = rollout_of(tokenizer, [TEXT, "Ana.", "Bo."], [True] * 3)
    args = argparse.Namespace(span_weights="uniform")
    delta, quotes = token_rewards(tokenizer, rollout, [1.5, None, -0.5], args)
    last = rollout.mask.sum(1, keepdim=True) - 1
    assert delta.gather(1, last)[:, 0].tolist() == [1.5, 0, -0.5]
    assert delta.abs().sum() == 2 and not any(quotes.values())
