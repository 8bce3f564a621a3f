"""Log-probabilities, values and KL of a rollout, computed one microbatch at a time."""

import torch

from t2g.policy import Scores, autocast, check_numbers, response_logits
from t2g.ppo import entropies, kl_penalty, sampled_logprobs, vocabulary_logprobs


@torch.no_grad()
def score(actor, reference, rollout, args) -> Scores:
    microbatches = torch.arange(len(rollout)).split(args.per_device_train_batch_size)
    parts = [score_microbatch(actor, reference, rollout.rows(rows), args) for rows in microbatches]
    scores = Scores(*(torch.cat(column) for column in zip(*parts)))
    check_numbers(scores.logprobs + scores.kl)
    return scores


def score_microbatch(actor, reference, rollout, args) -> Scores:
    with autocast(args.bf16):
        logits, states = response_logits(actor.model, rollout)
        ref_logits = reference_logits(actor, reference, rollout)
        values = actor.values(states, rollout.mask)
    # One response at a time, because more tensors (B, T, V) would be large.
    rows = [score_row(*row, args) for row in zip(logits, ref_logits, rollout.response)]
    columns = [torch.stack(column) for column in zip(*rows)]
    logprobs, entropy, kl = (column.masked_fill(~rollout.mask, 0) for column in columns)
    return Scores(logprobs, entropy, values, kl)


def reference_logits(actor, reference, rollout):
    """Logits (B, T, V) of the reference, which with LoRA is the policy without its adapters."""
    if reference:
        return response_logits(reference, rollout)[0]
    with actor.model.disable_adapter():
        return response_logits(actor.model, rollout)[0]


def score_row(logits, ref_logits, response, args):
    """log pi, entropy and KL (T,) of one response from the logits (T, V) of both models."""
    both = [vocabulary_logprobs(x, args.temperature) for x in (logits, ref_logits)]
    logprobs, ref_logprobs = (sampled_logprobs(log_p, response) for log_p in both)
    compared = both if args.kl_estimator == "full" else (logprobs, ref_logprobs)
    return logprobs, entropies(both[0]), kl_penalty(*compared, args.kl_estimator)


@torch.no_grad()
def response_logprobs(actor, rollout, args):
    """log pi (B, T) of the response tokens under the current policy."""
    microbatches = torch.arange(len(rollout)).split(args.per_device_train_batch_size)
    with autocast(args.bf16):
        parts = [actor(rollout.rows(rows), args.temperature).logprobs for rows in microbatches]
    return torch.cat(parts)
