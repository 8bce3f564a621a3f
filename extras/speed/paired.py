"""Two settings of train_ppo.py, seed by seed: what each ends with, how its tokens moved, and the paired difference.

python -m bench.paired runs/toy-{0,1,2}/ppo --against runs/toy-{0,1,2}/ppo_scalar
python -m bench.paired runs/toy-{0,1,2}/ppo --against runs/toy-{0,1,2}/ppo_scalar --steps 10    # the first ten steps

The meter is averaged over the steps at which both runs of a pair have such tokens if --steps is given, else over each run's own.
"""

import argparse
import json

from t2g.cli import fail
from t2g.metrics import interval
from t2g.page import AGAINST, SHIFTS, read_run


def meter(run, other, name, steps):
    """The mean over steps of one metric of a run, None if it is never there."""
    rows = [
        (mine, theirs)
        for mine, theirs in zip(run["metrics"], other["metrics"])
        if name in mine and (not steps or name in theirs)
    ]
    values = [mine[name] for mine, _ in rows[: steps or None]]
    return sum(values) / len(values) if values else None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="one a seed")
    parser.add_argument(
        "--against", nargs="+", required=True, help="as many runs, the seeds in the same order"
    )
    parser.add_argument(
        "--steps", type=int, help="the meter over that many first steps; all of them if not given"
    )
    args = parser.parse_args()
    if len(args.runs) != len(args.against) or len(args.runs) < 2:
        fail("pairs need as many runs on either side, and an interval two of them at least")
    pairs = [(read_run(run), read_run(other)) for run, other in zip(args.runs, args.against)]
    table = {}
    for name in pairs[0][0]["result"]["after"]:
        table[name] = [[run["result"]["after"][name] for run in pair] for pair in pairs]
    for name in (*SHIFTS, *AGAINST, "shift_rank"):
        table[name] = [
            [meter(a, b, name, args.steps), meter(b, a, name, args.steps)] for a, b in pairs
        ]
    result = {}
    print(f"{'':20}{'runs':>26}{'against':>26}{'difference':>26}")
    for name, values in table.items():
        if all(x is not None for pair in values for x in pair):
            columns = {
                "runs": [a for a, _ in values],
                "against": [b for _, b in values],
                "difference": [a - b for a, b in values],
            }
            result[name] = {column: interval(x) for column, x in columns.items()}
            cells = (
                "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**cell)
                for cell in result[name].values()
            )
            print(f"{name:20}" + "".join(f"{cell:>26}" for cell in cells))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
