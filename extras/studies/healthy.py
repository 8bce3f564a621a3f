"""What a healthy run looks like: metrics of train_ppo.py at the first, tenth and last step.

python -m extras.studies.healthy runs/reproduce/toy/seed-*/text2grad
python -m extras.studies.healthy runs/toy/ppo --beside "too fast" runs/toy/fast --plot mine.png

It prints means over runs. Metrics that some step lacks are left out; `coverage` is the toy's own.
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from extras.table import COLOURS
from t2g import cli
from t2g.log import read_jsonl

WORRY = {  # when to worry, by metric; the first eight are drawn
    "reward": "it rises and samples get worse",
    "coverage": "it falls with `response_tokens`: facts are left out",
    "response_tokens": "it goes on falling after the first steps, or grows",
    "kl": "it does not level off",
    "entropy": "responses to unlike prompts are alike; low alone is no alarm",
    "clipfrac": "it is several times this at step 1: the steps are too large",
    "approx_kl": "the same",
    "value_explained": "it stays near 0 with token rewards; with one scalar that is normal",
    "kl / response_tokens": "it is many times this; unlike `kl` it carries over to other lengths",
    "unparsable": "it grows: the critic does not know such texts",
    "quotes_lost": "it grows: the critic quotes text that does not exist",
}


def read(folder) -> list[dict]:
    rows = read_jsonl(Path(folder) / "metrics.jsonl")
    if len(rows) < 10 or not all({"kl", "response_tokens"} <= row.keys() for row in rows):
        cli.fail(f"{folder} is no run of train_ppo.py of ten steps or more")
    return [row | {"kl / response_tokens": row["kl"] / row["response_tokens"]} for row in rows]


def common_metrics(runs) -> dict:
    """Returns the metrics that every step has, (runs, steps) each."""
    columns = {}
    for name in WORRY:
        values = [[row.get(name, np.nan) for row in run] for run in runs]
        if not np.isnan(values).any():
            columns[name] = np.array(values)
    return columns


@cli.friendly_errors()
def main():
    parser = cli.parser(__doc__)
    parser.add_argument("runs", nargs="+", help="healthy runs, one per seed")
    beside = dict(nargs="+", action="append", default=[], metavar="WORD")
    parser.add_argument("--beside", **beside, help="a label, then runs of its own")
    cli.flags(parser)("--plot", None, "a .png file for the curves of the runs and their means")
    args = parser.parse_args()
    curves, result = {}, {}
    for label, *folders in [["healthy", *args.runs], *args.beside]:
        if not folders:
            cli.fail(f"--beside {label!r} needs runs after its label")
        runs = [read(folder) for folder in folders]
        steps = min(map(len, runs))
        curves[label] = common_metrics([run[:steps] for run in runs])
        means = {name: x[:, [0, 9, -1]].mean(0).tolist() for name, x in curves[label].items()}
        result[f"{label}: step 1 → 10 → {steps}"] = means
    print(f"| metric | {' | '.join(result)} | worry when |\n|---" + "|---" * len(result) + "|---|")
    for name, worry in WORRY.items():
        cells = [shown(means.get(name, [])) for means in result.values()]
        print(f"| `{name}` | {' | '.join(cells)} | {worry} |")
    if args.plot:
        draw(curves, args.plot)
    print(json.dumps(result))


def shown(values) -> str:
    digits = 2 if values and max(map(abs, values)) > 1 else 3
    return " → ".join(f"{value:.{digits}f}" for value in values)


def draw(curves, path):
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for axis, name in zip(figure.subplots(2, 4, sharex=True).flat, WORRY):
        for colour, (label, metrics) in zip(COLOURS, curves.items()):
            if name in metrics:
                steps = range(1, metrics[name].shape[1] + 1)
                axis.plot(steps, metrics[name].T, color=colour, linewidth=0.8, alpha=0.35)
                axis.plot(steps, metrics[name].mean(0), color=colour, linewidth=2, label=label)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.25)
    figure.supxlabel("step", fontsize=10)
    lines = figure.axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=len(curves), frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
