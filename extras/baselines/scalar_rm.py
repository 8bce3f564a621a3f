"""A scalar reward model, a baseline: one number for a response where train_rm.py's says where.

    L = E[ (score(x, y) - s)^2 ],  s the sum of delta_t over y, from the same annotations

The tokens are those of the reward model's tokenizer. Long prompts are shortened in the middle,
responses never. scalar_critic.py defines the score and is the critic that uses the model.

python -m extras.baselines.scalar_rm                             # the toy, into runs/toy/rm_scalar
python -m extras.baselines.scalar_rm --model HUB_ID --annotations notes.jsonl --lora_r 16
"""

import random
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from extras.baselines.scalar_critic import REWARD_UNIT, encode, scores
from t2g import adapters, cli, critics, policy, stages, supervised, tasks
from t2g.align import resolve, span_rewards, token_offsets
from t2g.folder import run_folder
from t2g.notes import read_annotations

TOY = dict(
    learning_rate=0.006, max_steps=450, per_device_train_batch_size=32, optimizer="muon",
    validation_share=0.05, eval_steps=150
)  # fmt: skip


def target(tokenizer, response, feedback) -> float:
    """Returns the sum of delta_t over the response's tokens."""
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    spans, _ = resolve(response, feedback)
    return span_rewards(token_offsets(tokenizer, ids), spans).sum().item()


def collate(rows, pad_token_id, device):
    """Collates rows (text, EOS, target). Returns: the batch, the mask of EOS, the targets (B,)."""
    batch, trained = supervised.as_rollout([row[:2] for row in rows], pad_token_id, device)
    return batch, trained, torch.tensor([row[2] for row in rows], device=device)


def squared_error(scorer, batch, _, targets, args):
    """Returns the sum of squared errors; targets are in standard deviations from their mean."""
    return (scores(scorer, batch, args.bf16) - targets).square().sum(), {}


@torch.no_grad()
def agreement(scorer, tokenizer, rows, args) -> dict[str, float]:
    """Measures how well scores agree with the targets s_i of held-out rows.

        validation_r2 = 1 - sum_i (score_i - s_i)^2 / sum_i (s_i - mean s)^2
        validation_rank: Spearman's rank correlation

    A number that is undefined, because all targets or all scores are equal, is left out.
    """
    device, score, true = next(scorer.parameters()).device, [], []
    for part in supervised.by_length(rows, args):
        batch, _, targets = collate(part, tokenizer.pad_token_id, device)
        score += scores(scorer, batch, args.bf16).tolist()
        true += targets.tolist()
    score, true, metrics = np.array(score), np.array(true), {}
    if np.ptp(true) > 0:
        error, spread = np.square(score - true).sum(), np.square(true - true.mean()).sum()
        metrics["validation_r2"] = float(1 - error / spread)
        if np.ptp(score) > 0:
            metrics["validation_rank"] = float(spearmanr(score, true).statistic)
    return metrics


METRICS = {
    "texts": "texts of the batch; the loss is in units of target variance",
    "validation_r2": "explained variance of the held-out targets",
    "validation_rank": "rank correlation of scores and held-out targets",
}
REGRESSION = supervised.Objective(
    "texts", collate, lambda batch, *_: len(batch), squared_error, agreement, METRICS
)


def read_rows(path, tokenizer, limit, seed) -> tuple[list[tuple], float, float]:
    """Reads annotations as shuffled rows (text, EOS, standardised target).

    Returns: the rows, and the mean and the standard deviation of the targets.
    """
    records = [record for record in read_annotations(path) if record["feedback"]]
    if not records:
        cli.fail(f"{path} holds no annotation to learn from")
    random.Random(seed).shuffle(records)
    texts, targets = [], []
    for record in records:
        prompt, response = record["prompt"], record["response"]
        texts.append(critics.fitting_prompt(tokenizer, prompt, response, limit - 1))  # 1 for EOS
        targets.append(target(tokenizer, response, record["feedback"]))
    mean, std = float(np.mean(targets)), float(np.std(targets))
    if not std:
        cli.fail(f"all {len(targets)} annotations of {path} have the same reward {mean}")
    pairs = zip(encode(tokenizer, texts), targets)
    return [(*ids, (reward - mean) / std) for ids, reward in pairs], mean, std


def parse_args():
    parser = cli.parser(__doc__)
    add = cli.flags(parser)
    tasks.add_flags(add)
    add("--model", None, "initial model: run, folder, hub id or .gguf file (default: sft)")
    add("--annotations", None, "records of annotate.py (default: annotations.jsonl)")
    add("--output_dir", None, "folder of the run (default: runs/TASK/rm_scalar)")
    supervised.add_flags(add, validation_share=0.05)
    task, args = tasks.parse(parser, "scalar_rm", toy=TOY)
    args.output_dir = args.output_dir or f"runs/{task.NAME}/rm_scalar"
    return args


@cli.friendly_errors()
def main():
    args = parse_args()
    root = Path(args.output_dir).parent
    if not args.annotations:
        stages.ensure(["sft", "annotate"], args, root, args.model)
    start = time.perf_counter()

    torch.manual_seed(args.seed)
    tokenizer, model = policy.load(args.model or root / "sft", policy.device())
    scorer = policy.Policy(model).to(policy.device())
    limit = supervised.longest_text(model, args)
    path = args.annotations or root / "annotations.jsonl"
    rows, mean, std = read_rows(path, tokenizer, limit, args.seed)
    heldout, rows = supervised.split(supervised.drop_long(rows, limit), args)
    scorer.model = adapters.added(model, args)
    with run_folder(args) as folder:
        desc = "scalar reward model"
        step = supervised.train(scorer, tokenizer, rows, heldout, args, folder, desc, REGRESSION)
        with torch.no_grad():  # from standard deviations back to reward units
            scorer.value_head.weight.mul_(std)
            scorer.value_head.bias.mul_(std).add_(mean)
        model.config.reward_unit = REWARD_UNIT
        saved = supervised.save(scorer.model, tokenizer, folder, step, args, scorer.value_head)
    print(f"scalar reward model: {saved} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
