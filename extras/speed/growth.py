"""How the seconds of a step grow with its response tokens and its responses.

    python -m extras.speed.growth MODEL     # a folder, a hub id or a .gguf file; minutes on 2 cores

Each size is a short run of train_ppo.py with 4 responses, or responses of 64 tokens, and one epoch.
A slope is that of log seconds against log size between the two largest sizes: 1 is linear.
"""

import json
import math
import tempfile
from pathlib import Path

from tqdm import tqdm

from extras.speed.step import MICROBATCH, prepare, run_ours
from t2g import cli

SIZES = {"response tokens": [32, 64, 128, 256, 512], "responses": [4, 8, 16, 32, 64]}


@cli.friendly_errors()
def main():
    parser = cli.parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id or a .gguf file")
    path, result = parser.parse_args().model, {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), path)
        for what, sizes in SIZES.items():
            steps = {size: seconds_of(Path(folder), what, size) for size in tqdm(sizes, desc=what)}
            result[what] = {}
            for part in ("rollout", "score", "update", "shift"):
                seconds = {size: step[part] for size, step in steps.items()}
                result[what][part] = {"seconds": seconds, "slope": slope(seconds)}
                columns = "".join(f"{size:>8}: {value:.2f}" for size, value in seconds.items())
                print(f"{what}, {part}, seconds{columns}; slope {slope(seconds):.2f}")
    print(json.dumps(result))


def seconds_of(work, what, size) -> dict:
    """Mean seconds of the phases of a step in which one thing has this size."""
    tokens, rows = (size, MICROBATCH) if what == "response tokens" else (64, size)
    flags = ["--num_ppo_epochs", 1, "--num_mini_batches", 1]
    flags += ["--gradient_accumulation_steps", rows // MICROBATCH]
    return run_ours(work, 2, *flags, new=tokens)


def slope(seconds: dict) -> float:
    """The exponent of the growth between the two largest sizes.

    >>> slope({32: 0.5, 64: 1.0, 128: 4.0})
    2.0
    """
    (small, before), (large, after) = list(seconds.items())[-2:]
    return math.log(after / before) / math.log(large / small)


if __name__ == "__main__":
    main()
