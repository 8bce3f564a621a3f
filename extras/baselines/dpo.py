"""DPO, a baseline: of each prompt's responses the critic's best is preferred to its worst, and no word of the critique is read.

    y+, y- ~ pi_ref(. | x), the highest and the lowest sum of delta_t among samples
    L = - E[ log sigmoid( beta ( log pi(y+|x) / pi_ref(y+|x) - log pi(y-|x) / pi_ref(y-|x) ) ) ]      Rafailov et al. 2023, eq. 7

    python train_dpo.py                                            # the toy, every earlier stage included, into runs/toy/dpo
    python train_dpo.py --task summarize --policy HUB_ID --data posts.jsonl --critic rule --output_dir runs/posts/dpo
    python train_dpo.py --policy HUB_ID --pairs pairs.jsonl --output_dir runs/mine/dpo

The pairs are written into the run's folder before training, and --pairs takes them or others: {"prompt", "chosen", "rejected"}, and
"chosen_finished" and "rejected_finished", false where a response was cut off, so that no EOS is learnt there. Left out: new samples
while training goes on.
"""

import random
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from extras.baselines import offline
from t2g import adapters, checkpoint, cli, critics, policy, stages, supervised, tasks
from t2g.log import read_jsonl, write_json
from t2g.notes import write_whole
from t2g.policy import autocast, response_logits


def dpo_loss(logprobs_chosen, logprobs_rejected, ref_chosen, ref_rejected, beta):
    """Direct preference optimisation, a loss for each pair.

        h = beta [(log pi(y+) - log ref(y+)) - (log pi(y-) - log ref(y-))]
        L = - log sigmoid(h)                                                        Rafailov et al. 2023, eq. 7

    Args: log-probabilities (B,) of whole responses, in nats; beta above 0, without unit.
    Returns: the losses (B,), and stats of the B pairs: "pair_margin", the mean of h, and "pair_accuracy", the share of h > 0.

    >>> losses, stats = dpo_loss(*torch.tensor([[-5.0], [-9.0], [-6.0], [-8.0]]), beta=0.5)
    >>> losses, stats["pair_margin"], stats["pair_accuracy"]
    (tensor([0.3133]), 1.0, 1.0)
    """
    margin = beta * ((logprobs_chosen - ref_chosen) - (logprobs_rejected - ref_rejected))
    stats = {
        "pair_margin": margin.mean().item(),
        "pair_accuracy": (margin > 0).float().mean().item(),
    }
    return -F.logsigmoid(margin), stats


def response_logprobs(model, batch, learnt, bf16=False):
    """log pi (B,) of whole responses: the sum over the tokens that are learnt, in nats and fp32."""
    with autocast(bf16):
        logits, _ = response_logits(model, batch)
    logprobs = -F.cross_entropy(logits[learnt].float(), batch.response[learnt], reduction="none")
    return torch.zeros(len(batch), device=logprobs.device).index_add(
        0, learnt.nonzero()[:, 0], logprobs
    )


# ---- pairs -------------------------------------------------------------------------------------------------------------


def best_and_worst(groups) -> tuple[list[dict], dict]:
    """A pair from each prompt's responses, and the shares of prompts that give none.

    "ties": the best is not better than the worst, or they are one text; "unpaired": fewer than two critiques can be read.
    """
    pairs, ties, unpaired = [], 0, 0
    for group in groups:
        readable = sorted(
            (row for row in group if row.reward is not None), key=lambda row: row.reward
        )
        if len(readable) < 2:
            unpaired += 1
        elif (worst := readable[0]).reward == (
            best := readable[-1]
        ).reward or worst.text == best.text:
            ties += 1
        else:
            pair = {"prompt": best.example.prompt}
            for name, row in (("chosen", best), ("rejected", worst)):
                pair |= {
                    name: row.text,
                    f"{name}_reward": row.reward,
                    f"{name}_finished": row.finished,
                }
            pairs.append(pair)
    print(
        f"{len(groups)} prompts: {len(pairs)} pairs, {ties} ties, {unpaired} with too few readable critiques",
        flush=True,
    )
    return pairs, {"ties": ties / len(groups), "unpaired": unpaired / len(groups)}


def sampled(task, args, tokenizer, model, root) -> tuple[list[dict], dict]:
    """Pairs of the policy's own responses, and the metrics of the sampling."""
    critic = critics.load_critic(task, args, root, policy.device())
    examples = offline.prompts_of(task, args, tokenizer)
    rows, stats = offline.scored(
        examples, [example.prompt for example in examples], critic, tokenizer, model, args
    )
    size = args.samples_per_prompt
    pairs, dropped = best_and_worst([rows[i : i + size] for i in range(0, len(rows), size)])
    if not pairs:
        cli.fail(
            f"none of {args.num_prompts} prompts gives a pair; raise --num_prompts or --samples_per_prompt, or see --critic"
        )
    return pairs, stats | dropped


def read_pairs(path) -> list[dict]:
    pairs = read_jsonl(path)
    for number, pair in enumerate(pairs, 1):
        if wrong := [
            name for name in ("prompt", "chosen", "rejected") if not isinstance(pair.get(name), str)
        ]:
            cli.fail(f"record {number} of {path} has no {', '.join(wrong)}; each must be a text")
    if not pairs:
        cli.fail(f"{path} holds no pair")
    return pairs


def encode(tokenizer, pairs) -> list[tuple]:
    """Rows (prompt, chosen, rejected) of token ids, EOS behind the responses that ended by themselves."""
    sides = []
    for name in ("chosen", "rejected"):
        rows = supervised.encode_pairs(tokenizer, [(pair["prompt"], pair[name]) for pair in pairs])
        ended = [pair.get(f"{name}_finished", True) for pair in pairs]
        sides.append(
            [(prompt, ids if end else ids[:-1]) for (prompt, ids), end in zip(rows, ended)]
        )
    return [(prompt, chosen, rejected) for (prompt, chosen), (_, rejected) in zip(*sides)]


# ---- training ----------------------------------------------------------------------------------------------------------


def collate(rows, pad_token_id, device):
    """Pairs as a microbatch of 2B responses, the chosen ones first, and the references' log-probabilities (2, B)."""
    sides = [(row[0], row[side]) for side in (1, 2) for row in rows]
    references = torch.tensor([row[3:] for row in rows], device=device)
    return *supervised.as_rollout(sides, pad_token_id, device), references.T


def preference(model, batch, learnt, references, args):
    """The sum of dpo_loss() over a microbatch's pairs, and of its stats."""
    logprobs = response_logprobs(model, batch, learnt, args.bf16)
    losses, stats = dpo_loss(*logprobs.chunk(2), *references, args.beta)
    return losses.sum(), {name: value * len(losses) for name, value in stats.items()}


PREFERENCE = supervised.Objective("pairs", collate, lambda batch, *_: len(batch) // 2, preference)


@torch.no_grad()
def with_references(rows, tokenizer, model, args) -> list[tuple]:
    """The rows with log ref of the chosen and of the rejected response behind them: the policy's, before it is trained."""
    found = {}
    for some in supervised.by_length([(*row, number) for number, row in enumerate(rows)], args):
        batch, learnt, _ = collate([row[:3] for row in some], tokenizer.pad_token_id, model.device)
        logprobs = response_logprobs(model, batch, learnt, args.bf16)
        found |= {
            row[3]: references
            for row, references in zip(some, torch.stack(logprobs.chunk(2), 1).tolist())
        }
    return [(*row, *found[number]) for number, row in enumerate(rows)]


@torch.no_grad()
def check_start(model, rows, tokenizer, args):
    """Before the first update log pi is log ref, within rounding, as the loop of training computes it: every margin is 0."""
    batch, learnt, references = collate(rows, tokenizer.pad_token_id, model.device)
    logprobs = response_logprobs(model.train(), batch, learnt, args.bf16)
    error = ((logprobs - references.flatten()).abs() / learnt.sum(1).clamp(min=1)).max().item()
    if not error <= (0.05 if args.bf16 else 1e-4):
        raise RuntimeError(
            f"before the first update policy and reference must agree, but log pi differs by {error:.2g} nats a token; "
            "has the model dropout?"
        )


def longest(row) -> int:
    """Tokens of a row's prompt with the longer of its responses."""
    return len(row[0]) + max(len(row[1]), len(row[2]))


def parse_args():
    parser = cli.parser(__doc__)
    add = parser.add_argument
    tasks.add_flags(add)
    offline.add_flags(add, num_prompts=1024, samples_per_prompt=4)
    add(
        "--pairs",
        help="a .jsonl file of pairs to learn from; pairs of the policy's own samples if not given",
    )
    add("--output_dir", help="where the run goes; runs/TASK/dpo if not given")
    add(
        "--beta",
        type=cli.positive(float),
        default=0.1,
        help="how dear it is to leave the reference",
    )
    supervised.add_flags(add)
    task, args = tasks.parse(parser, "train_dpo")
    if args.samples_per_prompt < 2:
        cli.fail("--samples_per_prompt must be 2 or more: a pair takes two responses to a prompt")
    args.output_dir = args.output_dir or f"runs/{task.NAME}/dpo"
    return task, args


def main():
    task, args = parse_args()
    root = Path(args.output_dir).parent
    stages.ensure(
        ["sft", *([] if args.pairs else critics.stages_before(args))], args, root, args.policy
    )
    start = time.perf_counter()

    # 1. Pairs, of samples of the starting policy.
    torch.manual_seed(args.seed)
    tokenizer, model = policy.load(args.policy or root / "sft", policy.device())
    pairs, stats = (
        (read_pairs(args.pairs), {}) if args.pairs else sampled(task, args, tokenizer, model, root)
    )

    # 2. Reference log-probabilities, once.
    rows = supervised.drop_long(
        encode(tokenizer, pairs), supervised.longest_text(model, args), longest
    )
    before = policy.now()
    rows = with_references(rows, tokenizer, model, args)
    read = sum(2 * len(row[0]) + len(row[1]) + len(row[2]) for row in rows)
    stats |= {"reference_tokens": read, "seconds_reference": policy.now() - before}
    random.Random(args.seed).shuffle(rows)  # samples come in order of their prompts' length
    heldout, rows = supervised.split(rows, args)

    # 3. DPO.
    model = adapters.added(model, args)
    check_start(model, rows[: args.per_device_train_batch_size], tokenizer, args)
    with checkpoint.run_folder(args) as folder:
        write_whole(folder / "pairs.jsonl", pairs)
        write_json(folder / "sampling.json", [stats])
        step = supervised.train(model, tokenizer, rows, heldout, args, folder, "DPO", PREFERENCE)
        saved = supervised.save(model, tokenizer, folder, step, args)
    print(f"policy: {saved} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
