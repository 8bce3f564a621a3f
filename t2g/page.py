"""The page of runs of train_ppo.py: one HTML file, made from their folders, without network.

Texts of models are shown as text, never as markup. Every run writes its own page.html;
`python eval.py page RUN ...` puts several runs on one page.
"""

import json
from pathlib import Path

from t2g import dist, tasks
from t2g.align import resolve, span_rewards, token_offsets
from t2g.cli import fail
from t2g.feedback import Feedback, quoted
from t2g.folder import RESUME_IGNORES
from t2g.log import METRICS, read_json, read_jsonl, truncate, write_json, write_text

STEPS_SHOWN, SAMPLES_PER_STEP, GROUPS_SHOWN = 12, 4, 4
SHIFTS = ("shift_good", "shift_rest", "shift_poor")
MEANS = (*SHIFTS, "shift_poor_above", "shift_good_below", "shift_rank")  # over the steps of a run
CURVES = (
    *("reward", "kl", "entropy", "tokens_good", "tokens_poor", "response_tokens", "eos_rate"),
    *("approx_kl", "clipfrac", "value_explained", "unparsable", "quotes_lost"),
)
FILES = ("config.json", "metrics.jsonl", "samples.jsonl", "result.json")
NO_SETTING = RESUME_IGNORES | {"seed", "batch_size"}  # the latter follows from other settings


class Samples:
    """Rank 0 saves a few responses of a dozen steps, with delta, KL, V and so on of each token.

    A resumed run keeps the samples up to keep_until, the step that it resumes from.
    """

    def __init__(self, folder, max_steps, keep_until=0):
        self.folder, self.steps = Path(folder), [0, *spread(STEPS_SHOWN, max_steps)]
        if dist.rank() == 0:
            truncate(self.folder / "samples.jsonl", keep_until)

    def add(self, step, tokenizer, examples, rollout, feedback, heldout=False, **at_tokens):
        """Writes some rows of a rollout, if the step is shown. at_tokens: (B, T) tensors."""
        if step not in self.steps or dist.rank() > 0:
            return
        at_tokens = {name: tensor.cpu() for name, tensor in at_tokens.items()}
        lines = ""
        for number in spread(SAMPLES_PER_STEP, len(rollout)):
            row = number - 1
            ids, text, one = rollout.ids(row), rollout.texts[row], feedback[row]
            offsets, tokens = token_offsets(tokenizer, ids), []
            for t, shown in enumerate(texts_of_tokens(tokenizer, ids, text, offsets)):
                numbers = {name: round(x[row, t].item(), 4) for name, x in at_tokens.items()}
                tokens.append({"text": shown, **numbers})
            if not isinstance(one, Feedback):  # unreadable, or a learned scalar
                one = Feedback(None if one is None else f"{one:+.2f}")
            line = {"step": step, "heldout": heldout, "prompt": examples[row].prompt}
            line |= {"tokens": tokens, "critique": one.critique}
            line["good"] = quotes_with_tokens(text, offsets, "good", one.good)
            line["poor"] = quotes_with_tokens(text, offsets, "poor", one.poor)
            lines += json.dumps(line, ensure_ascii=False) + "\n"
        with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
            file.write(lines)

    def finish(self, args, before, after, seconds):
        seconds = {stage: round(number, 1) for stage, number in seconds.items()}
        page = str(Path(args.output_dir) / "page.html")
        result = {"before": before, "after": after, "seconds": seconds, "page": page}
        write_json(self.folder / "result.json", result)
        write_page(self.folder / "page.html", [self.folder])
        print(f"\n{'held-out prompts':24}{'before':>10}{'after':>10}")
        for name in before:
            print(f"{name:24}{before[name]:10.3f}{after[name]:10.3f}")
        print(f"\npolicy: {args.output_dir}/checkpoint-{args.max_steps}\npage:   {page}")
        print(json.dumps(result))


def texts_of_tokens(tokenizer, ids, text, offsets) -> list[str]:
    """Returns what is shown of each token: a shared character once, a special token by its name."""
    shown, written = [], 0
    for i, (start, end) in zip(ids, offsets):
        shown.append(text[max(start, written) : end] if start < end else tokenizer.decode([i]))
        written = max(written, end)
    return shown


def quotes_with_tokens(text, offsets, kind, quotes) -> list[dict]:
    """Returns the good or poor quotes, each with the numbers of the tokens that it marks."""
    entries, texts = [], [quoted(quote)[0] for quote in quotes]
    for quote, plain in zip(quotes, texts):
        # A quote that is given k times marks k places.
        spans, _ = resolve(text, Feedback("", **{kind: [plain] * texts.count(plain)}))
        marked = span_rewards(offsets, spans).nonzero()[:, 0]
        entry = quote if isinstance(quote, dict) else {"text": quote}
        entries.append(entry | {"tokens": marked.tolist()})
    return entries


def write_page(path, folders) -> str:
    """Writes the page of finished runs of train_ppo.py on one task, and returns its path.

    Runs that differ only in seed and folders form a group, of which it shows the mean, each seed,
    and the texts of the first run.
    """
    runs = [read_run(folder) for folder in folders]
    task_names = sorted({run["config"]["task"] for run in runs})
    if len(task_names) != 1:
        fail(f"a page needs runs of one task; these are of {' and '.join(task_names) or 'none'}")
    groups = grouped(runs)
    if len(groups) > GROUPS_SHOWN:
        fail(f"a page shows {GROUPS_SHOWN} settings side by side; these runs have {len(groups)}")
    task_metrics = tasks.load_task(task_names[0]).METRICS
    names = dict.fromkeys((*SHIFTS, *task_metrics, *CURVES))
    data = {
        "task": task_names[0],
        "title": f"{task_names[0]}: {' against '.join(groups)}",
        "groups": [{"label": label} | group_data(runs, names) for label, runs in groups.items()],
        "learned": any(run["config"].get("critic") in ("rm", "openai") for run in runs),
        "meanings": METRICS | task_metrics,
    }
    # With "<" escaped, no text of a model can end the script element that holds the data.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(path), template.replace("/*DATA*/", text))
    return str(path)


def read_run(folder) -> dict:
    """Returns the content of the FILES of a finished run, by the stem of their names."""
    run = {}
    for path in (Path(folder) / name for name in FILES):
        if not path.is_file():
            fail(f"{folder} is no finished run of train_ppo.py: it has no {path.name}")
        run[path.stem] = read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)
    return run


def grouped(runs) -> dict[str, list]:
    """Groups runs with the same settings; each label names the settings in which groups differ."""
    groups = {}
    for run in runs:
        config, settings = run["config"], {}
        beside = Path(config["output_dir"]).parent
        for name, value in config.items():
            # A policy or a reward model beside the run was made for its seed.
            of_seed = name in ("policy", "reward_model") and Path(value or "").parent == beside
            off = value is None or value is False
            if name not in NO_SETTING and not off and not of_seed:
                settings[name] = value
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    all_settings = [json.loads(key) for key in groups]
    names = sorted({name for settings in all_settings for name in settings})
    names = [n for n in names if any(s.get(n) != all_settings[0].get(n) for s in all_settings)]
    names, labels = names or ["reward", "critic"], []
    for settings in all_settings:
        labels.append(", ".join(f"{name} {settings.get(name, 'off')}" for name in names))
    return dict(zip(labels, groups.values()))


def group_data(runs, names) -> dict:
    """Returns what the page shows of runs with the same settings.

    A metric's curve has the steps at which all runs have it; a number is [mean, each seed's value].
    """
    curves, means, result, first = {name: [] for name in names}, {}, {}, runs[0]
    for name, curve in curves.items():
        for rows in zip(*(run["metrics"] for run in runs)):
            if all(name in row for row in rows):
                curve.append([rows[0]["step"], *mean_and_seeds([row[name] for row in rows])])
    for name in MEANS:
        logged = [[row[name] for row in run["metrics"] if name in row] for run in runs]
        if all(logged):
            means[name] = mean_and_seeds([sum(values) / len(values) for values in logged])
    for name in first["result"]["after"]:
        before, after = ([run["result"][w][name] for run in runs] for w in ("before", "after"))
        result[name] = [mean_and_seeds(before), mean_and_seeds(after)]
    return {
        "seeds": [run["config"]["seed"] for run in runs],
        "result": result,
        "curves": curves,
        "means": means,
        "samples": first["samples"],
    }


def mean_and_seeds(values) -> list[float]:
    """Returns [mean], or [mean, each value] of several runs, to five digits."""
    numbers = [sum(values) / len(values), *(values if len(values) > 1 else ())]
    return [float(f"{number:.5g}") for number in numbers]


def spread(count, n) -> list[int]:
    """Returns up to `count` of the numbers 1 to n, evenly spread, first and last among them."""
    count = min(count, n)
    return [1 + round(i * (n - 1) / max(count - 1, 1)) for i in range(count)]
