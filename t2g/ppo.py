"""The maths of PPO with token rewards, as pure functions on tensors (Text2Grad, sec. 3.4).

One index convention holds everywhere: a (B, T) tensor is indexed by the response token t.

    | tensor         | at t                                                                    |
    |----------------|-------------------------------------------------------------------------|
    | logprobs[:, t] | log pi(response[:, t] | prompt, response[:, :t]), in nats                |
    | values[:, t]   | V of the state before token t; V after the last token is 0              |
    | rewards[:, t]  | the reward for emitting token t                                         |
    | mask[:, t]     | True up to and including EOS; other places are 0 and ignored            |

Losses are sums over tokens divided by `token_count`. With the count of the whole minibatch, over
all ranks, no split into microbatches changes the step.
"""

import torch


def masked_mean(x, mask):
    """The mean of x over the mask; 0 if the mask is empty."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def masked_variance(x, mask):
    """The variance of x over the mask, divided by n and not by n - 1."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x, mask):
    """x shifted and scaled to masked mean 0 and masked variance 1, 0 off the mask.

    A constant x becomes 0.
    """
    exact = x.double()  # in fp32 the scale would blow up rounding errors of a nearly constant x
    centred = torch.where(mask, exact - masked_mean(exact, mask), 0.0)
    return (centred * torch.rsqrt(masked_variance(exact, mask) + 1e-8)).to(x.dtype)


def vocabulary_logprobs(logits, temperature=1.0):
    """log p(v) = l[v] - log sum_u exp l[u], l = logits / temperature; (..., V), in nats, fp32."""
    return (logits.float() / temperature).log_softmax(-1)


def sampled_logprobs(log_p, response):
    """log pi(y_t) (..., T) of the sampled tokens y from log p (..., T, V)."""
    return log_p.gather(-1, response[..., None])[..., 0]


def entropies(log_p):
    """H = -sum_v p(v) log p(v) (...) in nats from log p (..., V); an impossible token adds 0."""
    finite = log_p.clamp(min=torch.finfo(log_p.dtype).min)
    return -(finite.exp() * finite).sum(-1)


def kl_penalty(logprobs, ref_logprobs, kind):
    """KL(pi || pi_ref) at each token in nats, estimated from the sampled token, or exact.

        k1    log pi - log pi_ref                   unbiased, of either sign
        k2    (log pi - log pi_ref)^2 / 2           biased, low variance
        k3    pi_ref / pi - 1 - log(pi_ref / pi)    unbiased, never negative
        abs   |log pi - log pi_ref|
        full  sum_v pi(v) (log pi(v) - log pi_ref(v))

    Source: Schulman, "Approximating KL divergence", 2020.
    Args: (B, T) log-probabilities of the sampled tokens; for "full" (B, T, V) log-softmaxes.
    Returns: (B, T). Raises: ValueError for another kind.
    """
    log_ratio = logprobs - ref_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio**2 / 2
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    if kind == "abs":
        return log_ratio.abs()
    if kind == "full":
        terms = logprobs.exp() * log_ratio
        return terms.masked_fill(logprobs == -torch.inf, 0).sum(-1)
    raise ValueError(f"unknown KL estimator {kind!r}: use k1, k2, k3, abs or full")


class AdaptiveKL:
    """Steers the KL coefficient so that the KL of a response stays near a target.

        e = clip(kl / target - 1, -0.2, 0.2)        value <- value (1 + e n / horizon)

    kl is in nats per response, n the number of readable responses of the step. Without a target
    the coefficient is fixed. Source: Ziegler et al. 2019, sec. 2.2.
    """

    def __init__(self, init, target=None, horizon=10000):
        self.value, self.target, self.horizon = init, target, horizon

    def update(self, kl, n):
        if self.target is None:
            return
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n / self.horizon


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation over response tokens.

        TD_t = r_t + gamma V_{t+1} - V_t            V after the last token is 0
        A_t  = TD_t + gamma lam A_{t+1}             Schulman et al. 2016, eq. 16

    Args: rewards (B, T), values (B, T), mask (B, T) bool, a prefix of each row.
    Returns: advantages (B, T) and returns = advantages + values, both 0 off the mask.
    Raises: ValueError if the shapes differ or the mask is not a prefix.

    >>> r, mask = torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> gae(r, torch.zeros(1, 2), mask, gamma=1.0, lam=0.95)[0]
    tensor([[0.9500, 1.0000]])
    """
    if not rewards.shape == values.shape == mask.shape:
        shapes = f"rewards {rewards.shape}, values {values.shape}, mask {mask.shape}"
        raise ValueError(f"shapes differ: {shapes}")
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("the mask must be a prefix of each row: True up to EOS, False after it")
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        td = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = next_advantage = td + gamma * lam * next_advantage
        next_value = values[:, t]
    return advantages, advantages + values


def policy_loss(logprobs, old_logprobs, advantages, mask, cliprange, token_count=None):
    """PPO's clipped loss (Schulman et al. 2017, eq. 7), to be minimised.

        rho_t = pi(y_t) / pi_old(y_t)
        loss  = - sum_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) / token_count

    Args: (B, T) tensors; eps = cliprange; token_count, by default the size of the mask.
    Returns: the loss, and statistics that add up over microbatches: "approx_kl", k3 of the old
    policy against this one, and "clipfrac", the share of tokens where the clip binds.
    """
    count = mask.sum().clamp(min=1) if token_count is None else token_count
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = torch.where(mask, torch.maximum(plain, clipped), 0.0).sum() / count
    with torch.no_grad():
        approx_kl = (ratio - 1 - log_ratio).sum() / count
        clipfrac = ((clipped > plain) & mask).sum() / count
    return loss, {"approx_kl": approx_kl, "clipfrac": clipfrac}


def value_loss(values, old_values, returns, mask, cliprange_value, token_count=None):
    """Half the squared error of V, with V clipped to stay near its old values.

        clipped_t = V_old + clip(V_t - V_old, -eps, eps)
        loss   = sum_t max((V_t - G_t)^2, (clipped_t - G_t)^2) / (2 token_count)

    Args: (B, T) tensors, G the returns; eps = cliprange_value; token_count as in policy_loss.
    Returns: the loss, and "value_clipfrac", the share of tokens where the clip binds.
    """
    count = mask.sum().clamp(min=1) if token_count is None else token_count
    # Unlike V_old + clip(V - V_old), this clamp returns V to the bit where it does not bind.
    clipped_values = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    plain, clipped = (torch.where(mask, v - returns, 0.0) ** 2 for v in (values, clipped_values))
    loss = torch.maximum(plain, clipped).sum() / (2 * count)
    return loss, {"value_clipfrac": (clipped > plain).sum() / count}
