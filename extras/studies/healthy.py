"""What a run that goes well looks like: metrics of train_ppo.py at the first, tenth and last step, means over runs; and curves.

python -m bench.healthy runs/reproduce/toy/seed-*/text2grad
python -m bench.healthy runs/toy/ppo --beside "no leash" runs/toy/no_leash --plot docs/healthy.png

A metric that some step lacks (`coverage` is the toy's own) is left out.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from extras.table import COLOURS
from t2g.cli import fail
from t2g.log import read_jsonl

WORRY = {  # when to, by metric; the first eight are drawn
    "reward": "it rises and samples get worse",
    "coverage": "it falls with `response_tokens`: facts are left out",
    "response_tokens": "it goes on falling after the first steps, or grows",
    "kl": "it does not level off",
    "entropy": "responses to unlike prompts are alike. Low alone is no alarm: it must fall where a prompt leaves little to choose",
    "clipfrac": "it stays where it was at step 1: the steps are too large",
    "approx_kl": "the same",
    "value_explained": "it stays below 0. Near 0 for ten steps is normal",
    "kl / response_tokens": "it is many times this. Unlike `kl` it carries over to other lengths",
    "unparsable": "it grows: the critic does not know such texts",
    "quotes_lost": "it grows: the critic quotes what does not stand there",
}


def read(folder) -> list[dict]:
    rows = read_jsonl(Path(folder) / "metrics.jsonl")
    if len(rows) < 10 or not all({"kl", "response_tokens"} <= row.keys() for row in rows):
        fail(f"{folder} is no run of train_ppo.py of ten steps or more")
    return [row | {"kl / response_tokens": row["kl"] / row["response_tokens"]} for row in rows]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="runs that go well, one a seed")
    parser.add_argument(
        "--beside",
        nargs="+",
        action="append",
        default=[],
        metavar="WORD",
        help="a label, then runs of its own",
    )
    parser.add_argument(
        "--plot",
        help="where the curves go, a .png file; a thin line a run, a thick one for their mean",
    )
    args = parser.parse_args()
    curves, result = {}, {}
    for label, *folders in [["healthy", *args.runs], *args.beside]:
        runs = [read(folder) for folder in folders] or fail(
            f"--beside {label!r}: its runs are missing"
        )
        steps = min(map(len, runs))
        known = [name for name in WORRY if all(name in row for run in runs for row in run)]
        curves[label] = {
            name: np.array([[row[name] for row in run[:steps]] for run in runs]) for name in known
        }
        result[f"{label}: step 1 → 10 → {steps}"] = {
            name: x[:, [0, 9, -1]].mean(0).tolist() for name, x in curves[label].items()
        }
    print(f"| metric | {' | '.join(result)} | worry when |\n|---" + "|---" * len(result) + "|---|")
    for name, worry in WORRY.items():
        columns = [column.get(name, []) for column in result.values()]
        cells = [
            " → ".join(f"{x:.{2 if max(map(abs, column)) > 1 else 3}f}" for x in column)
            for column in columns
        ]
        print(f"| `{name}` | {' | '.join(cells)} | {worry} |")
    if args.plot:
        draw(curves, args.plot)
    print(json.dumps(result))


def draw(curves, path):
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for axis, name in zip(figure.subplots(2, 4, sharex=True).flat, WORRY):
        for colour, (label, metrics) in zip(COLOURS, curves.items()):
            for run in metrics.get(name, []):
                axis.plot(range(1, len(run) + 1), run, color=colour, linewidth=0.8, alpha=0.35)
            if name in metrics:
                mean = metrics[name].mean(0)
                axis.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=2, label=label)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("step", fontsize=10)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(curves),
        frameon=False,
    )
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
