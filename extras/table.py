"""The table that reproduce.py makes of its runs: scores with intervals, paired differences, steps, the ledger of costs, and curves.

The ledger counts a model of N parameters as 2 N FLOPs a token read or written and 6 N a token trained on, 4 N with LoRA. The own
products of attention, validation and measuring are left out. What a rule or a server does costs no FLOPs here.
"""

import json
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from t2g import adapters
from t2g.cli import fail
from t2g.log import read_jsonl
from t2g.metrics import interval
from t2g.policy import latest_checkpoint, pretrained

SMOOTH = 5  # steps over which a learning curve is averaged
PARTS = ("rollout", "critique", "update")
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # Okabe and Ito's, told apart by all


def read_cell(folder, name, logged) -> dict:
    """What a row of one seed came to: its scores, seconds, ledger, and the curve of a logged metric over its steps."""
    done = json.loads((folder / f"{name}.done.json").read_text(encoding="utf-8"))
    measured = json.loads(done["result"])
    [scores] = measured.get("scores", measured).values()
    scores = {
        name: figure["value"] if isinstance(figure, dict) else figure
        for name, figure in scores.items()
    }
    run = folder / name.replace(" ", "_")
    trained = (run / "metrics.jsonl").is_file()
    steps = read_jsonl(run / "metrics.jsonl") if trained else []
    online = [row for row in steps if logged in row and "kl" in row]
    curves = {
        "curve": smooth([row[logged] for row in online]),
        "kl": smooth([row["kl"] for row in online]),
    }
    return {
        "scores": scores,
        "seconds": done["seconds"],
        "ledger": ledger(run, steps) if trained else {},
    } | curves


def smooth(curve) -> list[float]:
    """Means over SMOOTH steps, each one at its last step."""
    return [float(np.mean(curve[max(0, end - SMOOTH) : end])) for end in range(1, len(curve) + 1)]


# ---- what it cost ------------------------------------------------------------------------------------------------------


def ledger(run, steps) -> dict[str, dict[str, float]]:
    """Seconds, tokens and FLOPs of each part of a training run."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    size, critic_size = parameters(run), parameters(critic_of(run, config))
    file = run / "sampling.json"  # of methods that sample before they train
    samplings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    samplings += [
        {"samples": config["batch_size"], **row} for row in steps if "seconds_rollout" in row
    ]
    parts = {part: {"seconds": 0.0, "tokens": 0.0, "flops": 0.0} for part in PARTS}

    def add(part, seconds, tokens, flops):
        for unit, value in zip(parts[part], (seconds, tokens, flops)):
            parts[part][unit] += value

    for row in samplings:
        if "seconds_reference" in row:  # DPO: one pass of the reference over all pairs
            add(
                "update",
                row["seconds_reference"],
                row["reference_tokens"],
                2 * size * row["reference_tokens"],
            )
        if "seconds_rollout" not in row:
            continue
        read = row["samples"] * (row["prompt_tokens"] + row["response_tokens"])
        judged = (
            row["samples"]
            * (row.get("judged_tokens", read / row["samples"]) + row["critique_tokens"])
            if critic_size
            else 0
        )
        add("rollout", row["seconds_rollout"], read, 2 * size * read)
        add("critique", row["seconds_critique"], judged, 2 * critic_size * judged)
        if (
            "seconds_score" in row and "teacher_tokens" not in row
        ):  # PPO: one pass of the policy and one of its reference
            add("update", row["seconds_score"], 2 * read, 4 * size * read)
    for row in steps:
        if "update_tokens" in row:
            teacher = row.get("teacher_tokens", 0)
            flops = ((4 if config.get("lora_r") else 6) * row["update_tokens"] + 2 * teacher) * size
            add("update", row["seconds_update"], row["update_tokens"] + teacher, flops)
    return parts


def critic_of(run, config):
    """The folder of the reward model of a run, None if its critic is none of ours."""
    beside = {"rm": "rm", "extras/baselines/scalar_critic.py": "rm_scalar"}
    beside = beside.get(config.get("critic"))
    return config["reward_model"] or run.parent / beside if beside else None


def parameters(run) -> int:
    """The number of a checkpoint's weights, those under an adapter too; 0 without a run, or where it is no folder."""
    if not run:
        return 0
    folder = latest_checkpoint(run) or Path(run)
    total = parameters_under(adapters.base(folder)) if adapters.there(folder) else 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            total += sum(
                int(np.prod(weights.get_slice(name).get_shape()))
                for name in weights.keys()  # noqa: SIM118
            )
    return total


def parameters_under(base) -> int:
    """The number of weights of the model that an adapter was trained on: a folder, or what else transformers knows it by."""
    if Path(base).is_dir():
        return parameters(base)
    source, gguf = pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, **gguf))
    return sum(weights.numel() for weights in model.parameters())


# ---- the table ---------------------------------------------------------------------------------------------------------


def summarise(found, recipe, rows) -> dict:
    """{"rows": {row: {metric: {"mean", "low", "high", "seeds"}}}} from {row: its cell of each seed}."""
    main, logged, table = recipe["main"], recipe.get("curve", recipe["main"]), {}
    for name, cells in found.items():
        against = rival(name, recipe, rows)
        other = found.get(against)
        values = {
            metric: [cell["scores"][metric] for cell in cells] for metric in cells[0]["scores"]
        }
        if other and cells is not other:
            theirs = [cell["scores"][main] for cell in other]
            values[f"{main}, less {against}"] = [a - b for a, b in zip(values[main], theirs)]
        if cells[0]["curve"]:
            values["kl"] = [cell["kl"][-1] for cell in cells]
            compared = other and other[0]["curve"] and cells is not other
            if compared:
                values[f"{logged} of rollouts, less {against} at equal KL"] = list(
                    map(gain_at_equal_kl, cells, other)
                )
            if recipe.get("better") != "lower":
                values["steps_to_90_percent"] = [
                    first(cell["curve"], 0.9 * max(cell["curve"])) for cell in cells
                ]
                if compared:
                    values[f"steps_to_best_of_{against}"] = [
                        first(a["curve"], max(b["curve"])) for a, b in zip(cells, other)
                    ]
        values["seconds"] = [cell["seconds"] for cell in cells]
        for part in cells[0]["ledger"]:
            for unit in cells[0]["ledger"][part]:
                values[f"{part}_{unit}"] = [cell["ledger"][part][unit] for cell in cells]
        table[name] = {
            metric: interval([value for value in column if value is not None])
            for metric, column in values.items()
        }
    return {"rows": table}


def rival(name, recipe, rows) -> str | None:
    """The row that a row is held against."""
    return rows[name].get("against", recipe["against"])


def stage_seconds(jobs, rows) -> dict[str, dict]:
    """The seconds of what the rows of a seed share, over seeds."""
    seconds = {}
    for job in jobs:
        if job.name not in rows:
            done = json.loads((job.folder / f"{job.name}.done.json").read_text(encoding="utf-8"))
            seconds.setdefault(job.name, []).append(done["seconds"])
    return {name: interval(column) for name, column in seconds.items()}


def first(curve, level) -> int | None:
    """The first step at which a curve reaches a level."""
    return next((step for step, value in enumerate(curve, 1) if value >= level), None)


def gain_at_equal_kl(cell, other) -> float:
    """What a run's curve is above another's where both are as far from the starting policy as the one that goes less far.

    How far a run has gone is the largest KL that it has had: one that comes back is read where it first was.
    """
    kl = min(max(cell["kl"]), max(other["kl"]))
    ours, theirs = (
        np.interp(kl, np.maximum.accumulate(run["kl"]), run["curve"]) for run in (cell, other)
    )
    return float(ours - theirs)


def markdown(result, recipe, rows) -> str:
    """The table, and below it the ledger."""
    main, logged = recipe["main"], recipe.get("curve", recipe["main"])
    titles = {name: row["title"] for name, row in rows.items()}
    other = titles.get(recipe["against"], "another row")
    heads = {metric: metric for metric in recipe["metrics"]} | {
        f"{main}, less {{}}": f"{main}, difference to {other}",
        "kl": "kl",
        f"{logged} of rollouts, less {{}} at equal KL": f"{logged} in rollouts at equal KL, difference to {other}",
        "steps_to_90_percent": "steps to 90 percent",
        "steps_to_best_of_{}": f"steps to the best of {other}",
    }
    lines = [
        f"| | {' | '.join(head.replace('_', ' ') for head in heads.values())} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for name, row in result["rows"].items():
        against, seeds = rival(name, recipe, rows), row["seconds"]["seeds"]
        cells = [
            shown(row.get(column.format(against)), 0 if column.startswith("steps") else 2, seeds)
            for column in heads
        ]
        own = f" (differences to {titles.get(against, against)})" if "against" in rows[name] else ""
        lines.append(f"| {titles[name]}{own} | {' | '.join(cells)} |")
    units = {"seconds": ("s", 1), "tokens": ("M tokens", 1e6), "flops": ("TFLOP", 1e12)}
    heads = [f"{part}, {unit}" for part in PARTS for unit, _ in units.values()]
    lines += ["", f"| | {' | '.join(heads)} | all, s |", "|---" * (len(heads) + 2) + "|"]
    for name, row in result["rows"].items():
        means = [row[f"{part}_{unit}"]["mean"] / by if f"{part}_{unit}" in row else None
                 for part in PARTS for unit, (_, by) in units.items()]  # fmt: skip
        cells = ["" if mean is None else f"{mean:.3g}" for mean in means]
        lines.append(f"| {titles[name]} | {' | '.join(cells)} | {row['seconds']['mean']:.0f} |")
    stages = ", ".join(f"{name} {cell['mean']:.0f}" for name, cell in result["stages"].items())
    return "\n".join(
        [*lines, "", f"Seconds of what rows share, a seed: {stages or 'nothing'}.", ""]
    )


def shown(cell, digits, seeds) -> str:
    """
    >>> cell = {"mean": 0.65, "low": 0.53, "high": 0.76, "seeds": 2}
    >>> shown(cell, 2, seeds=2), shown(cell, 2, seeds=3)
    ('0.65 [0.53, 0.76]', '0.65 [0.53, 0.76] (2 of 3 seeds)')
    """
    if not cell:
        return ""
    if cell["mean"] is None:
        return "never"
    bounds = (
        "" if cell["low"] is None else f" [{cell['low']:.{digits}f}, {cell['high']:.{digits}f}]"
    )
    return f"{cell['mean']:.{digits}f}{bounds}" + (
        f" ({cell['seeds']} of {seeds} seeds)" if cell["seeds"] < seeds else ""
    )


# ---- the curves --------------------------------------------------------------------------------------------------------


def plot(path, found, recipe, rows):
    """Learning curves of the rows under `curves` in a recipe: on the left the first one and the one that it is held against, with
    95% bands over the seeds; on the right all. Rows that sample only once have no curve: they stand at the right edge as they end.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fail("the curves are drawn by the package matplotlib: pip install matplotlib")
    names = [name for name in recipe["curves"] if name in found]
    colours = dict(zip(names, cycle(COLOURS)))
    curves = {
        name: over_steps([cell["curve"] for cell in found[name]])
        for name in names
        if found[name][0]["curve"]
    }
    ends = {
        name: bounds([cell["scores"][recipe["main"]] for cell in found[name]])
        for name in names
        if name not in curves
    }
    pair = [name for name in curves if name in (names[0], rival(names[0], recipe, rows))]
    widths = [1, 1, 0.14 * len(ends)] if ends else [1, 1]
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right, *edge = panels = figure.subplots(1, len(widths), sharey=True, width_ratios=widths)
    for panel in panels:
        panel.grid(axis="y", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(length=0)
    for name in pair:
        _, low, high = curves[name]
        left.fill_between(
            range(1, len(low) + 1), low, high, color=colours[name], alpha=0.15, linewidth=0
        )
    for panel, drawn in ((left, pair), (right, curves)):
        for name in drawn:
            means, *_ = curves[name]
            panel.plot(range(1, len(means) + 1), means, color=colours[name], linewidth=2)
        panel.set(xlabel="rollouts", xmargin=0)
    for place, (name, (mean, low, high)) in enumerate(ends.items()):
        edge[0].errorbar(
            place,
            mean,
            [[mean - low], [high - mean]],
            fmt="D",
            color=colours[name],
            capsize=3,
            linewidth=2,
        )
    if ends:
        edge[0].set(xlabel="held out", xlim=(-0.6, len(ends) - 0.4))
        edge[0].set_xticks(range(len(ends)), [rows[name]["title"] for name in ends])
        edge[0].spines["left"].set_visible(False)
    seeds, top = max(map(len, found.values())), min(1, left.get_ylim()[1])
    left.set(
        ylim=(0, top),
        ylabel=f"{recipe.get('curve', recipe['main_title'])}\nin training rollouts, mean of {SMOOTH}",
    )
    left.set_title(
        f"mean of {seeds} seeds, 95% interval" if seeds > 1 else "one seed", loc="left", fontsize=10
    )
    right.set_title("all methods", loc="left", fontsize=10)
    for panel, drawn in ((left, pair), (right, curves)):
        for name, height in apart(
            {name: curves[name][0][-1] for name in drawn}, gap=0.055 * top
        ).items():
            panel.text(
                1.02,
                height,
                rows[name]["title"],
                transform=panel.get_yaxis_transform(),
                color=colours[name],
                va="center",
            )
    figure.savefig(path, dpi=160)


def over_steps(curves) -> list:
    """The means of some curves, and the bounds of their intervals, over the steps that all of them have."""
    return list(zip(*map(bounds, zip(*curves))))


def apart(heights, gap) -> dict[str, float]:
    """Heights moved as little as can be, so that each is a gap away from the next.

    >>> apart({"a": 0.5, "b": 0.5, "c": 0.1}, gap=0.2)
    {'c': 0.1, 'a': 0.4, 'b': 0.6}
    """
    from scipy.optimize import isotonic_regression

    names = sorted(heights, key=heights.get)
    ranks = gap * np.arange(len(names))
    moved = (
        isotonic_regression([heights[name] for name in names] - ranks).x + ranks if names else []
    )
    return {name: float(height) for name, height in zip(names, moved)}


def bounds(values) -> tuple[float, float, float]:
    row = interval(values)
    return (row["mean"], row["low"], row["high"]) if len(values) > 1 else (values[0],) * 3
