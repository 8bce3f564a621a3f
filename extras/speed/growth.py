"""How the cost of a step grows: seconds of sampling, scoring and one epoch of the update, from 32 to 1024 response tokens, from 4
to 128 responses, and from 8 to 128 thousand tokens of the vocabulary.

python -m bench.growth MODEL [--plot docs/growth.png]   # MODEL: a folder, a hub id or a .gguf file; ten minutes on 2 cores

Prompts have 32 tokens; what is not varied is 4 responses of 64 tokens (32 where responses are many), in microbatches of 4. The
model of another vocabulary has the shape of MODEL and random weights. Times are medians over turns; a slope is that of log seconds
against log size between the two largest sizes: 1 is linear, 2 quadratic.
"""

import argparse
import json
import math
from statistics import median
from types import SimpleNamespace

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import train_ppo
from extras.speed.step import WORDS, endless
from t2g import cpu
from t2g.policy import Policy, now
from t2g.rollout import Rollout, sample

PROMPT, MICROBATCH = 32, 4
SIZES = {
    "response tokens": [32, 64, 128, 256, 512, 1024],
    "responses": [4, 8, 16, 32, 64, 128],
    "vocabulary": [8192, 16384, 32768, 65536, 131072],
}
PARTS = ("rollout", "score", "update")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id or a .gguf file")
    parser.add_argument("--plot", help="draw the figure there, a .png")
    parser.add_argument("--turns", type=int, default=1, help="how often all is measured")
    parser.add_argument("--bf16", action="store_true", help="products in bf16")
    args = parser.parse_args()
    tokenizer, model = endless(args.model)
    turns = {(what, size): [] for what in SIZES for size in SIZES[what]}
    one("responses", MICROBATCH, tokenizer, model, args)  # the first pass of all is slow
    for key in tqdm(list(turns) * args.turns, unit="size"):
        turns[key].append(one(*key, tokenizer, model, args))
    result = {}
    for what, sizes in SIZES.items():
        parts = {
            part: {size: median(turn[part] for turn in turns[what, size]) for size in sizes}
            for part in measured(what)
        }
        result[what] = {
            part: {"seconds": seconds, "slope": slope(seconds)} for part, seconds in parts.items()
        }
    for what, parts in result.items():
        print(f"\n{what:18}" + "".join(f"{size:>10}" for size in SIZES[what]) + f"{'slope':>10}")
        for part, row in parts.items():
            print(
                f"  {part:16}"
                + "".join(f"{value:10.2f}" for value in row["seconds"].values())
                + f"{row['slope']:10.2f}"
            )
    if args.plot:
        draw(result, args.plot)
    print(json.dumps(result))


def measured(what):
    return PARTS[1:] if what == "vocabulary" else PARTS


def one(what, size, tokenizer, model, args) -> dict:
    """Seconds of the parts of a step in which one thing has this size."""
    T, rows = {
        "response tokens": (size, MICROBATCH),
        "responses": (32, size),
        "vocabulary": (64, MICROBATCH),
    }[what]
    found = {}
    if what == "vocabulary":
        config = type(model.config).from_dict(model.config.to_dict() | {"vocab_size": size})
        model = (
            cpu.use(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
            .to(model.device)
            .eval()
        )
    else:
        prompts = [" ".join(WORDS)] * rows
        start = now()
        sample(model, tokenizer, prompts, T, bf16=args.bf16)
        found["rollout"] = now() - start
    flags = dict(
        num_ppo_epochs=1,
        num_mini_batches=1,
        per_device_train_batch_size=MICROBATCH,
        max_grad_norm=1.0,
        temperature=1.0,
    )
    losses = dict(
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.1,
        entropy_coef=0.0,
        kl_estimator="full",
        bf16=args.bf16,
    )
    flags = SimpleNamespace(**flags, **losses)
    actor, rollout = Policy(model).to(model.device), made_up(rows, T, model)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=0.0, fused=True)
    start = now()
    logprobs, _, values, _ = train_ppo.score(actor, model, rollout, flags)
    scored = now()
    batch = dict(
        old_logprobs=logprobs,
        advantages=torch.randn_like(values),
        old_values=values,
        returns=values,
        mask=rollout.mask,
    )
    train_ppo.update(actor, optimizer, rollout, batch, flags)
    return found | {"score": scored - start, "update": now() - scored}


def made_up(rows, T, model) -> Rollout:
    ids = torch.randint(model.config.vocab_size, (rows, PROMPT + T), device=model.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    prompt, response = (slice(None), slice(PROMPT)), (slice(None), slice(PROMPT, None))
    return Rollout(
        ids[prompt], mask[prompt], ids[response], mask[response], mask[:, 0], [""] * rows
    )


def slope(seconds: dict) -> float:
    (small, before), (large, after) = list(seconds.items())[-2:]
    return math.log(after / before) / math.log(large / small)


def draw(result, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axis, (what, parts) in zip(figure.subplots(1, len(result)), result.items()):
        for colour, part in zip(("#0072b2", "#e69f00", "#009e73"), PARTS):
            if part in parts:
                sizes, seconds = zip(*parts[part]["seconds"].items())
                axis.plot(
                    sizes,
                    seconds,
                    marker="o",
                    color=colour,
                    label=f"{part}, slope {parts[part]['slope']:.2f}",
                )
        least = min(value for row in parts.values() for value in row["seconds"].values())
        sizes, seconds = zip(*parts["update"]["seconds"].items())
        axis.plot(
            sizes,
            [seconds[-1] * size / sizes[-1] for size in sizes],
            color="0.6",
            linestyle=":",
            label="linear",
        )
        axis.set(xlabel=what, xscale="log", yscale="log", ylim=(0.7 * least, None))
        axis.set_xticks(sizes, [f"{size // 1024}k" if size > 4000 else size for size in sizes])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("seconds")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
