"""A reward model that says one number of a whole response: a causal language model and a linear head on its last hidden state.

    score(x, y) = w . h_last(x, y) + b        what a generative reward model's spans would sum to, without saying where

The head is that of a policy's V (t2g/policy.py), read behind the whole text. How it is trained: train_scalar_rm.py.
"""

from t2g import policy
from t2g.cli import fail
from t2g.policy import Policy, autocast, response_logits
from t2g.supervised import encode_pairs

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
    if (
        getattr(model.config, "reward_unit", None) != REWARD_UNIT
        or not scorer.value_head.weight.any()
    ):
        fail(
            f"{path} is no scalar reward model; --reward_model must name a folder that train_scalar_rm.py made"
        )
    return tokenizer, scorer
