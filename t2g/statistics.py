"""Bootstrap intervals over responses, and the ROUGE score of a text."""

import numpy as np

DRAWS = 1000


def resamples(number, seed=0) -> np.ndarray:
    """Returns how often each example counts: once each, and then in every draw of the bootstrap.

    resamples(n) @ table gives sums over n examples in all draws at once. Systems that answered the
    same examples are compared on the same draws. Returns: (1 + DRAWS, number).
    """
    draws = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), DRAWS)
    return np.vstack([np.ones(number), draws])


def bootstrapped(values) -> dict:
    """Returns a figure and its 95% interval, from its values on resamples(), as value, low, high.

    Draws in which it is nan are left out. All three are None if the figure itself is nan.
    """
    if np.isnan(values[0]):
        return dict.fromkeys(("value", "low", "high"))
    low, high = np.nanquantile(values[1:], (0.025, 0.975))
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def rouge(reference: str, text: str, *kinds) -> dict[str, float]:
    """Returns F1 of each kind of ROUGE, such as rouge1 or rougeL, over stemmed words."""
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer(kinds, use_stemmer=True).score(reference, text)
    return {kind: score.fmeasure for kind, score in scores.items()}
