"""How the cost of a step grows with response tokens, responses and vocabulary.

    python -m extras.speed.growth MODEL         # a folder, a hub id or a .gguf file; minutes on 2 cores

Prompts have 32 tokens, microbatches 4 responses of 64 tokens (32 where responses are many). The model
of another vocabulary has MODEL's shape and random weights. A slope is that of log seconds against
log size between the two largest sizes: 1 is linear, 2 quadratic.
"""

import json
import math

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from extras.speed.given import WORDS, Learner, made_up, train_flags
from extras.speed.step import endless
from t2g import cli, cpu
from t2g.policy import now
from t2g.rollout import sample

PROMPT, MICROBATCH = 32, 4
SIZES = {
    "response tokens": [32, 64, 128, 256, 512, 1024],
    "responses": [4, 8, 16, 32, 64, 128],
    "vocabulary": [8192, 16384, 32768, 65536, 131072],
}


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id or a .gguf file")
    cli.flags(parser)("--bf16", False, "matrix products in bf16")
    args = parser.parse_args()
    tokenizer, model = endless(args.model)
    seconds_of("responses", MICROBATCH, tokenizer, model, args.bf16)  # warms up
    result = {}
    for what, sizes in SIZES.items():
        bar = tqdm(sizes, desc=what)
        rows = {size: seconds_of(what, size, tokenizer, model, args.bf16) for size in bar}
        result[what] = {}
        print(f"\n{what:18}" + "".join(f"{size:>10}" for size in sizes) + f"{'slope':>10}")
        for part in rows[sizes[0]]:
            column = {size: row[part] for size, row in rows.items()}
            result[what][part] = {"seconds": column, "slope": slope(column)}
            figures = [*column.values(), slope(column)]
            print(f"  {part:16}" + "".join(f"{figure:10.2f}" for figure in figures))
    print(json.dumps(result))


def seconds_of(what, size, tokenizer, model, bf16) -> dict:
    """Seconds of the parts of a step in which one thing has this size."""
    tokens, rows = {
        "response tokens": (size, MICROBATCH),
        "responses": (32, size),
        "vocabulary": (64, MICROBATCH),
    }[what]
    found = {}
    if what == "vocabulary":
        config = type(model.config).from_dict(model.config.to_dict() | {"vocab_size": size})
        other = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model = cpu.use(other).to(model.device).eval()
    else:
        start = now()
        sample(model, tokenizer, [" ".join(WORDS)] * rows, tokens, bf16=bf16)
        found["rollout"] = now() - start
    shape = ["--num_ppo_epochs", 1, "--num_mini_batches", 1]
    shape += ["--per_device_train_batch_size", MICROBATCH, *(["--bf16"] if bf16 else [])]
    learner = Learner(model, train_flags(*shape))
    found |= learner.learn(made_up(rows, PROMPT, tokens, model.config.vocab_size))
    return {part: found[part] for part in ("rollout", "score", "update") if part in found}


def slope(seconds: dict) -> float:
    """The exponent of the growth between the two largest sizes.

    >>> slope({32: 0.5, 64: 1.0, 128: 4.0})
    2.0
    """
    (small, before), (large, after) = list(seconds.items())[-2:]
    return math.log(after / before) / math.log(large / small)


if __name__ == "__main__":
    main()
