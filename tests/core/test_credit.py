"""Credit assignment is unbiased: the expected step is the gradient of the expected reward.

Every response of a tiny policy is enumerated, so expectations are sums and both sides are exact. A
policy is a table of logits, one row for each prefix; rows of prefixes of length t are the
parameters of token t alone. The step is that of gae and policy_loss.
"""

import itertools

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.testing import assert_close

from t2g.ppo import gae, kl_penalty, policy_loss

EOS, VOCABULARY, LENGTH = 0, 3, 3


def all_responses() -> list[tuple[int, ...]]:
    """Every response: it ends with EOS, or at LENGTH tokens."""
    found = []
    for length in range(1, LENGTH + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=length):
            ends = tokens[-1] == EOS or length == LENGTH
            if ends and EOS not in tokens[:-1]:
                found.append(tokens)
    return found


RESPONSES = all_responses()
PREFIXES = sorted({tokens[:t] for tokens in RESPONSES for t in range(len(tokens))})
MASK = torch.tensor([[t < len(tokens) for t in range(LENGTH)] for tokens in RESPONSES])


def table_of(value) -> torch.Tensor:
    """(responses, LENGTH): value(tokens, t) at each token of each response, 0 off the mask."""
    rows = []
    for tokens in RESPONSES:
        row = [value(tokens, t) if t < len(tokens) else 0.0 for t in range(LENGTH)]
        rows.append(torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in row]))
    return torch.stack(rows)


class Example:
    """A random policy, causal rewards r(y_<=t), values V(y_<t), and the exact probabilities."""

    def __init__(self, seed):
        rng = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(len(PREFIXES), VOCABULARY, generator=rng, dtype=torch.float64)
        self.logits.requires_grad_()
        state = torch.randn(len(PREFIXES), generator=rng, dtype=torch.float64)
        action = torch.randn(len(PREFIXES), VOCABULARY, generator=rng, dtype=torch.float64)
        self.whole = torch.randn(len(RESPONSES), LENGTH, generator=rng, dtype=torch.float64) * MASK
        self.values = table_of(lambda tokens, t: state[PREFIXES.index(tokens[:t])])
        self.rewards = table_of(lambda tokens, t: action[PREFIXES.index(tokens[:t]), tokens[t]])
        logprobs = self.logits.log_softmax(-1)
        self.logprobs = table_of(lambda tokens, t: logprobs[PREFIXES.index(tokens[:t]), tokens[t]])
        self.probability = self.logprobs.sum(1).exp()

    def gradient(self, objective) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(objective, self.logits, retain_graph=True)
        return gradient

    def expected_step(self, rewards, values, gamma, lam) -> torch.Tensor:
        """E[sum_t A_t grad log pi(y_t)], by the code that trains."""
        advantages, _ = gae(rewards, values, MASK, gamma, lam)
        weighted = self.probability.detach()[:, None] * advantages
        old = self.logprobs.detach()
        loss, _ = policy_loss(self.logprobs, old, weighted, MASK, 0.2, token_count=1)
        return -self.gradient(loss)

    def credit(self, rewards, weight) -> torch.Tensor:
        """The sum over t <= k of weight(k - t) times the gradient of E[r_k] for token t."""
        total = torch.zeros_like(self.logits)
        for k in range(LENGTH):
            gradient = self.gradient((self.probability * rewards[:, k]).sum())
            for row, prefix in enumerate(PREFIXES):
                if len(prefix) <= k:
                    total[row] += weight(k - len(prefix)) * gradient[row]
        return total


@example(seed=0, gamma=1.0, lam=1.0)
@given(seed=st.integers(0, 10**6), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_a_reward_credits_earlier_tokens_less_and_v_adds_bias_below_lambda_1(seed, gamma, lam):
    """r_k credits token t <= k with weight (gamma lam)^(k - t), and V acts as a reward.

    That of reaching the state before token k is gamma (1 - lam) V_k. With gamma = lambda = 1 the
    expected step is therefore the gradient of the expected reward, whatever V is.
    """
    example = Example(seed)
    step = example.expected_step(example.rewards, example.values, gamma, lam)
    of_rewards = example.credit(example.rewards, lambda distance: (gamma * lam) ** distance)

    def weight(distance):  # V of the state before token t is a baseline of token t: no bias
        return gamma * (1 - lam) * (gamma * lam) ** (distance - 1) if distance else 0.0

    assert_close(step, of_rewards + example.credit(example.values, weight))


@given(seed=st.integers(0, 10**6))
def test_a_critic_that_reads_the_whole_response_is_missing_what_tokens_do_to_earlier_rewards(seed):
    """If r_k depends on later tokens, the step lacks E[sum_t (sum_{k<t} r_k) grad log pi(y_t)]."""
    example = Example(seed)
    step = example.expected_step(example.whole, example.values, 1.0, 1.0)
    earlier = example.whole.cumsum(1) - example.whole
    weighted = (example.probability.detach()[:, None] * earlier * MASK).detach()
    missing = example.gradient((weighted * example.logprobs).sum())
    expected_reward = (example.probability * example.whole.sum(1)).sum()
    assert_close(step + missing, example.gradient(expected_reward))


@given(seed=st.integers(0, 10**6))
def test_the_exact_kl_as_a_reward_does_not_pull_its_own_token_back_and_k1_does(seed):
    """Paid as a reward, k1 gives grad KL(pi || ref); "full" lacks E[sum_t grad KL_t] of it."""
    example, rng = Example(seed), torch.Generator().manual_seed(seed + 1)
    logprobs = example.logits.log_softmax(-1)
    reference = torch.randn(logprobs.shape, generator=rng, dtype=torch.float64).log_softmax(-1)
    full, k1 = (kl_penalty(logprobs, reference, kind) for kind in ("full", "k1"))
    full = table_of(lambda tokens, t, kl=full: kl[PREFIXES.index(tokens[:t])])
    k1 = table_of(lambda tokens, t, kl=k1: kl[PREFIXES.index(tokens[:t]), tokens[t]])
    gradient = example.gradient((example.probability * full.sum(1)).sum())
    step_full = example.expected_step(full.detach(), example.values, 1.0, 1.0)
    own = example.gradient((example.probability.detach() * full.sum(1)).sum())
    assert_close(example.expected_step(k1.detach(), example.values, 1.0, 1.0), gradient)
    assert_close(step_full + own, gradient)
    assert own.abs().max() > 1e-6
