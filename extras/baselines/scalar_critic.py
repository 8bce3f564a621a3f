"""A scalar reward model as the critic: one number for the whole response, and no critique.

    score(x, y) = w . h_last(x, y) + b, in reward units: the sum of delta_t over the response

The head is the value head of a policy (t2g/policy.py), read after the whole text.
`python -m extras.baselines.scalar_rm` trains the model, into rm_scalar beside the run.

python train_ppo.py --critic extras/baselines/scalar_critic.py --output_dir runs/toy/ppo_head
"""

from pathlib import Path

import torch
from tqdm import tqdm

from t2g import policy, supervised
from t2g.cli import fail
from t2g.critics import fitting_prompt
from t2g.policy import Policy, autocast, response_logits

REWARD_UNIT = "sum of delta over the response's tokens"  # in config.json, marks a scalar model


def critic(task, args):
    """Returns the critic of --reward_model, or of rm_scalar beside the run."""
    path = args.reward_model or Path(args.output_dir).parent / "rm_scalar"
    return scalar_critic(path, policy.device(), args.bf16)


def scalar_critic(path, device, bf16=False, batch_size=64):
    """Returns critic(examples, responses) -> a float for each response.

    Long prompts are shortened, see critics.fitting_prompt(). A response that is too long for the
    model's context even so gives None; how many are is printed the first time.
    """
    tokenizer, scorer = load(path, device)
    context, warned = policy.context_length(scorer.model), False

    @torch.no_grad()
    def critic(examples, responses):
        nonlocal warned
        prompts = [example.prompt for example in examples]
        texts = [
            fitting_prompt(tokenizer, prompt, response, context - 1)  # one token for EOS
            for prompt, response in zip(prompts, responses)
        ]
        rows = encode(tokenizer, texts)
        order = sorted(range(len(rows)), key=lambda n: supervised.length(rows[n]))
        fits = [n for n in order if supervised.length(rows[n]) <= context]
        if not warned and len(fits) < len(rows):
            warned = True
            dropped = f"{len(rows) - len(fits)} of {len(rows)} responses"
            tqdm.write(f"{dropped} do not fit the context of {context} tokens: no reward for them")
        rewards = [None] * len(rows)
        for start in range(0, len(fits), batch_size):
            index = fits[start : start + batch_size]
            part = [rows[n] for n in index]
            batch, _ = supervised.as_rollout(part, tokenizer.pad_token_id, device)
            for n, score in zip(index, scores(scorer, batch, bf16).tolist()):
                rewards[n] = score
        return rewards

    return critic


def encode(tokenizer, texts) -> list[tuple[list[int], list[int]]]:
    """Returns rows (text, EOS) of token ids, the input of the reward model."""
    return supervised.encode_pairs(tokenizer, [(text, "") for text in texts])


def scores(scorer, batch, bf16=False):
    """Returns a score (B,) per text, from the hidden state of its last token before EOS."""
    with autocast(bf16):
        _, states = response_logits(scorer.model, batch)
    return scorer.values(states, batch.mask)[:, -1]


def load(path, device="cpu"):
    """Returns the tokenizer and the Policy that scalar_rm.py saved in a local folder."""
    tokenizer, model = policy.load(path, device)
    scorer = Policy(model).to(device)
    scorer.load_value_head(path)
    unit = getattr(model.config, "reward_unit", None)
    if unit != REWARD_UNIT or not scorer.value_head.weight.any():
        fail(f"{path} is no scalar reward model; name one with --reward_model")
    return tokenizer, scorer
