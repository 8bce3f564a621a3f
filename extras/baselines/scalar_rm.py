"""A scalar reward model, a baseline: one number for a response, without a critique or quotes.

    score(x, y) = w . h_last(x, y) + b        the value head at the text's last token (policy.py)
    L = E[ (score(x, y) - s)^2 ]              s: the sum of delta_t over y, from the annotations

The command trains it; as a critic, this file returns the score of each response as its reward.
delta_t is computed on the reward model's own tokens. Long prompts are shortened in the middle.

python -m extras.baselines.scalar_rm                             # the toy, into runs/toy/rm_scalar
python -m extras.baselines.scalar_rm --task summarize --model HUB_ID --annotations notes.jsonl
python train_ppo.py --critic extras/baselines/scalar_rm.py --output_dir runs/toy/ppo_head
"""

import random
from functools import partial
from pathlib import Path

import numpy as np
import torch

from extras.baselines import common
from t2g import cli, critics, dist, policy, stages, supervised, tasks, torchrun
from t2g.folder import run_folder
from t2g.notes import read_usable
from t2g.policy import Policy, autocast, response_logits

TOY = dict(
    learning_rate=0.006, max_steps=450, per_device_train_batch_size=32, optimizer="muon",
    validation_share=0.05, eval_steps=150
)  # fmt: skip
REWARD_UNIT = "sum of delta over the response's tokens"  # in config.json, marks a scalar model


# ---- the score, and the critic -------------------------------------------------------------------


def encode(tokenizer, prompts, responses, limit) -> list[tuple[list[int], list[int]]]:
    """Returns rows (text, EOS) of token ids, with prompts short enough for limit tokens in all."""
    pairs = []
    for prompt, response in zip(prompts, responses):
        text = critics.fitting_prompt(tokenizer, prompt, response, limit - 1)  # 1 for EOS
        pairs.append((text, ""))
    return supervised.encode_pairs(tokenizer, pairs)


def scores(scorer, batch, bf16=False):
    """Returns a score (B,) per text, from the hidden state of its last token before EOS."""
    with autocast(bf16):
        _, states = response_logits(scorer.model, batch)
    return scorer.values(states, batch.mask)[:, -1]


def load(path, device="cpu"):
    """Returns the tokenizer and the Policy that main() saved in a local folder."""
    tokenizer, model = policy.load(path, device)
    scorer = Policy(model).to(device)
    scorer.load_value_head(path)
    unit = getattr(model.config, "reward_unit", None)
    if unit != REWARD_UNIT or not scorer.value_head.weight.any():
        cli.fail(f"{path} is no scalar reward model; name one with --reward_model")
    return tokenizer, scorer


def critic(task, args, batch_size=64):
    """Returns the critic of --reward_model, or of rm_scalar beside the run.

    The reward of a response that does not fit the model's context is None (metric: unparsable).
    """
    path = args.reward_model or Path(args.output_dir).parent / "rm_scalar"
    tokenizer, scorer = load(path, policy.device())
    context = policy.context_length(scorer.model)

    @torch.no_grad()
    def scalar_critic(examples, responses):
        prompts = [example.prompt for example in examples]
        rows, rewards = encode(tokenizer, prompts, responses, context), [None] * len(responses)
        fitting = [n for n, row in enumerate(rows) if supervised.length(row) <= context]
        fitting.sort(key=lambda n: supervised.length(rows[n]))
        for index in supervised.chunks(fitting, batch_size):
            part = [rows[n] for n in index]
            batch, _ = supervised.as_rollout(part, tokenizer.pad_token_id, policy.device())
            for n, score in zip(index, scores(scorer, batch, args.bf16).tolist()):
                rewards[n] = score
        return rewards

    return scalar_critic


# ---- training ------------------------------------------------------------------------------------


def read_rows(path, tokenizer, limit, seed) -> tuple[list[tuple], float, float]:
    """Reads annotations as shuffled rows (text, EOS, standardised target).

    Returns: the rows, and the mean and the standard deviation of the targets.
    """
    records = read_usable(path)
    random.Random(seed).shuffle(records)
    keys = "prompt", "response", "feedback"
    prompts, responses, feedback = ([record[key] for record in records] for key in keys)
    targets = [common.text_reward(tokenizer, *pair) for pair in zip(responses, feedback)]
    mean, std = float(np.mean(targets)), float(np.std(targets))
    if not std:
        cli.fail(f"all {len(targets)} annotations of {path} have the same reward {mean}")
    ids = encode(tokenizer, prompts, responses, limit)
    return [(*row, (reward - mean) / std) for row, reward in zip(ids, targets)], mean, std


def collate(rows, pad_token_id, device):
    """Collates rows (text, EOS, target). Returns: the batch, the mask of EOS, the targets (B,)."""
    batch, trained = supervised.as_rollout([row[:2] for row in rows], pad_token_id, device)
    return batch, trained, torch.tensor([row[2] for row in rows], device=device)


def squared_error(scorer, batch, _, targets, args):
    """Returns the sum of squared errors; targets are in standard deviations from their mean."""
    return (scores(scorer, batch, args.bf16) - targets).square().sum(), {}


METRICS = {"texts": "texts of the batch; the loss is in units of the targets' variance"}
REGRESSION = supervised.Objective(
    "texts", collate, lambda batch, *_: len(batch), squared_error, metrics=METRICS
)


@cli.friendly_errors()
def main():
    parser = cli.parser(__doc__)
    add = cli.flags(parser)
    tasks.add_flags(add)
    add("--model", None, "initial model: run, folder, hub id or .gguf file; sft if not given")
    add("--annotations", None, "records; annotations.jsonl beside --output_dir if not given")
    add("--output_dir", None, "folder of the run; runs/TASK/rm_scalar if not given")
    supervised.add_flags(add, validation_share=0.05)
    task, args = tasks.parse(parser, "scalar_rm", toy=TOY)
    args.output_dir = args.output_dir or f"runs/{task.NAME}/rm_scalar"
    root = Path(args.output_dir).parent
    needed = [] if args.annotations else ["sft", "annotate"]
    earlier = partial(stages.ensure, needed, args, root, args.model)
    with torchrun.session(args.cpu_offload, run_first=earlier):
        torch.manual_seed(args.seed)
        tokenizer, model = policy.load(args.model or root / "sft", empty=True)
        scorer = Policy(model)
        limit = supervised.longest_text(model, args)
        path = args.annotations or root / "annotations.jsonl"
        rows, mean, std = read_rows(path, tokenizer, limit, args.seed)
        heldout, rows = supervised.split(supervised.drop_long(rows, limit), args)
        scorer.model = supervised.prepared(model, args)
        dist.shard(scorer.value_head, cpu_offload=args.cpu_offload)
        with run_folder(args) as folder:
            data = tokenizer, rows, heldout, args, folder, "scalar reward model"
            step = supervised.train(scorer, *data, REGRESSION)
            with torch.no_grad():  # from standard deviations back to reward units
                scorer.value_head.weight.mul_(std)
                scorer.value_head.bias.mul_(std).add_(mean)
            model.config.reward_unit = REWARD_UNIT
            saved = supervised.save(scorer.model, tokenizer, folder, step, args, scorer.value_head)
        print(f"scalar reward model: {saved}")


if __name__ == "__main__":
    main()
