"""How the cost of a step grows with response tokens, responses and vocabulary.

    python -m extras.speed.growth MODEL     # a folder, a hub id or a .gguf file; minutes on 2 cores

Prompts have 32 tokens, microbatches 4 responses of 64 tokens (32 where responses are many). A model
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
    tokenizer, model = endless(parser.parse_args().model)
    seconds_of("responses", MICROBATCH, tokenizer, model)  # warms up
    result = {}
    for what, sizes in SIZES.items():
        rows = {size: seconds_of(what, size, tokenizer, model) for size in tqdm(sizes, desc=what)}
        result[what] = {}
        for part in rows[sizes[0]]:
            seconds = {size: row[part] for size, row in rows.items()}
            result[what][part] = {"seconds": seconds, "slope": slope(seconds)}
            columns = "".join(f"{size:>8}: {value:.2f}" for size, value in seconds.items())
            print(f"{what}, {part}, seconds{columns}; slope {slope(seconds):.2f}")
    print(json.dumps(result))


def seconds_of(what, size, tokenizer, model) -> dict:
    """Seconds of the parts of a step in which one thing has this size."""
    tokens = {"response tokens": size, "responses": 32, "vocabulary": 64}[what]
    rows, found = size if what == "responses" else MICROBATCH, {}
    if what == "vocabulary":
        config = type(model.config).from_dict(model.config.to_dict() | {"vocab_size": size})
        other = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model = cpu.use(other).to(model.device).eval()
    else:
        start = now()
        sample(model, tokenizer, [" ".join(WORDS)] * rows, tokens)
        found["rollout"] = now() - start
    shape = ["--num_ppo_epochs", 1, "--num_mini_batches", 1]
    learner = Learner(model, train_flags(*shape, "--per_device_train_batch_size", MICROBATCH))
    return found | learner.learn(made_up(rows, PROMPT, tokens, model.config.vocab_size))


def slope(seconds: dict) -> float:
    """The exponent of the growth between the two largest sizes.

    >>> slope({32: 0.5, 64: 1.0, 128: 4.0})
    2.0
    """
    (small, before), (large, after) = list(seconds.items())[-2:]
    return math.log(after / before) / math.log(large / small)


if __name__ == "__main__":
    main()
