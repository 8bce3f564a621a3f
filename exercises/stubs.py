"""Six functions on the way from a critique to a gradient, to be filled in, in this order.

A batch has B responses, padded to T tokens. A tensor of shape (B, T) is indexed by the response
token t, and mask, (B, T) bool, is True up to and including the end of a response. Padding may hold
any number, and changes no result. Leave your arguments as they are.
"""

import torch  # noqa: F401


def resolve(text, feedback):
    """Turns quotes into spans: where in the text stands what the critique talks about?

    feedback.good and feedback.poor are lists of strings. Return a list, in any order, of triples
    (start, end, score): text[start:end] is the quote, and score is 1.0 for good and -1.0 for poor.

    1. A quote that does not stand in the text marks nothing.
    2. White space at the ends of a quote does not belong to its span.
    3. A place that cuts a word or a number in two does not count: "27" does not stand in "1927".
       (The project lets such places count if there are no others; that is not asked for.)
    4. Where a quote stands several times, a good one marks the first place and a poor one the last:
       of a repetition, the second time is at fault. A quote that is given k times marks k places.

    >>> from t2g.feedback import Feedback
    >>> resolve("Ana is 27, not 27 and a half.", Feedback("Once is enough.", ["Ana"], [" 27"]))
    [(0, 3, 1.0), (15, 17, -1.0)]
    """
    raise NotImplementedError("resolve")


def span_rewards(offsets, spans):
    """Turns spans of characters into delta, one reward per token.

    offsets holds one range of characters [start, end) per token, in order. spans are triples as
    resolve returns them, with scores in [-1, 1]. Return a float32 tensor of shape (T,).

    A token gets the lowest score of all spans that share a character with it, and 0 if none does.
    A span may begin or end inside a token. A token with an empty range, such as [7, 7) for <|end|>,
    shares no character with any. By hand: token 0 is praised, and token 1 is praised and blamed.

    >>> span_rewards([(0, 3), (3, 6), (6, 9)], [(0, 5, 1.0), (4, 6, -1.0)]).tolist()
    [1.0, -1.0, 0.0]
    """
    raise NotImplementedError("span_rewards")


def kl_penalty(logprobs, ref_logprobs, kind):
    """Estimates at each token how far the policy pi has moved away from its reference pi_ref.

    For "k1", "k2" and "k3" the arguments are log-probabilities of the sampled tokens, (B, T). With
    x = pi_ref / pi, the estimators are k1 = -log x, k2 = (log x)^2 / 2 and k3 = x - 1 - log x.
    Under pi, k1 and k3 have the KL as their mean; only k1 can be negative.

    For "full" they are log-softmaxes, (B, T, V), and the result is the KL itself: the mean of
    log pi - log pi_ref under pi. A token whose log pi is -inf is never sampled, and adds 0.

    Return (B, T), in nats. By hand: pi is 1/2 and pi_ref is 1/4.

    >>> half, quarter = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    >>> [round(kl_penalty(half, quarter, kind).item(), 3) for kind in ("k1", "k2", "k3")]
    [0.693, 0.24, 0.193]
    """
    raise NotImplementedError("kl_penalty")


def gae(rewards, values, mask, gamma, lam):
    """Spreads rewards back over the tokens that led to them (generalised advantage estimation).

    values[:, t] is what the value head expects *before* token t. A token's surprise is its reward
    plus what is expected next (times gamma) minus what was expected:

        TD_t = r_t + gamma V_{t+1} - V_t        A_t = sum over s >= t of (gamma lam)^(s - t) TD_s

    A response ends with its last token: V is 0 after it, and no credit comes from beyond.

    Return two (B, T) tensors, both 0 off the mask: the advantages A, and the returns A + V, which
    the value head learns to predict. By hand: TD_1 = 1 + 0 - 1 = 0, because the praise was
    expected, and TD_0 = 0 + 1 - 1/4, because at token 0 it was not.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.25, 1.0]])
    >>> gae(rewards, values, torch.tensor([[True, True]]), gamma=1.0, lam=0.5)[0]
    tensor([[0.7500, 0.0000]])
    """
    raise NotImplementedError("gae")


def whiten(x, mask):
    """Shifts and scales x so that the tokens of the batch have mean 0 and variance 1.

    Mean and variance are those of all tokens under the mask, over all rows together; the variance
    is divided by n, not by n - 1. With 1e-8 added to it, an x that is the same everywhere becomes 0
    and not NaN. Return (B, T), 0 off the mask.

    >>> whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([[-1.,  1.,  0.]])
    """
    raise NotImplementedError("whiten")


def policy_loss(logprobs, old_logprobs, advantages, mask, cliprange):
    """PPO's loss: push each token by its advantage, but not far from the policy that sampled it.

    With rho = pi / pi_old and eps = cliprange, a token's gain is the *lower* of rho A and
    clip(rho, 1 - eps, 1 + eps) A: the clip can lower a gain and never raises it. The loss is minus
    the sum of the gains over all tokens of the batch, divided by their number. It is no mean over
    rows, in which the tokens of short responses would weigh more.

    Return a tensor of shape (), with a gradient. By hand: rho is 2 and A is 1, so the gain is 1.2.

    >>> rho, one, mask = torch.tensor([[2.0]]), torch.ones(1, 1), torch.tensor([[True]])
    >>> policy_loss(rho.log(), one.log(), one, mask, cliprange=0.2)
    tensor(-1.2000)
    """
    raise NotImplementedError("policy_loss")
