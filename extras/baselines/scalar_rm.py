"""Stage 2 for a baseline: a reward model that says one number of a whole response, where train_rm.py's says what and where.

L = E[ (score(x, y) - s)^2 ]        s = sum over the tokens of y of delta_t, from the same annotations: good tokens minus poor ones

python train_scalar_rm.py                                          # the toy's, started from its policy, into runs/toy/rm_scalar
python train_scalar_rm.py --model HUB_ID --annotations notes.jsonl --output_dir runs/posts/rm_scalar --lora_r 16

Tokens are those of the reward model's tokenizer. Long prompts are shortened in their middle, never the response. The score itself
is in t2g/scalar_head.py.
"""

import random
import time
from pathlib import Path

import numpy as np
import torch

from extras.baselines.scalar_head import REWARD_UNIT, encode, scores
from t2g import adapters, checkpoint, cli, critics, policy, stages, supervised, tasks
from t2g.align import resolve, span_rewards, token_offsets
from t2g.notes import read_annotations


def target(tokenizer, response, feedback) -> float:
    """The sum over the response's tokens of delta_t."""
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return span_rewards(token_offsets(tokenizer, ids), resolve(response, feedback)[0]).sum().item()


def collate(rows, pad_token_id, device):
    """Rows (text, EOS, target) as a microbatch; the targets are (B,)."""
    batch, learnt = supervised.as_rollout([row[:2] for row in rows], pad_token_id, device)
    return batch, learnt, torch.tensor([row[2] for row in rows], device=device)


def squared_error(scorer, batch, _, targets, args):
    """The sum of squared errors, of targets in standard deviations from their mean."""
    return (scores(scorer, batch, args.bf16) - targets).square().sum(), {}


@torch.no_grad()
def agreement(scorer, tokenizer, rows, args) -> dict[str, float]:
    """How well the scores agree with the targets s_i of rows; what is not defined, where all of one side are the same, is left out.

    validation_r2 = 1 - sum_i (score_i - s_i)^2 / sum_i (s_i - mean s)^2        validation_rank: Spearman's rank correlation
    """
    from scipy.stats import spearmanr

    device = next(scorer.parameters()).device
    parts = [
        collate(some, tokenizer.pad_token_id, device) for some in supervised.by_length(rows, args)
    ]
    said = (
        torch.cat([scores(scorer, batch, args.bf16) for batch, _, _ in parts])
        .double()
        .cpu()
        .numpy()
    )
    true = torch.cat([targets for _, _, targets in parts]).double().cpu().numpy()
    found = {}
    if np.ptp(true) > 0:
        found["validation_r2"] = float(
            1 - np.square(said - true).sum() / np.square(true - true.mean()).sum()
        )
        if np.ptp(said) > 0:
            found["validation_rank"] = float(spearmanr(said, true).statistic)
    return found


REGRESSION = supervised.Objective(
    "texts", collate, lambda batch, *_: len(batch), squared_error, agreement
)


def main():
    parser = cli.parser(__doc__)
    add = parser.add_argument
    tasks.add_flags(add)
    add(
        "--model",
        help="what to start from: a run, a folder, a hub id or a .gguf file; sft beside --output_dir if not given",
    )
    add(
        "--annotations",
        help="records as annotate.py writes them; annotations.jsonl beside --output_dir if not given",
    )
    add("--output_dir", help="where the run goes; runs/TASK/rm_scalar if not given")
    supervised.add_flags(add, validation_share=0.05)
    task, args = tasks.parse(parser, "train_scalar_rm")
    args.output_dir = args.output_dir or f"runs/{task.NAME}/rm_scalar"
    root = Path(args.output_dir).parent
    if not args.annotations:
        stages.ensure(["sft", "annotate"], args, root, args.model)
    start = time.perf_counter()

    torch.manual_seed(args.seed)
    tokenizer, model = policy.load(args.model or root / "sft", policy.device())
    scorer = policy.Policy(model).to(policy.device())
    records = [
        record
        for record in read_annotations(args.annotations or root / "annotations.jsonl")
        if record["feedback"]
    ]
    if not records:
        cli.fail("the data set is empty: there is no annotation to learn from")
    random.Random(args.seed).shuffle(records)
    room = supervised.longest_text(model, args)
    asked = [
        critics.fitting_prompt(tokenizer, record["prompt"], record["response"], room - 1)
        for record in records
    ]  # 1 for EOS
    targets = [target(tokenizer, record["response"], record["feedback"]) for record in records]
    mean, std = float(np.mean(targets)), float(np.std(targets))
    if not std:
        cli.fail(
            f"all {len(targets)} annotations come to the same reward, {mean}: there is nothing to learn from them"
        )
    rows = [
        (text, eos, (s - mean) / std) for (text, eos), s in zip(encode(tokenizer, asked), targets)
    ]
    heldout, rows = supervised.split(supervised.drop_long(rows, room), args)
    scorer.model = adapters.added(model, args)
    with checkpoint.run_folder(args) as folder:
        step = supervised.train(
            scorer, tokenizer, rows, heldout, args, folder, "scalar reward model", REGRESSION
        )
        with torch.no_grad():  # from standard deviations back to rewards
            scorer.value_head.weight.mul_(std)
            scorer.value_head.bias.mul_(std).add_(mean)
        model.config.reward_unit = REWARD_UNIT
        saved = supervised.save(scorer.model, tokenizer, folder, step, args, scorer.value_head)
    print(f"scalar reward model: {saved} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
