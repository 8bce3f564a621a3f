"""A reward model that says one number of a whole response: a causal language model and a linear head on its last hidden state.

    score(x, y) = w . h_last(x, y) + b        what a generative reward model's spans would sum to, without saying where

The head is that of a policy's V (t2g/policy.py), read behind the whole text. How it is trained: train_scalar_rm.py.
"""

import torch
from tqdm import tqdm

from t2g import policy
from t2g.cli import fail
from t2g.critics import fitting_prompt
from t2g.policy import Policy, autocast, context_length, response_logits
from t2g.supervised import as_rollout, encode_pairs

REWARD_UNIT = "sum of delta over the response's tokens"  # stands in the model's config.json and marks such a reward model


def scores(scorer, batch, bf16=False):
    """One score (B,) for each text of a batch whose rows end in EOS: read off the state before it, that of the last token."""
    with autocast(bf16):
        _, states = response_logits(scorer.model, batch)
    return scorer.values(states, batch.mask)[:, -1]


def encode(tokenizer, asked) -> list[tuple[list[int], list[int]]]:
    """What the reward model is asked, as rows of token ids: the text, and EOS behind it."""
    return encode_pairs(tokenizer, [(text, "") for text in asked])


def load(path, device="cpu"):
    """A tokenizer and a Policy whose value head scores texts, as train_scalar_rm.py saves them in a local folder."""
    tokenizer, model = policy.load(path, device)
    scorer = Policy(model).to(device)
    scorer.load_value_head(path)
    if getattr(model.config, "reward_unit", None) != REWARD_UNIT or not scorer.value_head.weight.any():
        fail(f"{path} is no scalar reward model; --reward_model must name a folder that train_scalar_rm.py made")
    return tokenizer, scorer


def scalar_critic(path, device, bf16=False, batch_size=64):
    """critic(examples, responses) -> a number for each response, None where it is too long for the model's context.

    Long prompts are shortened in their middle: see critics.fitting_prompt(). How many are too long even so is printed once.
    """
    tokenizer, scorer = load(path, device)
    context, warned = context_length(scorer.model), False

    @torch.no_grad()
    def critic(examples, responses):
        nonlocal warned
        pairs = zip(examples, responses)
        asked = [fitting_prompt(tokenizer, example.prompt, response, context - 1) for example, response in pairs]  # 1 for EOS
        rows = encode(tokenizer, asked)
        lengths = [sum(map(len, row)) for row in rows]
        fits = [n for n in sorted(range(len(rows)), key=lengths.__getitem__) if lengths[n] <= context]
        if not warned and len(fits) < len(rows):
            warned = True
            tqdm.write(
                f"{len(rows) - len(fits)} of {len(rows)} responses are too long to be scored: they do not fit the context of "
                f"{context} tokens. They count as unreadable, as later ones will"
            )
        said = [None] * len(rows)
        for start in range(0, len(fits), batch_size):
            index = fits[start : start + batch_size]
            batch, _ = as_rollout([rows[n] for n in index], tokenizer.pad_token_id, device)
            for n, score in zip(index, scores(scorer, batch, bf16).tolist()):
                said[n] = score
        return said

    return critic
