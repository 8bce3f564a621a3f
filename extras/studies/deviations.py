"""What each implementation detail is worth: the toy trained with one detail changed at a time, and its rule as the critic.

    python -m bench.deviations                                   # every row, seeds 0 1 2: about a minute a run and core
    python -m bench.deviations --rows scalar flip:0.3 --seeds 0 1
    python -m bench.deviations --jobs 2                          # two runs side by side, a core each

A row is a list of flags of train_ppo.py, or a patch: a function that puts what the official code does in the place of ours, for
the length of one process. Finished runs are kept under --output_dir and not run again. With the rule as the critic a row
shows the detail and not what a reward model makes of it.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import train_ppo
from t2g import rollout as sampling
from t2g.metrics import interval

METRICS = ("perfect", "coverage", "poor", "perfect_greedy")


# ---- patches: what the official code does --------------------------------------------------------------------------------


def neutral_plus_one():
    """A token that nobody mentions is rewarded with +1 (its recipe for code)."""
    ours = train_ppo.token_rewards

    def patched(tokenizer, rollout, *rest):
        delta, counts = ours(tokenizer, rollout, *rest)
        return torch.where((delta == 0) & rollout.mask, 1.0, delta), counts

    train_ppo.token_rewards = patched


def punctuation_is_masked():
    """Tokens of nothing but punctuation get no gradient, and GAE begins anew behind each of them."""
    ours_sample, ours_whiten = train_ppo.sample, train_ppo.whiten
    now = {}

    def sample(model, tokenizer, *args, **kwargs):
        rollout = ours_sample(model, tokenizer, *args, **kwargs)
        texts = [
            [tokenizer.decode([token]).strip() for token in row]
            for row in rollout.response.tolist()
        ]
        marks = torch.tensor(
            [[bool(t) and not any(c.isalnum() for c in t) for t in row] for row in texts]
        )
        now["words"] = ~marks | (rollout.response == tokenizer.eos_token_id)
        return rollout

    def gae(rewards, values, mask, gamma, lam):
        words = mask & now["words"]
        advantages = torch.zeros_like(rewards)
        next_value = next_advantage = torch.zeros_like(rewards[:, 0])
        for t in reversed(range(rewards.shape[1])):
            td = rewards[:, t] + gamma * next_value - values[:, t]
            advantages[:, t] = next_advantage = (td + gamma * lam * next_advantage) * words[:, t]
            next_value = values[:, t] * words[:, t]
        return advantages, advantages + values

    train_ppo.sample, train_ppo.gae = sample, gae
    train_ppo.whiten = lambda x, mask: ours_whiten(x, mask & now["words"])


def encoded_again():
    """The response is decoded and encoded again, and trained on the tokens that come out of that."""
    ours = train_ppo.sample

    def sample(model, tokenizer, *args, **kwargs):
        rollout = ours(model, tokenizer, *args, **kwargs)
        ends = [[tokenizer.eos_token_id] * bool(finished) for finished in rollout.finished]
        rows = [
            tokenizer.encode(text, add_special_tokens=False) + end
            for text, end in zip(rollout.texts, ends)
        ]
        rows = [torch.tensor(row or [tokenizer.eos_token_id]) for row in rows]
        rollout.mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in rows], batch_first=True
        ).bool()
        rollout.response = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=tokenizer.pad_token_id
        )
        return rollout

    train_ppo.sample = sample


def narrow_sampling():
    """Temperature 0.6 and top-p 0.9 while sampling, with log-probabilities at temperature 1."""
    ours, draw = train_ppo.sample, sampling.draw

    def nucleus(logits, temperature, uniform):
        ordered, index = (logits / temperature).sort(descending=True)
        likely = ordered.softmax(-1)
        kept = ordered.masked_fill(likely.cumsum(-1) - likely > 0.9, -torch.inf)
        return index.gather(-1, draw(kept, 1.0, uniform)[:, None])[:, 0]

    def sample(model, tokenizer, prompts, response_length, temperature, **kwargs):
        sampling.draw = nucleus
        try:
            return ours(model, tokenizer, prompts, response_length, 0.6, **kwargs)
        finally:
            sampling.draw = draw

    train_ppo.sample = sample


def whitened_apart():
    """Each of eight processes whitens its own eight responses, and divides the variance by n - 1."""
    ours = train_ppo.whiten

    def whiten(x, mask):
        parts = [(ours(a, m), m.sum()) for a, m in zip(x.chunk(8), mask.chunk(8))]
        return torch.cat(
            [part * ((n - 1).clamp(min=0) / n.clamp(min=1)).sqrt() for part, n in parts]
        )

    train_ppo.whiten = whiten


def means_of_microbatches():
    """The loss is a mean of each microbatch's own mean, so that tokens of short responses weigh more: here, of four responses."""

    def by_itself(ours):
        return lambda new, old, target, mask, cliprange, count: ours(
            new, old, target, mask, cliprange, mask.sum().clamp(min=1) * 8
        )

    train_ppo.policy_loss, train_ppo.value_loss = (
        by_itself(train_ppo.policy_loss),
        by_itself(train_ppo.value_loss),
    )
    return ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "8"]


ROWS = {
    "ours": [],
    "scalar": ["--reward", "scalar"],
    "a token nobody mentions: +1": neutral_plus_one,
    "masked punctuation": punctuation_is_masked,
    "encoded again": encoded_again,
    "temperature 0.6, top-p 0.9": narrow_sampling,
    "whitened apart": whitened_apart,
    "means of microbatches": means_of_microbatches,
    "adaptive KL, target 6": ["--kl_coef", "0.2", "--kl_target", "6"],
    "KL k1": ["--kl_estimator", "k1"],
    "no penalty without EOS": ["--missing_eos_penalty", "0"],
    "dense": ["--critic", "extras/studies/dense.py", "--dense_critic", "rule"],
    "first": ["--span_weights", "first"],
    "inverse_length": ["--span_weights", "inverse_length"],
    "decayed": ["--span_weights", "decayed"],
    "severity": ["--span_weights", "severity"],
    **{
        f"{kind}:{rate}": ["--critic", "extras/studies/noisy.py", "--noise", f"{kind}:{rate}"]
        for rate in (0.1, 0.3)
        for kind in ("flip", "drop", "shift", "random")
    },
}


def train(row, seed, folder):
    """One run of train_ppo.py in this process."""
    flags = ROWS[row]() or [] if callable(ROWS[row]) else ROWS[row]
    sys.argv = [
        "train_ppo.py",
        "--critic",
        "rule",
        "--seed",
        str(seed),
        "--output_dir",
        folder,
        *flags,
    ]
    train_ppo.main()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=list(ROWS),
        default=list(ROWS),
        metavar="ROW",
        help="; ".join(ROWS),
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one trial each")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, a thread each")
    parser.add_argument(
        "--output_dir",
        default="runs/deviations",
        help="where trials go; those that stand there are not run again",
    )
    parser.add_argument(
        "--train", nargs=3, metavar=("ROW", "SEED", "FOLDER"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.train:
        return train(*args.train)
    if len(args.seeds) < 2:
        parser.error("an interval needs two seeds at least")

    def folder(row, seed):
        return (
            Path(args.output_dir)
            / f"seed-{seed}"
            / row.replace(" ", "_").replace(":", "_").replace(",", "")
        )

    def cell(number, row, seed):
        if not (folder(row, seed) / "result.json").is_file():
            command = [
                sys.executable,
                "-m",
                "bench.deviations",
                "--train",
                row,
                str(seed),
                str(folder(row, seed)),
            ]
            pin = ["taskset", "-c", str(number % args.jobs)] if args.jobs > 1 else []
            done = subprocess.run(
                pin + command,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"{row}, seed {seed}: {done.stderr[-2000:]}")
        print(f"{row}, seed {seed}: done", flush=True)

    for seed in args.seeds:  # the first run of a seed makes its starting policy
        cell(0, "ours", seed)
    with ThreadPoolExecutor(args.jobs) as pool:
        cells = [(row, seed) for row in args.rows for seed in args.seeds]
        list(pool.map(cell, range(len(cells)), *zip(*cells)))

    def after(row):
        return [
            json.loads((folder(row, seed) / "result.json").read_text())["after"]
            for seed in args.seeds
        ]

    table, ours = {}, after("ours")
    for row in dict.fromkeys(["ours", *args.rows]):
        runs = after(row)
        table[row] = {name: interval([run[name] for run in runs]) for name in METRICS}
        table[row]["perfect, less ours"] = interval(
            [run["perfect"] - mine["perfect"] for run, mine in zip(runs, ours)]
        )
    print("| row | " + " | ".join(table["ours"]) + " |\n|---" + "|---" * len(table["ours"]) + "|")
    for row, columns in table.items():
        cells = (
            "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**column) for column in columns.values()
        )
        print(f"| {row} | " + " | ".join(cells) + " |")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
