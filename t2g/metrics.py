"""Measurements of training: a policy's scores, and whether the criticised tokens moved."""

import numpy as np
import torch

from t2g import dist
from t2g.align import MATCH_KINDS
from t2g.cli import fail
from t2g.feedback import Feedback
from t2g.log import peak_memory_gib
from t2g.ppo import masked_mean, masked_variance
from t2g.rollout import respond


def evaluate(task, model, tokenizer, examples, args, desc, respond=respond) -> dict[str, float]:
    """The task's scores and eos_rate, means over examples, sampled and again greedy. Collective.

    It uses a random generator of its own, so that measuring does not change the run. respond may be
    any function with the arguments of rollout.respond().
    """
    generator = torch.Generator(dist.device()).manual_seed(args.seed + dist.rank())
    count, examples, means = len(examples), dist.share(examples), {}
    prompts, options = [e.prompt for e in examples], dict(bf16=args.bf16, generator=generator)
    for suffix, temperature in (("", args.temperature), ("_greedy", 0)):
        options["desc"] = f"{desc}, {'greedy' if suffix else 'sampled'}"
        options["temperature"] = temperature
        texts, finished = respond(model, tokenizer, prompts, args.response_length, **options)
        scores = task_scores(task, examples, texts)
        rows = [score | {"eos_rate": end} for score, end in zip(scores, finished)]
        rows = dist.collect(rows, count)
        means |= {name + suffix: mean for name, mean in means_of(rows).items()}
    return means


def mean_scores(task, examples, texts) -> dict[str, float]:
    return means_of(task_scores(task, examples, texts))


def means_of(rows: list[dict]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def task_scores(task, examples, texts) -> list[dict[str, float]]:
    """Returns the task's scores of each response. Fails if one is missing or not finite."""
    scores = [task.score(example, text) for example, text in zip(examples, texts)]
    numeric = (int, float, np.number, np.bool_, torch.Tensor)
    for score in scores:
        values = [score.get(name) for name in task.METRICS] if isinstance(score, dict) else [None]
        if not all(isinstance(value, numeric) and np.isfinite(value) for value in values):
            needed = f"not a dict with a finite number for each of {', '.join(task.METRICS)}"
            fail(f"score() of the task returned {score!r}, {needed}")
    return [{name: score[name] for name in task.METRICS} for score in scores]


def token_counts(tokenizer, rollout, feedback) -> dict[str, float]:
    """Mean tokens of prompts, responses and readable critiques, and eos_rate. Collective."""
    critiques = [one.render() for one in feedback if isinstance(one, Feedback)]
    tokens = tokenizer(critiques, add_special_tokens=False)["input_ids"] if critiques else []
    sums = {
        "prompt_tokens": rollout.prompt_mask.sum().item(),
        "response_tokens": rollout.mask.sum().item(),
        "eos_rate": rollout.finished.sum().item(),
        "critique_tokens": sum(map(len, tokens)),
    }
    totals = dist.totals(sums | {"responses": len(rollout), "critiques": len(critiques)})
    means = {name: totals[name] / totals["responses"] for name in sums}
    return means | {"critique_tokens": totals["critique_tokens"] / max(totals["critiques"], 1)}


def summary(mask, delta, quotes, kl, entropy) -> dict[str, float]:
    """Returns statistics of a rollout; t2g/log.py has the formulas. Collective.

    Args: mask, delta, kl, entropy, (B, T) of all ranks; quotes, this rank's numbers of quotes.
    """
    quotes = dist.totals(quotes)
    quote_count = max(sum(quotes[kind] for kind in MATCH_KINDS), 1)
    responses = max(mask.any(1).sum().item(), 1)
    return {
        "reward": (delta * mask).sum().item() / responses,
        "kl": (kl * mask).sum().item() / responses,
        "entropy": masked_mean(entropy, mask).item(),
        "tokens_good": masked_mean((delta > 0).float(), mask).item(),
        "tokens_poor": masked_mean((delta < 0).float(), mask).item(),
        "unparsable": 1 - mask.any(1).float().mean().item(),
        **{f"quotes_{kind}": count / quote_count for kind, count in quotes.items()},
        "peak_memory_gib": peak_memory_gib(),
    }


def value_explained(values, returns, mask) -> float:
    """Returns 1 - Var(returns - V) / Var(returns) over the tokens of the mask."""
    unexplained = masked_variance(returns - values, mask)
    return 1 - (unexplained / masked_variance(returns, mask).clamp(min=1e-8)).item()


def shift(change, delta, mask) -> dict[str, float]:
    """Measures whether the criticised tokens moved in an update; t2g/log.py explains each number.

    Under a scalar reward shift_poor_above and shift_good_below are nearer to 0.

    Args: change, log pi_new - log pi_old, (B, T) in nats; delta, (B, T); mask, (B, T) bool.
    Returns: those of the six that are defined: no mean of no tokens, no correlation of constants.
    """
    reward, read = (delta * mask).sum(1), mask.any(1)
    above = (reward > masked_mean(reward, read))[:, None]
    groups = {"poor": delta < 0, "rest": delta == 0, "good": delta > 0}
    groups |= {"poor_above": groups["poor"] & above, "good_below": groups["good"] & ~above}
    means = {}
    for name, group in groups.items():
        if (mask & group).any():
            means[f"shift_{name}"] = masked_mean(change, mask & group).item()
    x, y = delta[mask], change[mask]
    if len(x) and (x != x[0]).any() and (y != y[0]).any():
        from scipy.stats import spearmanr  # takes most of a second to import

        means["shift_rank"] = float(spearmanr(x.cpu(), y.cpu()).statistic)
    return means
