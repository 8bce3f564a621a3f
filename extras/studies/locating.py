"""Where does locating pay? Rewards at the spans against their sum at the last token, by length of response and number of spans.

    python -m bench.locating                                     # the whole grid: progress, a table, JSON, docs/locating.png
    python -m bench.locating --lengths 50 150 --spans 8 --seeds 0 1
    python -m bench.locating --jobs 2                            # two runs side by side, a core each

The task is made for the question: list so many items of a word, numbered. Which item comes next follows from the word and the last
digit of its number, so there is as much to learn however long the list is, and the starting policy of a seed, the same for all of
its runs, gets each of them wrong at a rate of its own. A rule marks items as right or wrong, but only so many of a response, drawn
at random. Marks weigh 1 / their number and KL is paid per item, so rewards, and what is best under them, are alike in all cells.

The learning rate is the one that did best for the length and the reward at the middle number of spans and TUNING_SEED, which is no
seed of the table. Finished runs are kept under --output_dir and not run again; remove the folder after a change of the task.
"""

import argparse
import json
import multiprocessing
import random
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import train_ppo
import train_sft
from t2g import tasks
from t2g.cli import fail
from t2g.critics import quote_of
from t2g.feedback import Feedback
from t2g.log import read_jsonl
from t2g.metrics import interval
from t2g.tasks import Example
from t2g.tasks.toy import CHAT_TEMPLATE

KEYS = "oak elm ash fir yew bay box may".split()
WORDS = (
    "plum kiwi fig lime pear date corn bean leek rice salt milk tea wine beer cake soup jam egg ham fish crab duck goat lamb hare "
    "deer wolf lynx seal crow hawk dove swan moth wasp frog toad newt carp"
).split()
SLOTS = 10  # last digits of a number
MAX_ITEMS = 200
LENGTHS, LEARNING_RATES = [50, 150, 400], [1e-4, 3e-4, 6e-4]
LAMBDAS = {
    "span": 0.95,
    "scalar": 1.0,
}  # one number at the last token must reach the first one: 0.95^400 is nothing
KL_COST = 0.5  # the KL coefficient, times the items of the response
TUNING_SEED = 100
SMOOTHED = 5  # rollouts over which KL and score are averaged, for each batch is small
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
)  # told apart by colour-blind readers; markers differ as well
METRICS = {
    "right": "share of the items asked for that stand in their place and are right",
    "items": "items of the response",
}
DEFAULTS = {
    "train_sft": dict(learning_rate=0.01, max_steps=400, per_device_train_batch_size=32, optimizer="muon"),
    "train_ppo": dict(max_steps=30, per_device_train_batch_size=16, num_mini_batches=2, num_ppo_epochs=2, eval_samples=64,
                      span_weights="severity"),
}  # fmt: skip
QUICK = dict(lengths=[50], spans=["2", "all"], seeds=[0, 1], learning_rates=[3e-4],
             sft_flags=["--max_steps", "2", "--per_device_train_batch_size", "4"],
             ppo_flags=["--max_steps", "2", "--per_device_train_batch_size", "2", "--eval_samples", "4"])  # fmt: skip


# ---- the task ------------------------------------------------------------------------------------------------------------


def habits(seed) -> dict:
    """(key, slot) -> the right word, the wrong one that a starting policy takes for it, and how often it is right."""
    rng = random.Random(f"habits {seed}")
    return {
        (key, slot): (*rng.sample(WORDS, 2), rng.uniform(0.3, 0.9))
        for key in KEYS
        for slot in range(SLOTS)
    }


def task(spans, lengths):
    """A task as train_ppo.py wants it: lists of one of these lengths in tokens, `spans` of their items marked."""

    def load(args):
        train = [
            Example(f"{key} {length // 2}", "", habits(args.seed))
            for length in lengths
            for key in KEYS
        ]
        return train, train * 100

    def critique(example, response):
        rng = random.Random(f"marks {example.prompt} {response}")
        marks, asked, good, poor = judged(example, response), int(example.prompt.split()[1]), [], []
        count = asked if spans == "all" else min(int(spans), asked)
        places = range(
            max(asked, len(marks))
        )  # an item that is missing may be drawn and cannot be quoted
        for place in sorted(rng.sample(places, count)):
            if place < len(marks):
                start, end, right = marks[place]
                (good if right else poor).append(
                    {"text": quote_of(response, start, end), "severity": 1 / count}
                )
        return Feedback(
            f"{len(poor)} of the {len(good) + len(poor)} items that I looked at are wrong.",
            good,
            poor,
        )

    shared = dict(
        score=score, METRICS=METRICS, DEFAULTS=DEFAULTS, sft_pairs=sft_pairs, new_model=new_model
    )
    return SimpleNamespace(load=load, critique=critique, **shared)


def judged(example, response) -> list[tuple[int, int, bool]]:
    """The characters of each item, and whether it is right: the next number, and the word that belongs there."""
    key, asked = example.prompt.split()
    found = []
    for place, item in enumerate(re.finditer(r"(?:([a-z]+) )?(\d+)|\S+", response), 1):
        word, number = item.groups()
        right = (
            number == str(place)
            and place <= int(asked)
            and word == example.facts[key, place % SLOTS][0]
        )
        found.append((*item.span(), right))
    return found


def score(example, response):
    marks = judged(example, response)
    return {
        "right": sum(right for *_, right in marks) / int(example.prompt.split()[1]),
        "items": len(marks),
    }


def sft_pairs(args, examples):
    """Lists with wrong items at the rate of each habit."""
    rng, pairs = random.Random(f"noise {args.seed}"), []
    for _ in range(args.max_steps * args.per_device_train_batch_size):
        example = rng.choice(examples)
        key, asked = example.prompt.split()
        items = []
        for place in range(1, int(asked) + 1):
            right, wrong, rate = example.facts[key, place % SLOTS]
            items.append(f"{right if rng.random() < rate else wrong} {place}")
        pairs.append((example.prompt, " ".join(items)))
    return pairs


def new_model(seed):
    """A token a word and a token a number; a Llama of two layers."""
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
    vocabulary = [*special, *KEYS, *WORDS, *map(str, range(1, MAX_ITEMS + 1))]
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<|unknown|>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(pad_token="<|pad|>", eos_token="<|end|>", unk_token="<|unknown|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:4]})
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, rope_theta=10000.0,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer, LlamaForCausalLM(config)


# ---- the runs ------------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One run of train_ppo.py."""

    seed: int
    length: int  # tokens of a response
    spans: str  # a number, or all
    reward: str
    learning_rate: float

    def folder(self, root) -> Path:
        return Path(root) / f"seed-{self.seed}" / "-".join(map(str, self[1:]))


def call(script, a_task, flags, log):
    """The script in this process, on this task; what it prints goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    tasks.load_task = lambda name: a_task
    sys.argv = [script.__name__, "--task", "locating", *map(str, flags)]
    with open(log, "w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        script.main()


def start(seed, args):
    """The starting policy of a seed, which knows lists of every length."""
    folder = Path(args.output_dir) / f"seed-{seed}" / "sft"
    if not list(folder.glob("checkpoint-*")):
        flags = ["--seed", seed, "--output_dir", folder, *args.sft_flags]
        call(train_sft, task("all", LENGTHS), flags, folder.with_suffix(".log"))
    return f"starting policy, seed {seed}"


def train(cell, args):
    torch.set_num_threads(1)
    folder, items = cell.folder(args.output_dir), cell.length // 2
    if not (folder / "result.json").is_file():
        flags = [
            "--critic",
            "rule",
            "--policy",
            Path(args.output_dir) / f"seed-{cell.seed}" / "sft",
            "--seed",
            cell.seed,
        ]
        flags += [
            "--reward",
            cell.reward,
            "--lam",
            LAMBDAS[cell.reward],
            "--learning_rate",
            cell.learning_rate,
        ]
        flags += [
            "--kl_coef",
            KL_COST / items,
            "--response_length",
            cell.length * 5 // 4,
            "--output_dir",
            folder,
            *args.ppo_flags,
        ]
        call(train_ppo, task(cell.spans, [cell.length]), flags, folder.with_suffix(".log"))
    return " ".join(f"{name} {value}" for name, value in cell._asdict().items())


def run_all(function, cells, args):
    """The function of every cell, --jobs at a time, with a line for each one that is done."""
    if args.jobs == 1:
        finished = (function(cell, args) for cell in cells)
    else:
        pool = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"))
        finished = pool.map(function, cells, [args] * len(cells))
    for number, name in enumerate(finished, 1):
        print(f"{number} of {len(cells)}: {name}", flush=True)


def tuning(length, reward, args) -> list[Cell]:
    """The runs that the learning rate is chosen by."""
    return [
        Cell(TUNING_SEED, length, args.spans[len(args.spans) // 2], reward, rate)
        for rate in args.learning_rates
    ]


# ---- what they say -------------------------------------------------------------------------------------------------------


def read(cell, args) -> dict:
    """Shares of right items before and after; KL and items at the end; and the smoothed curves of KL and of right items."""
    folder = cell.folder(args.output_dir)
    result, rows = (
        json.loads((folder / "result.json").read_text()),
        read_jsonl(folder / "metrics.jsonl"),
    )
    width = min(SMOOTHED, len(rows))
    kl, right = (
        np.convolve([row[name] for row in rows], np.ones(width) / width, "valid")
        for name in ("kl", "right")
    )
    before, after = result["before"]["right"], result["after"]["right"]
    found = {
        "before": before,
        "after": after,
        "mended": (after - before) / (1 - before),
        "kl": kl[-1],
    }
    return found | {"items": result["after"]["items"], "curve": (np.maximum.accumulate(kl), right)}


def compare(length, spans, best, args) -> dict:
    """Intervals over seeds of what both rewards end with, of the gain, and of the gain at the lower of the two final KLs."""
    runs = {
        reward: [read(Cell(seed, length, spans, reward, best[reward]), args) for seed in args.seeds]
        for reward in LAMBDAS
    }
    found = {
        f"{name}, {reward}": [run[name] for run in runs[reward]]
        for name in ("after", "kl", "items")
        for reward in runs
    }
    pairs = list(zip(runs["span"], runs["scalar"]))
    found["gain"] = [a["after"] - b["after"] for a, b in pairs]
    found["gain in mistakes mended"] = [a["mended"] - b["mended"] for a, b in pairs]
    equal = [min(a["curve"][0][-1], b["curve"][0][-1]) for a, b in pairs]
    found["gain at equal KL"] = [
        np.interp(kl, *a["curve"]) - np.interp(kl, *b["curve"]) for kl, (a, b) in zip(equal, pairs)
    ]
    return {"before": interval([run["before"] for run in runs["span"]])} | {
        name: interval(x) for name, x in found.items()
    }


def plot(table, args):
    """The gain against the length, a line for each number of spans, at the end of training and at equal KL."""
    axes = (figure := Figure(figsize=(9, 3.8), layout="constrained")).subplots(
        1, 2, sharex=True, sharey=True
    )
    for axis, name in zip(axes, ("gain", "gain at equal KL")):
        for spans, colour, marker in zip(args.spans, COLOURS, "os^D"):
            cells = [table[f"{length} tokens, {spans}"][name] for length in args.lengths]
            axis.plot(
                args.lengths,
                [c["mean"] for c in cells],
                color=colour,
                marker=marker,
                label=f"{spans} spans",
            )
            axis.fill_between(
                args.lengths,
                [c["low"] for c in cells],
                [c["high"] for c in cells],
                color=colour,
                alpha=0.15,
                lw=0,
            )
        axis.axhline(0, color="grey", lw=0.8)
        axis.set(
            xscale="log",
            xlabel="tokens of a response",
            title={"gain": "after training"}.get(name, "at equal KL"),
        )
        axis.set_xticks(args.lengths, map(str, args.lengths))
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of right items,\nspan rewards less one scalar")
    axes[0].legend(frameon=False, title="feedback a response")
    figure.savefig(args.plot, dpi=150)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--lengths",
        nargs="+",
        type=int,
        choices=LENGTHS,
        default=LENGTHS,
        help="tokens of a response, two an item",
    )
    add("--spans", nargs="+", default=["2", "8", "all"], help="marks of a response, numbers or all")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="two or more")
    add("--jobs", type=int, default=1, help="runs side by side, a thread each")
    add("--output_dir", help="runs/locating, or runs/locating-quick, if not given")
    add("--plot", help="docs/locating.png, or in --output_dir with --quick, if not given")
    add("--quick", action="store_true", help="a few steps of the smallest runs: does it work?")
    parser.set_defaults(learning_rates=LEARNING_RATES, sft_flags=[], ppo_flags=[])
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    args.output_dir = args.output_dir or ("runs/locating-quick" if args.quick else "runs/locating")
    args.plot = args.plot or (
        f"{args.output_dir}/locating.png" if args.quick else "docs/locating.png"
    )
    if len(args.seeds) < 2:
        fail("an interval needs two seeds at least; give more --seeds")
    if not all(spans == "all" or (spans.isdecimal() and int(spans)) for spans in args.spans):
        fail(f"--spans are numbers above 0, or all, not {' '.join(args.spans)}")
    return args


def main():
    args = parse_args()
    torch.set_num_threads(1)
    run_all(start, [TUNING_SEED, *args.seeds], args)
    tuned = {
        (length, reward): tuning(length, reward, args)
        for length in args.lengths
        for reward in LAMBDAS
    }
    run_all(train, [cell for cells in tuned.values() for cell in cells], args)
    best = {
        key: max(cells, key=lambda cell: read(cell, args)["after"]).learning_rate
        for key, cells in tuned.items()
    }
    cells = [
        (seed, length, spans)
        for seed in args.seeds
        for length in args.lengths
        for spans in args.spans
    ]
    run_all(
        train,
        [Cell(*cell, reward, best[cell[1], reward]) for cell in cells for reward in LAMBDAS],
        args,
    )

    table = {}
    for length in args.lengths:
        chosen = {reward: best[length, reward] for reward in LAMBDAS}
        table |= {
            f"{length} tokens, {spans}": compare(length, spans, chosen, args)
            for spans in args.spans
        }
    columns = list(next(iter(table.values())))
    print("| tokens, spans | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for row, found in table.items():
        print(
            f"| {row} | "
            + " | ".join(
                "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**found[name]) for name in columns
            )
            + " |"
        )
    plot(table, args)
    rates = {f"{length} tokens, {reward}": rate for (length, reward), rate in best.items()}
    print(f"plot: {args.plot}\n{json.dumps({'table': table, 'learning_rates': rates})}")


if __name__ == "__main__":
    main()
