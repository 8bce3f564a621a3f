"""A learned number for each response, in place of a critique: `--critic extras/baselines/scalar_critic.py`."""

import torch
from tqdm import tqdm

from extras.baselines import scalar_head
from t2g import policy, supervised
from t2g.critics import fitting_prompt


def critic(task, args):
    """The reward model that `python -m extras.baselines.scalar_rm` trained: --reward_model, or rm_scalar beside the run."""
    return scalar_critic(
        args.reward_model or f"runs/{task.NAME}/rm_scalar", policy.device(), args.bf16
    )


def scalar_critic(path, device, bf16=False, batch_size=64):
    """critic(examples, responses) -> a number for each response, None where it is too long for the model's context.

    Long prompts are shortened in their middle: see critics.fitting_prompt(). How many are too long even so is printed once.
    """
    tokenizer, scorer = scalar_head.load(path, device)
    context, warned = policy.context_length(scorer.model), False

    @torch.no_grad()
    def critic(examples, responses):
        nonlocal warned
        pairs = zip(examples, responses)
        asked = [
            fitting_prompt(tokenizer, example.prompt, response, context - 1)
            for example, response in pairs
        ]  # 1 for EOS
        rows = scalar_head.encode(tokenizer, asked)
        lengths = [sum(map(len, row)) for row in rows]
        fits = [
            n for n in sorted(range(len(rows)), key=lengths.__getitem__) if lengths[n] <= context
        ]
        if not warned and len(fits) < len(rows):
            warned = True
            tqdm.write(
                f"{len(rows) - len(fits)} of {len(rows)} responses are too long to be scored: they do not fit the context of "
                f"{context} tokens. They count as unreadable, as later ones will"
            )
        said = [None] * len(rows)
        for start in range(0, len(fits), batch_size):
            index = fits[start : start + batch_size]
            batch, _ = supervised.as_rollout(
                [rows[n] for n in index], tokenizer.pad_token_id, device
            )
            for n, score in zip(index, scalar_head.scores(scorer, batch, bf16).tolist()):
                said[n] = score
        return said

    return critic
