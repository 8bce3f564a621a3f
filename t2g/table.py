"""The table that reproduce.py makes of its runs: scores with intervals, paired differences, steps, the ledger of costs, and curves.

The ledger counts a model of N parameters as 2 N FLOPs a token read or written and 6 N a token trained on, 4 N with LoRA. The own
products of attention, validation and measuring are left out. What a rule or a server does costs no FLOPs here.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from t2g import adapters
from t2g.cli import fail
from t2g.log import read_jsonl
from t2g.metrics import interval, mean_interval
from t2g.policy import latest_checkpoint, pretrained

SMOOTH = 5  # steps over which a learning curve is averaged
PARTS = ("rollout", "critique", "update")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's, told apart by all


def read_cell(folder, name, logged) -> dict:
    """What a row of one seed came to: its scores, seconds, ledger, and the curve of a logged metric over its steps."""
    done = json.loads((folder / f"{name}.done.json").read_text(encoding="utf-8"))
    measured = json.loads(done["result"])
    [scores] = measured.get("scores", measured).values()
    scores = {name: figure["value"] if isinstance(figure, dict) else figure for name, figure in scores.items()}
    run = folder / name.replace(" ", "_")
    trained = (run / "metrics.jsonl").is_file()
    steps = read_jsonl(run / "metrics.jsonl") if trained else []
    online = [row for row in steps if logged in row and "kl" in row]
    curves = {"curve": smooth([row[logged] for row in online]), "kl": smooth([row["kl"] for row in online])}
    return {"scores": scores, "seconds": done["seconds"], "ledger": ledger(run, steps) if trained else {}} | curves


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
    samplings += [{"samples": config["batch_size"], **row} for row in steps if "seconds_rollout" in row]
    parts = {part: {"seconds": 0.0, "tokens": 0.0, "flops": 0.0} for part in PARTS}

    def add(part, seconds, tokens, flops):
        for unit, value in zip(parts[part], (seconds, tokens, flops)):
            parts[part][unit] += value

    for row in samplings:
        if "seconds_reference" in row:  # DPO: one pass of the reference over all pairs
            add("update", row["seconds_reference"], row["reference_tokens"], 2 * size * row["reference_tokens"])
        if "seconds_rollout" not in row:
            continue
        read = row["samples"] * (row["prompt_tokens"] + row["response_tokens"])
        judged = row["samples"] * (row.get("judged_tokens", read / row["samples"]) + row["critique_tokens"]) if critic_size else 0
        add("rollout", row["seconds_rollout"], read, 2 * size * read)
        add("critique", row["seconds_critique"], judged, 2 * critic_size * judged)
        if "seconds_score" in row and "teacher_tokens" not in row:  # PPO: one pass of the policy and one of its reference
            add("update", row["seconds_score"], 2 * read, 4 * size * read)
    for row in steps:
        if "update_tokens" in row:
            teacher = row.get("teacher_tokens", 0)
            flops = ((4 if config.get("lora_r") else 6) * row["update_tokens"] + 2 * teacher) * size
            add("update", row["seconds_update"], row["update_tokens"] + teacher, flops)
    return parts


def critic_of(run, config):
    """The folder of the reward model of a run, None if its critic is none of ours."""
    beside = {"rm": "rm", "scalar": "rm_scalar"}.get(config.get("critic"))
    return config["reward_model"] or run.parent / beside if beside else None


def parameters(run) -> int:
    """The number of a checkpoint's weights, those under an adapter too; 0 without a run, or where it is no folder."""
    if not run:
        return 0
    folder = latest_checkpoint(run) or Path(run)
    total = parameters_under(adapters.base(folder)) if adapters.there(folder) else 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            total += sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118
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
        against = rows[name].get("against", recipe["against"])
        other = found.get(against)
        values = {metric: [cell["scores"][metric] for cell in cells] for metric in cells[0]["scores"]}
        if other and cells is not other:
            theirs = [cell["scores"][main] for cell in other]
            values[f"{main}, less {against}"] = [a - b for a, b in zip(values[main], theirs)]
        if cells[0]["curve"]:
            values["kl"] = [cell["kl"][-1] for cell in cells]
            compared = other and other[0]["curve"] and cells is not other
            if compared:
                values[f"{logged} of rollouts, less {against} at equal KL"] = list(map(gain_at_equal_kl, cells, other))
            if recipe.get("better") != "lower":
                values["steps_to_90_percent"] = [first(cell["curve"], 0.9 * max(cell["curve"])) for cell in cells]
                if compared:
                    values[f"steps_to_best_of_{against}"] = [first(a["curve"], max(b["curve"])) for a, b in zip(cells, other)]
        values["seconds"] = [cell["seconds"] for cell in cells]
        for part in cells[0]["ledger"]:
            for unit in cells[0]["ledger"][part]:
                values[f"{part}_{unit}"] = [cell["ledger"][part][unit] for cell in cells]
        table[name] = {metric: over_seeds([value for value in column if value is not None]) for metric, column in values.items()}
    return {"rows": table}


def stage_seconds(jobs, rows) -> dict[str, dict]:
    """The seconds of what the rows of a seed share, over seeds."""
    seconds = {}
    for job in jobs:
        if job.name not in rows:
            done = json.loads((job.folder / f"{job.name}.done.json").read_text(encoding="utf-8"))
            seconds.setdefault(job.name, []).append(done["seconds"])
    return {name: over_seeds(column) for name, column in seconds.items()}


def first(curve, level) -> int | None:
    """The first step at which a curve reaches a level."""
    return next((step for step, value in enumerate(curve, 1) if value >= level), None)


def gain_at_equal_kl(cell, other) -> float:
    """What a run's curve is above another's where both are as far from the starting policy as the one that goes less far.

    How far a run has gone is the largest KL that it has had: one that comes back is read where it first was.
    """
    kl = min(max(cell["kl"]), max(other["kl"]))
    ours, theirs = (np.interp(kl, np.maximum.accumulate(run["kl"]), run["curve"]) for run in (cell, other))
    return float(ours - theirs)


def over_seeds(values) -> dict:
    """metrics.interval(); of one value the mean alone, of none nothing."""
    if len(values) > 1:
        return interval(values)
    return {"mean": values[0] if values else None, "low": None, "high": None, "seeds": len(values)}


def markdown(result, recipe, rows) -> str:
    """The table, and below it the ledger."""
    main, logged = recipe["main"], recipe.get("curve", recipe["main"])
    columns = [*recipe["metrics"], f"{main}, less {{}}", "kl", f"{logged} of rollouts, less {{}} at equal KL"]
    columns += ["steps_to_90_percent", "steps_to_best_of_{}"]
    heads = [column.format(recipe["against"]).replace("_", " ") for column in columns]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in result["rows"].items():
        against, seeds = rows[name].get("against", recipe["against"]), row["seconds"]["seeds"]
        cells = [shown(row.get(column.format(against)), 0 if column.startswith("steps") else 2, seeds) for column in columns]
        title = rows[name]["title"] + (f" (less {against})" if "against" in rows[name] else "")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    units = {"seconds": ("s", 1), "tokens": ("M tokens", 1e6), "flops": ("TFLOP", 1e12)}
    heads = [f"{part}, {unit}" for part in PARTS for unit, _ in units.values()]
    lines += ["", f"| | {' | '.join(heads)} | all, s |", "|---" * (len(heads) + 2) + "|"]
    for name, row in result["rows"].items():
        means = [row[f"{part}_{unit}"]["mean"] / by if f"{part}_{unit}" in row else None
                 for part in PARTS for unit, (_, by) in units.items()]  # fmt: skip
        cells = ["" if mean is None else f"{mean:.3g}" for mean in means]
        lines.append(f"| {rows[name]['title']} | {' | '.join(cells)} | {row['seconds']['mean']:.0f} |")
    stages = ", ".join(f"{name} {cell['mean']:.0f}" for name, cell in result["stages"].items())
    return "\n".join([*lines, "", f"Seconds of what rows share, a seed: {stages or 'nothing'}.", ""])


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
    bounds = "" if cell["low"] is None else f" [{cell['low']:.{digits}f}, {cell['high']:.{digits}f}]"
    return f"{cell['mean']:.{digits}f}{bounds}" + (f" ({cell['seeds']} of {seeds} seeds)" if cell["seeds"] < seeds else "")


def plot(path, found, recipe, rows):
    """Learning curves with 95% bands over the seeds; rows that sample only once stand at the right edge as they end."""
    try:
        import matplotlib
    except ImportError:
        fail("the curves are drawn by the package matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.2), dpi=130, layout="constrained")
    names = [name for name in recipe["curves"] if name in found]
    longest = max((len(cell["curve"]) for name in names for cell in found[name]), default=1)
    for colour, name in zip(COLOURS, names):
        cells, title = found[name], rows[name]["title"]
        if cells[0]["curve"]:
            curves = [cell["curve"] for cell in cells]
            steps = range(1, min(map(len, curves)) + 1)
            means, lows, highs = zip(*(bounds([curve[step - 1] for curve in curves]) for step in steps))
            axes.fill_between(steps, lows, highs, color=colour, alpha=0.06, linewidth=0)
            axes.plot(steps, means, color=colour, linewidth=2.6, label=title)
        else:
            mean, low, high = bounds([cell["scores"][recipe["main"]] for cell in cells])
            place = longest * (1.02 + 0.02 * names.index(name))
            axes.errorbar([place], [mean], [[mean - low], [high - mean]], color=colour, fmt="D", capsize=3, label=title)
    axes.set(xlabel="rollouts", ylabel=recipe["main_title"], xlim=(1, None), ylim=(0, 1))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path)
    pyplot.close(figure)


def bounds(values) -> tuple[float, float, float]:
    return mean_interval(values) if len(values) > 1 else (values[0],) * 3
