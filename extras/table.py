"""The table that reproduce.py makes of its runs: scores, paired differences, steps, costs, curves.

If a command was killed and restarted, the ledger's "all" counts only its last start.
"""

import json
from itertools import cycle

import numpy as np

from extras.interval import interval
from extras.ledger import LEDGER, UNITS, ledger
from t2g.cli import fail
from t2g.data import needed
from t2g.log import METRICS, read_json, read_jsonl, write_json

SMOOTH = 5  # steps over which a learning curve is averaged
EARLY = 10  # first rollouts, whose mean changes of log pi are in table.json
SHIFTS = [metric for metric in METRICS if metric.startswith("shift_")]
# Okabe and Ito's colours, which colour-blind readers tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def write(root, folders, recipe, rows, jobs) -> dict:
    """Writes table.json, table.md and curves.png of the seeds in folders; returns the table."""
    logged = [recipe.get("curve", recipe["main"]), *recipe.get("also_at_equal_kl", [])]
    cells = {name: [read_cell(folder, name, *logged) for folder in folders] for name in rows}
    stages = {}
    for name in jobs:
        if name not in rows:
            stages[name] = interval([read_done(folder, name)["seconds"] for folder in folders])
    done = [read_done(folder, name) for folder in folders for name in jobs]
    commits = {commit for job in done for commit in job.get("commits", []) if commit}
    result = {"rows": summarise(cells, recipe, rows), "stages": stages, "commits": sorted(commits)}
    write_json(root / "table.json", result)
    text = markdown(result, recipe, rows)
    (root / "table.md").write_text(text, encoding="utf-8")
    plot(root / "curves.png", cells, recipe, rows)
    print(f"\n{text}\ntable: {root / 'table.md'}\ncurves: {root / 'curves.png'}")
    return result


def read_done(folder, name) -> dict:
    return read_json(folder / f"{name}.done.json")


def read_cell(folder, name, *logged) -> dict:
    """Returns the scores, costs, shifts and curves of one seed; logged: the curves' metrics."""
    done, run = read_done(folder, name), folder / name
    scores = scores_of(json.loads(done["result"]))
    for metric, figure in scores.items():
        scores[metric] = figure["value"] if isinstance(figure, dict) else figure
    trained = (run / "metrics.jsonl").is_file()
    steps = read_jsonl(run / "metrics.jsonl") if trained else []
    online = [row for row in steps if logged[0] in row and "kl" in row]
    if online and (missing := sorted(set(logged) - set(online[0]))):
        fail(f"{run} logs no {', '.join(missing)}, which the recipe compares at equal KL")
    curves = {metric: smooth([row[metric] for row in online]) for metric in ("kl", *logged)}
    curves["curve"] = curves[logged[0]]
    early = {name: [row[name] for row in online[:EARLY] if name in row] for name in SHIFTS}
    shifts = {name: float(np.mean(values)) for name, values in early.items() if values}
    costs = ledger(run, steps) if trained else {}
    return dict(scores=scores, shifts=shifts, ledger=costs, seconds=done["seconds"], **curves)


def scores_of(measured) -> dict:
    """Returns the scores of the one policy that was measured, or the card of a reward model.

    >>> scores_of({"poor": {"f1": 0.5}, "json_valid": 1.0, "responses": 9})
    {'poor_f1': 0.5, 'json_valid': 1.0}
    """
    if "json_valid" not in measured:
        [scores] = measured.get("scores", measured).values()
        return scores
    marks = [mark for mark in ("good", "poor", "any_poor") if mark in measured]
    scores = {f"{m}_{figure}": x for m in marks for figure, x in measured[m].items()}
    return scores | {"json_valid": measured["json_valid"]}


def smooth(curve) -> list[float]:
    """Returns means over SMOOTH steps, each at its last step."""
    return [float(np.mean(curve[max(0, end - SMOOTH) : end])) for end in range(1, len(curve) + 1)]


def summarise(cells, recipe, rows) -> dict:
    """Returns {row: {metric: interval()}} of {row: the cell of each seed}."""
    main, table = recipe["main"], {}
    for name, ours in cells.items():
        against = rows[name].get("against", recipe.get("against"))
        theirs = cells.get(against) if against != name else None
        columns = {}
        for metric in dict.fromkeys(metric for cell in ours for metric in cell["scores"]):
            values = [cell["scores"].get(metric) for cell in ours]
            if None not in values:
                columns[metric] = values
            else:  # such as the perplexity of no text
                print(f"{name}: not every seed has a {metric}, so the table leaves it out")
        rival = [cell["scores"].get(main) for cell in theirs or []]
        if rival and None not in rival and main in columns:
            columns["difference"] = [a - b for a, b in zip(columns[main], rival)]
        if ours[0]["curve"]:
            columns["kl"] = [cell["kl"][-1] for cell in ours]
            columns["curve_end"] = [cell["curve"][-1] for cell in ours]
        if ours[0]["curve"] and theirs and theirs[0]["curve"]:
            columns["difference_at_equal_kl"] = list(map(gain_at_equal_kl, ours, theirs))
            for metric in recipe.get("also_at_equal_kl", []):
                gains = [gain_at_equal_kl(*pair, metric) for pair in zip(ours, theirs)]
                columns[f"{metric}_at_equal_kl"] = gains
            sign = -1 if recipe.get("lower_is_better") else 1
            reached = [rollouts_to_end(a["curve"], b["curve"], sign) for a, b in zip(ours, theirs)]
            if any(reached):
                columns["rollouts_to_rival"] = [number for number in reached if number]
        for metric in SHIFTS:  # a run without such tokens has none
            moved = [cell["shifts"].get(metric) for cell in ours]
            rival = [cell["shifts"].get(metric) for cell in theirs or []]
            if None not in moved:
                columns[metric] = moved
            if rival and None not in moved + rival:
                columns[f"{metric}_difference"] = [a - b for a, b in zip(moved, rival)]
        columns["seconds"] = [cell["seconds"] for cell in ours]
        for part, unit in ours[0]["ledger"]:
            columns[f"{part}_{unit}"] = [cell["ledger"][part, unit] for cell in ours]
        table[name] = {metric: interval(values) for metric, values in columns.items()}
    return table


def gain_at_equal_kl(ours, theirs, metric="curve") -> float:
    """Returns the difference of two curves of a metric at the KL that both runs reach.

    Each run is read at the first rollout that reaches it, even if its KL falls again later.
    """
    kl, values = min(max(ours["kl"]), max(theirs["kl"])), []
    for run in (ours, theirs):
        farthest, first = np.unique(np.maximum.accumulate(run["kl"]), return_index=True)
        values.append(np.interp(kl, farthest, np.array(run[metric])[first]))
    return float(values[0] - values[1])


def rollouts_to_end(curve, rival, sign=1) -> int | None:
    """Returns the first rollout at which a curve reaches its rival's last value, or None.

    sign: -1 if lower values of the metric are better.

    >>> rollouts_to_end([0.1, 0.5, 0.4], [0.2, 0.3, 0.4]), rollouts_to_end([7, 8], [7, 9])
    (2, None)
    """
    reached = sign * np.array(curve) >= sign * rival[-1]
    return int(reached.argmax()) + 1 if reached.any() else None


def markdown(result, recipe, rows) -> str:
    """Returns the table, and below it the ledger."""
    titles = {name: row["title"] for name, row in rows.items()}
    rival = titles.get(recipe.get("against"), "another row")
    logged = recipe.get("curve", recipe["main"])
    heads = {metric: metric.replace("_", " ") for metric in recipe["metrics"]} | {
        "difference": f"{recipe['main']}, difference to {rival}",
        "kl": "kl",
        "difference_at_equal_kl": f"{logged} in rollouts at equal KL, difference",
        "rollouts_to_rival": f"rollouts to the final {logged} of {rival}",
    }
    scores, costs = [], []
    for name, row in result["rows"].items():
        title, other = titles[name], rows[name].get("against")
        title += f" (differences to {titles.get(other, other)})" if other else ""
        seeds, cells = row["seconds"]["seeds"], [shown(row.get(head), head) for head in heads]
        reached = row.get("rollouts_to_rival", row["seconds"])["seeds"]
        if reached < seeds:  # a mean of those alone says nothing of the others
            cells[-1] = f"reached by {reached} of {seeds} seeds"
        scores.append([title, *cells])
        cells = [row.get(f"{part}_{unit}") for part, unit in LEDGER]
        sizes = [UNITS[unit][1] for _, unit in LEDGER]
        cells = [f"{cell['mean'] / size:.3g}" if cell else "" for cell, size in zip(cells, sizes)]
        costs.append([titles[name], *cells, f"{row['seconds']['mean']:.0f}"])
    units = [f"{part}, {UNITS[unit][0]}" for part, unit in LEDGER]
    stages = ", ".join(f"{name} {cell['mean']:.0f}" for name, cell in result["stages"].items())
    last = f"Seconds of shared stages per seed: {stages or 'none'}.\n"
    last += f"Commits of the runs: {', '.join(result['commits']) or 'unknown'}.\n"
    return "\n".join([pipes(heads.values(), scores), pipes([*units, "all, s"], costs), last])


def pipes(heads, rows) -> str:
    """Returns a table in Markdown; the first column has no head.

    >>> print(pipes(["kl"], [["PPO", "3"]]), end="")
    | | kl |
    |---|---|
    | PPO | 3 |
    """
    heads = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    return "\n".join([*heads, *(f"| {' | '.join(row)} |" for row in rows), ""])


def shown(cell, head) -> str:
    """Returns a cell as text; a share whose interval leaves [0, 1] shows its seeds instead.

    >>> shown(interval([0.5, 0.7]), "perfect"), shown(interval([0.5, 0.7]), "difference")
    ('0.60 (0.50, 0.70)', '0.600 [-0.671, 1.871]')
    """
    if not cell or cell["seeds"] == 1:
        return f"{cell['mean']:.2f}" if cell else ""
    low, high, values = cell["low"], cell["high"], cell["values"]
    share = min(values) >= 0 and max(values) <= 1 and not head.startswith("difference")
    if share and not 0 <= low <= high <= 1:
        return f"{cell['mean']:.2f} ({', '.join(f'{value:.2f}' for value in values)})"
    digits = 3 if head.startswith("difference") else 2
    return f"{cell['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def plot(path, cells, recipe, rows):
    """Draws the learning curves of the rows under "curves": their means over seeds.

    The first row and its rival also show a thin line per seed. Rows that sample once have no curve:
    their seeds are dots at the right edge.
    """
    needed("matplotlib", "the plot of the curves")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    names = [name for name in recipe["curves"] if name in cells]
    pair = {name for name in (*names[:1], recipe.get("against"))}
    edge = max((len(cells[name][0]["curve"]) for name in names), default=0) + 1
    for name, colour in zip(names, cycle(COLOURS)):
        curves, label = [cell["curve"] for cell in cells[name]], rows[name]["title"]
        length = min(map(len, curves))
        if length:
            mean = np.mean([curve[:length] for curve in curves], axis=0)
            steps = range(1, length + 1)
            axes.plot(steps, mean, color=colour, linewidth=2.2, label=label)
            for curve in curves if name in pair else []:
                axes.plot(steps, curve[:length], color=colour, linewidth=0.8, alpha=0.5)
        else:
            ends = [cell["scores"].get(recipe["main"], np.nan) for cell in cells[name]]
            label += ", held out"
            axes.plot([edge] * len(ends), ends, "D", color=colour, alpha=0.7, label=label)
            edge += 1
    title = recipe.get("curve", recipe["main_title"])
    axes.set(xlabel="rollouts", ylabel=f"{title}\nin training rollouts, mean of {SMOOTH}")
    axes.set_title("thick: mean over seeds; thin: each seed", loc="left", fontsize=10)
    axes.grid(axis="y", alpha=0.25)
    if names:
        figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=160)
