"""Log-probabilities, values and KL of a rollout, computed one microbatch at a time."""

import torch

from t2g.policy import Scores, autocast, check_numbers, response_logits, token_stats
from t2g.ppo import kl_penalty


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
    logprobs, entropy = token_stats(logits, rollout, args.temperature)
    if args.kl_estimator == "full":  # a response at a time: a third tensor (B, T, V) would be large
        rows = [full_kl(*pair, args.temperature) for pair in zip(logits, ref_logits)]
        kl = torch.stack(rows).masked_fill(~rollout.mask, 0)
    else:
        ref_logprobs, _ = token_stats(ref_logits, rollout, args.temperature)
        kl = kl_penalty(logprobs, ref_logprobs, args.kl_estimator)
    return Scores(logprobs, entropy, values, kl)


def reference_logits(actor, reference, rollout):
    """Logits (B, T, V) of the reference, which with LoRA is the policy without its adapters."""
    if reference:
        return response_logits(reference, rollout)[0]
    with actor.model.disable_adapter():
        return response_logits(actor.model, rollout)[0]


def full_kl(logits, ref_logits, temperature):
    """The exact KL (T,) of one response from the logits (T, V) of both models."""
    ours, theirs = ((x.float() / temperature).log_softmax(-1) for x in (logits, ref_logits))
    return kl_penalty(ours, theirs, "full")


@torch.no_grad()
def response_logprobs(actor, rollout, args):
    """log pi (B, T) of the response tokens under the current policy."""
    microbatches = torch.arange(len(rollout)).split(args.per_device_train_batch_size)
    with autocast(args.bf16):
        parts = [actor(rollout.rows(rows), args.temperature).logprobs for rows in microbatches]
    return torch.cat(parts)
