"""The questions of exercises/README.md, answered. Try before you read."""

from argparse import Namespace
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from test_placement import rollout_of
from torch.testing import assert_close

from t2g.align import SENTENCE_OR_LINE, locate, resolve, span_rewards, steps, token_offsets
from t2g.critics import rule_critic
from t2g.feedback import Feedback
from t2g.ppo import (
    gae,
    kl_penalty,
    policy_loss,
    sampled_logprobs,
    value_loss,
    vocabulary_logprobs,
    whiten,
)
from t2g.rewards import place_rewards
from train_ppo import check_first_ratio

TEXT = "Ana is 27, lives in Porto."  # eight tokens: Ana | is | 27 | , | lives | in | Porto | .
OFFSETS = [(0, 3), (3, 6), (6, 9), (9, 10), (10, 16), (16, 19), (19, 25), (25, 26)]
REWARDS = torch.tensor([[0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0, 0.0]])
EIGHT = torch.ones(1, 8, dtype=torch.bool)


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_exercise_1a_the_advantages_of_the_eight_tokens_by_hand():
    """With V = 0 the praise of Porto reaches back over 27 and nearly cancels its blame."""
    advantages, _ = gae(REWARDS, torch.zeros(1, 8), EIGHT, gamma=1.0, lam=0.95)
    blame = torch.tensor([0.95**2, 0.95, 1, 0, 0, 0, 0, 0])
    praise = torch.tensor([0.95**6, 0.95**5, 0.95**4, 0.95**3, 0.95**2, 0.95, 1, 0])
    assert_close(advantages[0], praise - blame)
    assert advantages[0, 2].item() == pytest.approx(0.95**4 - 1)  # -0.19, of 27

    # A V that expects the praise: what is expected earns no advantage.
    expecting_porto = torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 0]])
    advantages, _ = gae(REWARDS, expecting_porto, EIGHT, gamma=1.0, lam=0.95)
    assert_close(advantages[0], -blame)


def test_exercise_1b_gae_is_a_matrix_of_powers_times_td():
    """A_t = sum over s >= t of (gamma lam)^(s - t) TD_s."""
    gamma, lam, values = 0.9, 0.8, noise(1, 1, 8)
    following = torch.cat([values[:, 1:], torch.zeros(1, 1)], dim=1)
    td = REWARDS + gamma * following - values
    t = torch.arange(8)
    powers = ((gamma * lam) ** (t[None, :] - t[:, None])).triu()
    assert_close(gae(REWARDS, values, EIGHT, gamma, lam)[0][0], powers @ td[0])


def test_exercise_2_whitening_keeps_the_direction_up_to_one_push_on_all_tokens():
    """grad(whitened) = (grad(A) - mean(A) grad(1)) / std(A): a learning rate and an equal push."""
    advantages = gae(REWARDS, torch.zeros(1, 8), EIGHT, 1.0, 0.95)[0]
    logprobs = noise(2, 1, 8).requires_grad_()

    def gradient(advantages):
        loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, EIGHT, cliprange=0.2)
        return torch.autograd.grad(loss, logprobs)[0]

    mean, std = advantages.mean(), advantages.std(correction=0)
    whitened, one_push = gradient(whiten(advantages, EIGHT)), gradient(torch.ones(1, 8))
    assert_close(whitened, (gradient(advantages) - mean * one_push) / std)
    assert advantages[0, 7] == 0 and whitened[0, 7] > 0, "the full stop falls uncriticised"


def test_exercise_3_the_first_ratio_tells_whether_log_pi_is_computed_in_one_way():
    """Sampled at temperature 0.6 and scored at 1, the ratio is not 1 before any step."""
    response, logits = torch.tensor([[3, 1, 4, 1, 5, 2, 6, 5]]), 3 * noise(3, 1, 8, 10)
    old = sampled_logprobs(vocabulary_logprobs(logits, 0.6), response)

    same = sampled_logprobs(vocabulary_logprobs(logits, 0.6), response)
    check_first_ratio((same - old).abs().mean().item(), bf16=False)
    assert policy_loss(same, old, REWARDS, EIGHT, cliprange=0.2)[1]["clipfrac"] == 0

    other = sampled_logprobs(vocabulary_logprobs(logits, 1.0), response)
    assert policy_loss(other, old, torch.ones(1, 8), EIGHT, cliprange=0.2)[1]["clipfrac"] > 0
    with pytest.raises(RuntimeError, match="first ratio"):
        check_first_ratio((other - old).abs().mean().item(), bf16=False)


def test_exercise_4_k3_is_never_negative_and_its_mean_over_the_vocabulary_is_the_kl():
    """k3 = x - 1 - log x >= 0 with x = pi_ref / pi, since log is concave; E_pi[x - 1] = 0."""
    pi, ref = noise(4, 2, 50).log_softmax(-1)
    k1, k3 = kl_penalty(pi, ref, "k1"), kl_penalty(pi, ref, "k3")  # for each token of 50
    assert (k3 >= 0).all() and (k1 < 0).any()
    exact = kl_penalty(pi[None, None], ref[None, None], "full")[0, 0]
    assert_close((pi.exp() * k3).sum(), exact)
    assert_close((pi.exp() * k1).sum(), exact)


def test_exercise_5_process_rewards_are_the_sums_of_segments(tokenizer):
    """prm puts the sum of each sentence on its last token; scalar puts the total on the last."""
    text = "Ana is 27. Ana lives in Porto."
    rollout = rollout_of(tokenizer, [text], [True])
    ids = rollout.ids(0)
    critique = "The age is 41. The name and the city are right."
    feedback = Feedback(critique, good=["Ana", " Porto"], poor=[" 27"])
    offsets = token_offsets(tokenizer, ids)
    delta = span_rewards(offsets, resolve(text, feedback)[0])

    number = torch.tensor(steps(offsets, text))
    expected = torch.zeros(len(ids))
    for n in number.unique():
        expected[(number == n).nonzero()[-1]] = delta[number == n].sum()

    def placed(reward):
        task = Namespace(STEP_END=SENTENCE_OR_LINE)
        args = Namespace(reward=reward, missing_eos_penalty=0.0)
        return place_rewards(delta[None], tokenizer, rollout, task, args)[0]

    assert_close(placed("prm"), expected)
    assert expected.count_nonzero() == 1  # Ana + 27 = 0 in the first sentence, Porto = 1
    assert_close(placed("span"), delta)
    assert_close(placed("scalar"), torch.tensor([0.0] * (len(ids) - 1) + [1.0]))


def test_exercise_6_a_span_that_cuts_a_token_marks_the_whole_token():
    """A token is rewarded if it shares a character with a span; poor wins over good."""
    assert locate(TEXT, "7, l") == [(8, 12)]  # from inside " 27" to inside " lives"
    spans, _ = resolve(TEXT, Feedback("Not 7.", good=["is 2"], poor=["7, l"]))
    assert span_rewards(OFFSETS, spans).tolist() == [0, 1, -1, -1, -1, 0, 0, 0]


def test_exercise_7_a_split_into_microbatches_changes_nothing_and_a_mean_of_means_would():
    """With the token count of the minibatch in every microbatch, the losses add up."""
    mask = torch.arange(8) < torch.tensor([8, 2, 5])[:, None]
    new, old, target = noise(7, 3, 3, 8) * 0.3 * mask
    for loss in (policy_loss, value_loss):
        whole, _ = loss(new, old, target, mask, 0.2)
        parts = [[tensor[rows] for tensor in (new, old, target, mask)] for rows in ([0], [1, 2])]
        assert_close(sum(loss(*part, 0.2, token_count=mask.sum())[0] for part in parts), whole)
        assert abs(sum(loss(*part, 0.2)[0] for part in parts) / 2 - whole) > 1e-3


def critique(example, response):
    counts = Counter(response.rstrip(".").split())
    twice = [word for word, n in counts.items() if n > 1]
    return Feedback(f"It repeats {', '.join(twice) or 'nothing'}.", good=[], poor=twice)


def test_exercise_8_a_critic_is_a_function_that_quotes(tokenizer):
    """A repeated word is blamed where it is repeated, because a poor quote marks its last place."""
    text = "Ana lives in Porto, lives in Lyon."
    ids = tokenizer.encode(text, add_special_tokens=False)
    [feedback] = rule_critic(SimpleNamespace(critique=critique))([None], [text])
    assert Feedback.parse(feedback.render()) == feedback and feedback.poor == ["lives", "in"]
    delta = span_rewards(token_offsets(tokenizer, ids), resolve(text, feedback)[0])
    tokens = "".join(f"{tokenizer.decode([i])}({d:.0f})" for i, d in zip(ids, delta))
    expected = "Ana(0) lives(0) in(0) Porto(0),(0) lives(-1) in(-1) Lyon(0).(0)"
    assert tokens == expected
