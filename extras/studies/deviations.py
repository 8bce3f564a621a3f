"""Runs train_ppo.py with one detail of the official code instead of ours, to measure its effect.

python -m extras.reproduce --recipe deviations        # the table of all details: a minute per run
python -m extras.studies.deviations encoded_again --critic rule --output_dir runs/toy/encoded_again

The flags after the name of the detail are those of train_ppo.py. A detail is a function here that
replaces functions of train_ppo.py for one process.
"""

import sys

import torch
from torch.nn.utils.rnn import pad_sequence

import train_ppo
from t2g import rollout as sampling
from t2g.cli import fail

MARKS = (",", ".", "?", "!")


def neutral_plus_one():
    """Rewards tokens outside all spans with +1, as the official recipe for code does."""
    ours = train_ppo.token_rewards

    def token_rewards(tokenizer, rollout, *rest):
        delta, counts = ours(tokenizer, rollout, *rest)
        return torch.where((delta == 0) & rollout.mask, 1.0, delta), counts

    train_ppo.token_rewards = token_rewards


def masked_after_punctuation():
    """Masks the tokens after , . ? and !, EOS included, out of the loss, and restarts GAE there.

    The official code looks for these marks at the indices of tokens, but its masks are shifted to
    those of log-probabilities, so that each mark removes the token after it.
    """
    ours_sample, ours_whiten = train_ppo.sample, train_ppo.whiten
    latest = {}

    def sample(model, tokenizer, *args, **kwargs):
        rollout = ours_sample(model, tokenizer, *args, **kwargs)
        latest["kept"] = torch.ones_like(rollout.mask)
        for row, ids in enumerate(rollout.response.tolist()):
            for t, token in enumerate(ids[:-1]):
                latest["kept"][row, t + 1] = tokenizer.decode([token]).strip() not in MARKS
        return rollout

    def gae(rewards, values, mask, gamma, lam):
        kept = mask & latest["kept"]
        advantages = torch.zeros_like(rewards)
        next_value = next_advantage = torch.zeros_like(rewards[:, 0])
        for t in reversed(range(rewards.shape[1])):
            td = rewards[:, t] + gamma * next_value - values[:, t]
            advantages[:, t] = next_advantage = (td + gamma * lam * next_advantage) * kept[:, t]
            next_value = values[:, t] * kept[:, t]
        return advantages, advantages + values

    train_ppo.sample, train_ppo.gae = sample, gae
    train_ppo.whiten = lambda x, mask: ours_whiten(x, mask & latest["kept"])


def encoded_again():
    """Trains on the tokens of the decoded and re-encoded response."""
    ours = train_ppo.sample

    def sample(model, tokenizer, *args, **kwargs):
        rollout = ours(model, tokenizer, *args, **kwargs)
        eos, rows = tokenizer.eos_token_id, []
        for text, finished in zip(rollout.texts, rollout.finished):
            ids = tokenizer.encode(text, add_special_tokens=False) + [eos] * bool(finished)
            rows.append(torch.tensor(ids or [eos], device=rollout.response.device))
        ones = [torch.ones_like(row) for row in rows]
        rollout.mask = pad_sequence(ones, batch_first=True).bool()
        padding = tokenizer.pad_token_id
        rollout.response = pad_sequence(rows, batch_first=True, padding_value=padding)
        return rollout

    train_ppo.sample = sample


def narrow_sampling():
    """Samples at temperature 0.6 and top-p 0.9, with log-probabilities at temperature 1."""
    ours, draw = train_ppo.sample, sampling.draw

    def nucleus(logits, temperature, uniform):
        ordered, index = (logits / temperature).sort(descending=True)
        likely = ordered.softmax(-1)
        kept = ordered.masked_fill(likely.cumsum(-1) - likely > 0.9, -torch.inf)
        return index.gather(-1, draw(kept, 1.0, uniform)[:, None])[:, 0]

    def sample(model, tokenizer, prompts, response_length, temperature, *args, **kwargs):
        sampling.draw = nucleus
        try:
            return ours(model, tokenizer, prompts, response_length, 0.6, *args, **kwargs)
        finally:
            sampling.draw = draw

    train_ppo.sample = sample


def whitened_apart():
    """Whitens each of eight parts of the rollout by itself, with variances over n - 1."""
    ours = train_ppo.whiten

    def whiten(x, mask):
        parts = []
        for values, part_mask in zip(x.chunk(8), mask.chunk(8)):
            n = part_mask.sum()
            scale = ((n - 1).clamp(min=0) / n.clamp(min=1)).sqrt()
            parts.append(ours(values, part_mask) * scale)
        return torch.cat(parts)

    train_ppo.whiten = whiten


def means_of_microbatches():
    """Averages each microbatch of four responses by itself, so tokens of short ones weigh more."""

    def by_itself(ours):
        def loss(new, old, target, mask, cliprange, count):
            return ours(new, old, target, mask, cliprange, mask.sum().clamp(min=1) * 8)

        return loss

    train_ppo.policy_loss = by_itself(train_ppo.policy_loss)
    train_ppo.value_loss = by_itself(train_ppo.value_loss)
    sys.argv += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "8"]


DETAILS = (neutral_plus_one, masked_after_punctuation, encoded_again, narrow_sampling)
DETAILS += (whitened_apart, means_of_microbatches)


def main():
    details = {detail.__name__: detail for detail in DETAILS}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in details:
        fail(f"no detail {name!r}; give one of {', '.join(details)}, then flags of train_ppo.py")
    sys.argv[:2] = ["train_ppo.py"]
    parse_args = train_ppo.parse_args

    def with_detail():
        task, args = parse_args()
        args.detail = name  # stands in config.json, so that no run resumes one of another detail
        return task, args

    train_ppo.parse_args = with_detail
    details[name]()
    train_ppo.main()


if __name__ == "__main__":
    main()
