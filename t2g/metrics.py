"""How good a policy is on held-out prompts, and whether criticised tokens moved: thin sums over scores and well-kept libraries."""

from functools import cache

import numpy as np
import torch

from extras.baselines.revision import second_try
from t2g import dist
from t2g.feedback import Feedback
from t2g.ppo import masked_mean
from t2g.respond import respond


def evaluate(
    task, model, tokenizer, examples, response_length, bf16=False, desc=None, seed=0, critic=None
) -> tuple[dict, list[str]]:
    """The task's scores, averaged over examples: one sampled response each (temperature 1) and one greedy one (..._greedy).

    With a critic these are second tries: the model rewrites each response after the critique of it.

    Sampling has its own generator, so that measuring changes nothing else and is the same whatever came before.

    Returns: the means, with "eos_rate" and its greedy twin; and the sampled texts.
    """
    generator = torch.Generator(dist.device()).manual_seed(seed)
    prompts, means, texts = [example.prompt for example in examples], {}, {}
    for suffix, temperature in (("", 1.0), ("_greedy", 0)):
        label = desc and f"{desc}, {'greedy' if suffix else 'sampled'}"
        sampling = dict(temperature=temperature, bf16=bf16, generator=generator, desc=label)
        texts[suffix], finished = respond(model, tokenizer, prompts, response_length, **sampling)
        if critic:
            texts[suffix], finished = second_try(
                model, tokenizer, examples, texts[suffix], critic, response_length, **sampling
            )
        means |= {
            name + suffix: mean for name, mean in mean_scores(task, examples, texts[suffix]).items()
        }
        means["eos_rate" + suffix] = float(np.mean(finished))
    return means, texts[""]


def mean_scores(task, examples, texts) -> dict[str, float]:
    """The task's scores, averaged over responses."""
    scores = [task.score(example, text) for example, text in zip(examples, texts)]
    return {name: float(np.mean([score[name] for score in scores])) for name in task.METRICS}


def token_counts(tokenizer, rollout, feedback) -> dict[str, float]:
    """Mean tokens of prompts, responses and readable critiques, all by the policy's tokenizer: what a step costs goes by them. And
    the share of responses that ended by themselves. Over all processes, so collective.
    """
    critiques = [said.render() for said in feedback if isinstance(said, Feedback)]
    sums = {
        "prompt_tokens": rollout.prompt_mask.sum().item(),
        "response_tokens": rollout.mask.sum().item(),
        "eos_rate": rollout.finished.sum().item(),
        "critique_tokens": sum(
            map(len, tokenizer(critiques, add_special_tokens=False)["input_ids"])
        )
        if critiques
        else 0,
    }
    sums = dist.totals(sums | {"responses": len(rollout), "critiques": len(critiques)})
    responses, critiques = sums.pop("responses"), max(sums.pop("critiques"), 1)
    return {
        name: value / (critiques if name == "critique_tokens" else responses)
        for name, value in sums.items()
    }


def shift(change, delta, mask):
    """Did the tokens move that were criticised? The change of log pi over an update, apart by what was said of the tokens.

        shift_poor, shift_rest, shift_good    mean of log pi_new(y_t) - log pi_old(y_t) where delta_t < 0, = 0, > 0
        shift_poor_above, shift_good_below    the same for poor tokens of responses whose sum of delta is above the batch's mean,
                                              and good tokens of the others: there, one number for the response speaks against it
        shift_rank                            Spearman's rank correlation of delta_t with that change

    Args: change (B, T) in nats; delta (B, T); mask (B, T) bool.
    Returns: a dict of these six; a mean without tokens is left out, and so is a correlation where one of the two is constant.
    """
    from scipy.stats import spearmanr

    reward, read = (delta * mask).sum(1), mask.any(1)
    above = (reward > masked_mean(reward, read))[:, None]
    groups = {"poor": delta < 0, "rest": delta == 0, "good": delta > 0}
    groups |= {"poor_above": groups["poor"] & above, "good_below": groups["good"] & ~above}
    seen = {name: mask & group for name, group in groups.items() if (mask & group).any()}
    means = {f"shift_{name}": masked_mean(change, tokens).item() for name, tokens in seen.items()}
    x, y = delta[mask], change[mask]
    if len(x) and (x != x[0]).any() and (y != y[0]).any():
        means["shift_rank"] = float(spearmanr(x.cpu(), y.cpu()).statistic)
    return means


def mean_interval(values) -> tuple[float, float, float]:
    """Mean and 95% interval of a few independent runs, by Student's t; at least two."""
    from scipy.stats import t

    values = np.asarray(values, dtype=float)
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def interval(values) -> dict:
    """mean_interval() as results hold it: {"mean", "low", "high", "seeds"}."""
    return dict(zip(("mean", "low", "high"), mean_interval(values))) | {"seeds": len(values)}


DRAWS = 1000  # of the bootstrap


def resamples(number, seed=0) -> np.ndarray:
    """How often each of `number` examples counts, (1 + DRAWS, number): once in the first row, as a bootstrap draws it in the rest.

    A figure that is made of sums over examples is had for all draws together by resamples(n) @ table; two systems that answered
    the same examples are compared on the same draws.
    """
    draws = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), DRAWS)
    return np.vstack([np.ones(number), draws])


def bootstrapped(values) -> dict:
    """{"value", "low", "high"}: a figure and its 95% interval, from its values on the rows of resamples().

    What would divide by 0 is nan: such draws say nothing, and a figure that does so itself is None.
    """
    if np.isnan(values[0]):
        return dict.fromkeys(("value", "low", "high"))
    low, high = np.nanquantile(values[1:], (0.025, 0.975))
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def mean_bootstrap(values, weights) -> np.ndarray:
    """The mean of values (n,) on each row of resamples(n); those that are nan are left out."""
    there = ~np.isnan(values)
    sums, counts = weights[:, there] @ values[there], weights[:, there].sum(1)
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)


@cache
def rouge_scorer(*kinds):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(kinds, use_stemmer=True)


def rouge_l(reference: str, text: str) -> float:
    """F1 of ROUGE-L, by the package rouge-score."""
    return rouge(reference, text, "rougeL")["rougeL"]


def rouge(reference: str, text: str, *kinds) -> dict[str, float]:
    """F1 of each of these kinds of ROUGE, such as rouge1 or rougeL, of stemmed words, by the package rouge-score."""
    return {
        kind: score.fmeasure for kind, score in rouge_scorer(*kinds).score(reference, text).items()
    }
