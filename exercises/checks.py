"""The rules and the typical mistakes of the exercises; grade.py applies them to a submission.

A rule is worth one point: a sentence, the part of the answer that it is about, and cases. The right
answers come from the project's own functions. So do the mistakes: each is what such a function
returns for changed arguments, for example without the mask. This file contains no solution.
"""

import itertools
import random

import torch

from t2g import align, ppo
from t2g.feedback import Feedback


def resolve(text, feedback):
    return align.resolve(text, feedback)[0]


def policy_loss(*arguments):
    return ppo.policy_loss(*arguments)[0]


SOLUTIONS = {"resolve": resolve, "span_rewards": align.span_rewards, "kl_penalty": ppo.kl_penalty}
SOLUTIONS |= {"gae": ppo.gae, "whiten": ppo.whiten, "policy_loss": policy_loss}


# ---- Rules -------------------------------------------------------------------------------------
def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quotes(good=(), poor=()):
    return Feedback("A critique.", list(good), list(poor))


def random_text(rng):
    words = rng.choices(["the", "then", "27", "1927", "he", "in"], k=8)
    good, poor = (rng.choices([*words, "zebra"], k=3) for _ in range(2))
    return ", ".join(words), quotes(good, poor)


def random_spans(rng):
    cuts = [0, *sorted(rng.sample(range(1, 20), k=8))]
    places = [sorted(rng.sample(range(cuts[-1] + 1), 2)) for _ in range(3)]
    spans = [(*place, rng.choice([-1.0, -0.5, 0.5, 1.0])) for place in places]
    return list(itertools.pairwise(cuts)), spans


rng = random.Random(0)
TEXT, PLACES = "Ana is 27, lives in Porto.", "in Rome, in Bonn, in Oslo"
TOKENS = [(0, 3), (3, 6), (6, 9), (9, 10), (10, 16), (16, 19), (19, 25), (25, 26)]
EMPTY = [(0, 3), (3, 3), (3, 6), (6, 7), (6, 7), (7, 7)]  # two have no characters, two share one
EIGHT, ZERO = torch.ones(1, 8, dtype=torch.bool), torch.zeros(1, 8)
DELTA = torch.tensor([[0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0, 0.0]])
MASK = torch.arange(8) < torch.tensor([8, 1, 5])[:, None]
X, Y, A = noise(0, 3, 3, 8)  # without zeros in the padding
RATIOS = torch.tensor([[1.3, 0.7, 1.4, 0.6, 1.1, 0.9, 1.5, 0.5]]).log()
GAINS = torch.tensor([[2.0, -3.0, -1.0, 5.0, 1.5, -0.5, -4.0, -0.25]])
PI, REF = noise(1, 2, 2, 3, 20).log_softmax(-1)
NEVER = PI.masked_fill(torch.arange(20) == 7, -torch.inf).log_softmax(-1)
CLIPPED, PADDED = (RATIOS, ZERO, GAINS, EIGHT, 0.2), (A + 0.3 * X, A, Y, MASK, 0.2)
RULES = {
    "resolve": [
        ("a quote marks its characters, +1 or -1", "spans", [(TEXT, quotes(["Porto"], ["27"]))]),
        ("white space around a quote is left out", "spans", [(TEXT, quotes([" Porto"], [" 27"]))]),
        ("a good quote marks the first place and a poor one the last", "spans",
         [(PLACES, quotes(["in"])), (PLACES, quotes([], ["in"]))]),
        ("a place that cuts a word or a number in two does not count", "spans",
         [("In 1927 he was 27, then 28 in the 1928.", quotes(["27", "the"], ["28", "he"]))]),
        ("a quote that is given k times marks k places", "spans",
         [(PLACES, quotes(["in"] * k, ["in"] * (5 - k))) for k in range(6)]),
        ("a quote that is not in the text marks nothing", "spans",
         [(TEXT, quotes(["Rome"], ["41"])), *(random_text(rng) for _ in range(40))]),
    ],
    "span_rewards": [
        ("a span rewards its tokens alone", "reward", [(TOKENS, [(6, 9, -1.0), (16, 25, 1.0)])]),
        ("a token is rewarded if a span shares a character with it", "reward",
         [(TOKENS, [(7, 9, -1.0), (20, 22, 1.0)])]),
        ("a token gets the lowest score of its spans", "reward",
         [(TOKENS, [(0, 9, -1.0), (3, 9, 0.75), (3, 6, 0.25)]),
          *(random_spans(rng) for _ in range(40))]),
        ("a token without characters or spans gets 0", "reward",
         [(EMPTY, [(0, 6, 1.0), (6, 7, -1.0)]), (TOKENS, [])]),
    ],
    "kl_penalty": [
        ("k1 is -log x", "penalty", [(X, Y, "k1")]),
        ("k2 is (log x)^2 / 2", "penalty", [(X, Y, "k2")]),
        ("k3 is x - 1 - log x", "penalty", [(X, Y, "k3")]),
        ("full is the mean of log pi - log pi_ref under pi", "penalty", [(PI, REF, "full")]),
        ("a token with log pi = -inf adds 0 to full", "penalty", [(NEVER, REF, "full")]),
    ],
    "gae": [
        ("where V is 0, rewards decay with gamma lam", "advantage",
         [(DELTA, ZERO, EIGHT, 1.0, 0.95)]),
        ("TD is r_t + gamma V_{t+1} - V_t", "advantage", [(X[:1], Y[:1], EIGHT, 0.9, 0.6)]),
        ("padding changes no advantage", "advantage", [(X, Y, MASK, 0.9, 0.6)]),
        ("returns are A + V, and 0 off the mask", "return", [(X, Y, MASK, 0.9, 0.6)]),
        ("advantages are 0 off the mask", "padding", [(X, Y, MASK, 0.9, 0.6)]),
    ],
    "whiten": [
        ("the mean becomes 0 and the variance 1", "result", [(X, MASK | True)]),
        ("mean and variance are those under the mask, over all rows", "result", [(X, MASK)]),
        ("an x that is the same everywhere becomes 0", "result", [(MASK * 0.5, MASK)]),
        ("the result is 0 off the mask", "padding", [(X, MASK)]),
    ],
    "policy_loss": [
        ("at rho = 1 it is minus the mean of A", "loss", [(X[:1], X[:1], Y[:1], EIGHT, 0.2)]),
        ("a gain is the lower of rho A and clip(rho) A", "loss", [CLIPPED]),
        ("the loss is a mean over all tokens under the mask", "loss", [PADDED]),
        ("the loss has a gradient", "gradient", [CLIPPED, PADDED]),
    ],
}  # fmt: skip


# ---- Typical mistakes: a sentence, and a function that makes it --------------------------------
def flipped(spans):
    return [(start, end, -score) for start, end, score in spans]


def contained(offsets, spans):
    """Cuts spans down to the tokens that they contain."""
    tokens = [[(s, e) for s, e in offsets if start <= s < e <= end] for start, end, _ in spans]
    spans = [(t[0][0], t[-1][1], score) for t, (_, _, score) in zip(tokens, spans) if t]
    return align.span_rewards(offsets, spans)


def with_value_of_padding(r, v, m, gamma, lam):
    is_last = m & ~m.roll(-1, 1)
    return ppo.gae(r + gamma * v.roll(-1, 1) * is_last, v, m, gamma, lam)


delta, G, W, K, L = align.span_rewards, ppo.gae, ppo.whiten, ppo.kl_penalty, policy_loss
MISTAKES = {
    "resolve": [
        ("every place of a quote is marked",
         lambda t, z: resolve(t, quotes(list(set(z.good)) * 9, list(set(z.poor)) * 9))),
        ("poor quotes mark their first place, too",
         lambda t, z: resolve(t, quotes(z.good)) + flipped(resolve(t, quotes(z.poor)))),
    ],
    "span_rewards": [
        ("only tokens inside a span are rewarded, though one character is enough", contained),
        ("scores are added", lambda o, s: sum((delta(o, [x]) for x in s), delta(o, []))),
        ("praise is lost, for 0 is in the minimum", lambda o, s: delta(o, s).clamp(max=0)),
    ],
    "kl_penalty": [
        ("the sign of log x is wrong",
         lambda p, q, kind: K(p, q, kind) - 2 * (p - q) if kind == "k3" else -K(p, q, kind)),
        ("pi and pi_ref are swapped, but x is pi_ref / pi", lambda p, q, kind: K(q, p, kind)),
    ],
    "gae": [
        ("gamma and lam are swapped", lambda r, v, m, gamma, lam: G(r, v, m, lam, gamma)),
        ("the advantages cross the end of a response, because the mask is ignored",
         lambda r, v, m, gamma, lam: G(r, v, m | True, gamma, lam)),
        ("V after the last token must be 0, and V of the padding is used", with_value_of_padding),
    ],
    "whiten": [
        ("the padding is in the mean and the variance", lambda x, m: W(x, m | True)),
        ("the zeros of the padding are in them", lambda x, m: W(x * m, m | True)),
        ("it divides by n - 1, not by n", lambda x, m: W(x, m) * (1 - 1 / m.sum()).sqrt()),
        ("each row is whitened alone", lambda x, m: torch.stack(list(map(W, x, m)))),
    ],
    "policy_loss": [
        ("the sign is wrong", lambda n, o, a, m, eps: -L(n, o, a, m, eps)),
        ("min and max are swapped", lambda n, o, a, m, eps: -L(n, o, -a, m, eps)),
        ("nothing is clipped", lambda n, o, a, m, eps: L(n, o, a, m, 1e9)),
        ("it is a mean over the means of the rows",
         lambda *x: torch.stack([L(*row, x[-1]) for row in zip(*x[:-1])]).mean()),
        ("the padding is counted", lambda n, o, a, m, eps: L(n, o, a, m | True, eps)),
    ],
}  # fmt: skip
