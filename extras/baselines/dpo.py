"""DPO, a baseline: for each prompt, the response with the highest reward is preferred to the worst.

    y+, y- ~ pi_ref(. | x), the responses with the highest and the lowest reward: the sum of
                            delta_t, less the penalty of a missing EOS
    L = - E[ log sigmoid( beta ( log pi(y+|x) / pi_ref(y+|x) - log pi(y-|x) / pi_ref(y-|x) ) ) ]
                                                                    Rafailov et al. 2023, eq. 7

Only the quotes of the feedback count; the critique's words are not read. Pairs are sampled once,
before training, and written to pairs.jsonl in the run's folder. --pairs trains on such a file:
{"prompt", "chosen", "rejected"}, and optionally "chosen_finished" and "rejected_finished", which
are false for a response that was cut off, so that no EOS is learned after it. There is no
resampling during training, and no dropout.

python -m extras.baselines.dpo                                      # the toy, into runs/toy/dpo
python -m extras.baselines.dpo --task summarize --policy HUB_ID --data posts.jsonl --critic rule
python -m extras.baselines.dpo --task summarize --policy HUB_ID --pairs pairs.jsonl
"""

import random

import torch
from torch.nn import functional as F

from extras.baselines import common
from extras.benchmarks import read_texts
from t2g import checkpoint, cli, critics, dist, policy, supervised
from t2g.folder import run_folder
from t2g.log import write_json
from t2g.notes import write_whole
from t2g.policy import autocast, response_logits

TOY = dict(
    num_prompts=720, samples_per_prompt=4, response_length=40, learning_rate=1.7e-4,
    max_steps=180, per_device_train_batch_size=16
)  # fmt: skip


def dpo_loss(logprobs_chosen, logprobs_rejected, ref_chosen, ref_rejected, beta):
    """Returns the DPO loss of each pair (Rafailov et al. 2023, eq. 7).

        h = beta [(log pi(y+) - log ref(y+)) - (log pi(y-) - log ref(y-))]
        L = - log sigmoid(h)

    Args: log-probabilities (B,) of whole responses, in nats; beta > 0, without unit.
    Returns: the losses (B,), and stats: pair_margin, the mean of h, and pair_accuracy, the share
    of pairs with h > 0.

    >>> losses, stats = dpo_loss(*torch.tensor([[-5.0], [-9.0], [-6.0], [-8.0]]), beta=0.5)
    >>> losses, stats["pair_margin"], stats["pair_accuracy"]
    (tensor([0.3133]), 1.0, 1.0)
    """
    margin = beta * ((logprobs_chosen - ref_chosen) - (logprobs_rejected - ref_rejected))
    accuracy = (margin > 0).float().mean().item()
    return -F.logsigmoid(margin), {"pair_margin": margin.mean().item(), "pair_accuracy": accuracy}


def sequence_logprobs(model, batch, trained, bf16=False):
    """Returns log pi (B,) of whole responses, the sum over their trained tokens, in nats."""
    with autocast(bf16):
        logits, _ = response_logits(model, batch)
    losses = F.cross_entropy(logits[trained].float(), batch.response[trained], reduction="none")
    sums = torch.zeros(len(batch), device=losses.device)
    return sums.index_add(0, trained.nonzero()[:, 0], -losses)


# ---- pairs ---------------------------------------------------------------------------------------


def best_and_worst(groups) -> tuple[list[dict], dict]:
    """Pairs the best with the worst response of each group, the Scored responses to one prompt.

    Returns: the pairs, and the share of prompts that give none: "ties", where the best response
    is not better than the worst or has the same text, and "unpaired", where fewer than two
    critiques are readable.
    """
    pairs, ties, unpaired = [], 0, 0
    for group in groups:
        readable = [row for row in group if row.reward is not None]
        ordered = sorted(readable, key=lambda row: row.reward)
        if len(ordered) < 2:
            unpaired += 1
        elif ordered[0].reward == ordered[-1].reward or ordered[0].text == ordered[-1].text:
            ties += 1
        else:
            pairs.append({"prompt": group[0].example.prompt})
            for name, row in (("chosen", ordered[-1]), ("rejected", ordered[0])):
                pairs[-1][name] = row.text
                pairs[-1] |= {f"{name}_reward": row.reward, f"{name}_finished": row.finished}
    counts = f"{len(pairs)} pairs, {ties} ties, {unpaired} with too few readable critiques"
    print(f"{len(groups)} prompts: {counts}", flush=True)
    if not pairs:
        hint = "raise --num_prompts or --samples_per_prompt, or see --critic"
        cli.fail(f"none of {len(groups)} prompts gives a pair; {hint}")
    return pairs, {"ties": ties / len(groups), "unpaired": unpaired / len(groups)}


def sample_pairs(task, args, tokenizer, model, root) -> tuple[list[dict], dict]:
    """Returns pairs of the policy's own responses, and the metrics of the sampling."""
    critic, size = critics.load_critic(task, args, root), args.samples_per_prompt
    examples = common.draw_examples(task, args, tokenizer, model)
    rows, stats = common.sample_and_score(examples, critic, tokenizer, model, args)
    pairs, dropped = best_and_worst([rows[i : i + size] for i in range(0, len(rows), size)])
    return pairs, stats | dropped


def encode(tokenizer, pairs) -> list[list]:
    """Returns rows [prompt, chosen, rejected] of token ids, with EOS after finished responses."""
    sides = []
    for name in ("chosen", "rejected"):
        rows = supervised.encode_pairs(tokenizer, [(pair["prompt"], pair[name]) for pair in pairs])
        finished = [pair.get(f"{name}_finished", True) for pair in pairs]
        sides.append([ids if end else ids[:-1] for (_, ids), end in zip(rows, finished)])
    return [[prompt, *responses] for (prompt, _), *responses in zip(rows, *sides)]


# ---- training ------------------------------------------------------------------------------------


def collate(rows, pad_token_id, device):
    """Collates B pairs as 2B responses, the chosen ones first.

    Returns: the batch, the mask of trained tokens, and the reference's log-probabilities (2, B).
    """
    responses = [(row[0], row[side]) for side in (1, 2) for row in rows]
    references = torch.tensor([row[3:] for row in rows], device=device)
    batch, trained = supervised.as_rollout(responses, pad_token_id, device)
    return batch, trained, references.T


@torch.no_grad()
def add_references(rows, tokenizer, model, args):
    """Returns the rows with log ref of their two responses, of the initial policy. Collective."""
    own = [list(row) for row in dist.share(rows)]
    for part in supervised.by_length(own, args):
        batch, trained, _ = collate(part, tokenizer.pad_token_id, model.device)
        logprobs = sequence_logprobs(model, batch, trained, args.bf16)
        for row, pair in zip(part, torch.stack(logprobs.chunk(2), 1).tolist()):
            row.extend(pair)
    return dist.collect(own, len(rows))


def preference_loss(model, batch, trained, references, args):
    """Returns the sum of dpo_loss() over the pairs of a microbatch, and the sums of its stats."""
    logprobs = sequence_logprobs(model, batch, trained, args.bf16)
    losses, stats = dpo_loss(*logprobs.chunk(2), *references, args.beta)
    return losses.sum(), {name: value * len(losses) for name, value in stats.items()}


METRICS = {
    "pairs": "pairs of the batch",
    "pair_margin": "beta (log pi - log ref) of the chosen minus the rejected response, mean",
    "pair_accuracy": "share of the batch's pairs whose margin is above 0",
}
PREFERENCE = supervised.Objective(
    "pairs", collate, lambda batch, *_: len(batch) // 2, preference_loss, METRICS, dropout=False
)


def add_flags(add):
    common.add_sampling_flags(add, num_prompts=1024, samples_per_prompt=4)
    add("--pairs", None, ".jsonl file of pairs; pairs of the policy's own samples if not given")
    add("--beta", 0.1, "strength of the pull towards the reference")
    supervised.add_flags(add)


@cli.friendly_errors()
def main():
    task, args = common.parse(__doc__, "dpo", add_flags, TOY)
    if args.samples_per_prompt < 2:
        cli.fail("--samples_per_prompt must be at least 2: a pair needs two responses to a prompt")
    pairs, stats = [], {}
    if args.pairs:
        pairs = read_texts(args.pairs, "prompt", "chosen", "rejected")  # fails before the start
    with common.started(args, needs_critic=not pairs) as (root, tokenizer, model):
        # 1. Pairs of responses of the starting policy.
        if not pairs:
            pairs, stats = sample_pairs(task, args, tokenizer, model, root)

        # 2. Log-probabilities of the reference, computed once.
        limit = supervised.longest_text(model, args)
        rows = encode(tokenizer, pairs)
        rows = supervised.drop_long(rows, limit, lambda row: len(row[0]) + max(map(len, row[1:])))
        before = policy.now()
        rows = add_references(rows, tokenizer, model, args)
        stats["seconds_reference"] = policy.now() - before
        stats["reference_tokens"] = sum(2 * len(row[0]) + len(row[1]) + len(row[2]) for row in rows)

        # 3. Training.
        random.Random(args.seed).shuffle(rows)  # the samples are sorted by length
        heldout, rows = supervised.split(rows, args)
        args.data_hash = checkpoint.hash_of(pairs)  # a GPU rounds references differently each time
        model = supervised.prepared(model, args)
        with run_folder(args) as folder:
            if dist.rank() == 0:
                write_whole(folder / "pairs.jsonl", pairs)
                write_json(folder / "sampling.json", [stats])
            data = tokenizer, rows, heldout, args, folder, "DPO"
            step = supervised.train(model, *data, PREFERENCE)
            saved = supervised.save(model, tokenizer, folder, step, args)
        print(f"policy: {saved}")


if __name__ == "__main__":
    main()
