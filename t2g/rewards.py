"""Token rewards of a rollout: from feedback to its sampled tokens, placed as --reward says."""

import torch

from t2g.align import MATCH_KINDS, SENTENCE_OR_LINE, resolve, span_rewards, steps, token_offsets


def token_rewards(tokenizer, rollout, feedback, args):
    """delta (B, T) from each response's feedback, and the number of quotes found in each way."""
    delta, counts = torch.zeros(rollout.mask.shape), dict.fromkeys((*MATCH_KINDS, "ambiguous"), 0)
    pairs = zip(rollout.texts, feedback, strict=True)
    for row, (text, critique) in enumerate(pairs):
        ids = rollout.ids(row)
        if isinstance(critique, float):  # a learned scalar for the whole response
            delta[row, len(ids) - 1] = critique
        elif critique is not None:
            spans, found = resolve(text, critique, severities=args.span_weights == "severity")
            offsets = token_offsets(tokenizer, ids)
            delta[row, : len(ids)] = span_rewards(offsets, spans, args.span_weights)
            counts = {kind: counts[kind] + found[kind] for kind in counts}
    return delta.to(rollout.response.device), counts


def place_rewards(delta, tokenizer, rollout, task, args):
    """Rewards (B, T): the sum of delta over each segment, on the segment's last token.

    A segment is a token (span), a sentence, or whatever ends with task.STEP_END (prm), or the whole
    response (scalar). A response without EOS pays --missing_eos_penalty on its last token.
    """
    segment, last = torch.zeros_like(rollout.response), rollout.mask.sum(1, keepdim=True) - 1
    if args.reward == "span":
        segment += torch.arange(segment.shape[1], device=segment.device)
    elif args.reward == "prm":
        step_end = getattr(task, "STEP_END", SENTENCE_OR_LINE)
        for row, text in enumerate(rollout.texts):
            offsets = token_offsets(tokenizer, rollout.ids(row))
            segment[row, : len(offsets)] = torch.tensor(steps(offsets, text, step_end))
    sums = torch.zeros_like(delta).scatter_add(1, segment, delta).gather(1, segment)
    rewards = sums.where(segment_ends(segment, rollout.mask), 0.0)
    penalty = args.missing_eos_penalty * (~rollout.finished).float()
    return rewards.scatter_add(1, last, -penalty[:, None])


def segment_ends(segment, mask):
    """Whether a token (B, T) is the last of its segment: the next one is of another, or padding."""
    ends = mask.clone()
    ends[:, :-1] &= (segment[:, 1:] != segment[:, :-1]) | ~mask[:, 1:]
    return ends
