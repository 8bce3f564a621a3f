"""The page of a run, or of several runs side by side: one HTML file without network, made from the runs' folders alone.

Step by step, the tokens of sampled responses coloured by delta or another of their numbers, and the critique, whose quotes are
tied to the tokens that they mark; whether the criticised tokens moved; held-out prompts before and after; the curves. Texts of
models go into the page as JSON and reach the screen as text, never as markup.
"""

import json
import re
from difflib import SequenceMatcher
from itertools import accumulate
from pathlib import Path

import torch

from t2g import dist, tasks
from t2g.align import resolve, token_offsets
from t2g.checkpoint import UNLIKE
from t2g.cli import fail
from t2g.feedback import Feedback, quoted
from t2g.log import METRICS, cut, read_jsonl, write_json, write_text
from t2g.metrics import mean_interval
from t2g.rollout import sample

SAMPLES_PER_STEP, STEPS_SHOWN, POINTS_SHOWN, HELDOUT_SHOWN, GROUPS_SHOWN = (
    4,
    12,
    400,
    6,
    4,
)  # a page stays small and legible
SHIFTS = ("shift_good", "shift_rest", "shift_poor")
AGAINST = ("shift_poor_above", "shift_good_below")
CURVES = ("reward", "kl", "entropy", "tokens_good", "tokens_poor", "response_tokens", "eos_rate", "approx_kl", "clipfrac",
          "value_explained", "unparsable", "quotes_lost")  # fmt: skip
FILES = ("config.json", "metrics.jsonl", "samples.jsonl", "heldout.jsonl", "result.json")
REWARDS = {
    "span": "span rewards",
    "prm": "rewards by sentence",
    "scalar": "one scalar",
}  # settings of --reward, in words
NO_SETTING = UNLIKE | {
    "seed",
    "batch_size",
}  # the seed, the place, how it was run, and what follows from others


class Samples:
    """Keeps a few responses of a dozen steps, spread evenly: some sampled in training, with every number that stands at their
    tokens, and some to the same held-out prompts each time, before the first update too; and makes the page. The first process
    writes."""

    def __init__(self, folder, max_steps, keep_until=0):
        """A run that goes on after a stop keeps the samples up to the step from which it does."""
        self.folder, self.steps = Path(folder), [0, *spread(STEPS_SHOWN, max_steps)]
        if dist.rank() == 0:
            cut(self.folder / "samples.jsonl", keep_until)

    def watch(self, model, token_rewards, score, tokenizer, heldout, critic, args, step):
        """Responses to the first held-out prompts after a step, what the critic says of them, and their numbers before any further
        update, by train_ppo's functions. Random numbers are the same at each step and are not the run's. Collective."""
        if step not in self.steps:
            return
        examples, generator = (
            heldout[:SAMPLES_PER_STEP],
            torch.Generator(dist.device()).manual_seed(args.seed),
        )
        prompts = [example.prompt for example in examples]
        with dist.whole(model):
            rollout = sample(
                model,
                tokenizer,
                prompts,
                args.response_length,
                args.temperature,
                generator,
                args.bf16,
            )
        feedback = critic(examples, rollout.texts)
        delta, _ = token_rewards(tokenizer, rollout, feedback, args)
        _, _, value, kl = score(rollout, args)
        if dist.rank() == 0:
            self.add(
                step,
                tokenizer,
                examples,
                rollout,
                feedback,
                heldout=True,
                delta=delta,
                kl=kl,
                value=value,
            )

    def add(self, step, tokenizer, examples, rollout, feedback, heldout=False, **at_tokens):
        """at_tokens: (B, T) tensors by name."""
        for row in (
            i - 1 for i in spread(SAMPLES_PER_STEP, len(rollout) if step in self.steps else 0)
        ):
            ids = rollout.response[row][rollout.mask[row]].tolist()
            text, said = rollout.texts[row], feedback[row]
            tokens, written = [], 0
            for t, (token, (start, end)) in enumerate(zip(ids, token_offsets(tokenizer, ids))):
                numbers = {
                    name: round(tensor[row, t].item(), 4) for name, tensor in at_tokens.items()
                }
                shown = text[
                    max(start, written) : end
                ]  # a character of several tokens is shown once
                written = max(written, end)
                tokens.append(
                    {"text": shown if start < end else tokenizer.decode([token]), **numbers}
                )
            line = {
                "step": step,
                "heldout": heldout,
                "prompt": examples[row].prompt,
                "tokens": tokens,
            }
            if isinstance(said, Feedback):
                line |= {"critique": said.critique, "good": said.good, "poor": said.poor}
            else:  # unreadable, or a learned number
                line |= {
                    "critique": None if said is None else f"{said:+.2f}",
                    "good": [],
                    "poor": [],
                }
            with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def finish(self, args, before, after, seconds, heldout, texts_before, texts_after):
        """result.json, the run's page, and what both say in short; the texts are sampled responses to the held-out examples."""
        seconds = {stage: round(number, 1) for stage, number in seconds.items()}
        page = str(Path(args.output_dir) / "page.html")
        result = {"before": before, "after": after, "seconds": seconds, "page": page}
        rows = (
            {"prompt": example.prompt, "before": old, "after": new}
            for example, old, new in zip(heldout, texts_before, texts_after)
        )
        write_text(
            self.folder / "heldout.jsonl",
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        )
        write_json(self.folder / "result.json", result)
        write_page(self.folder / "page.html", [self.folder])
        print(f"\n{'held-out prompts':24}{'before':>10}{'after':>10}")
        print("\n".join(f"{name:24}{before[name]:10.3f}{after[name]:10.3f}" for name in before))
        print(
            f"\npolicy: {args.output_dir}/checkpoint-{args.max_steps}\npage:   {page}\n{json.dumps(result)}"
        )


def write_page(path, folders) -> str:
    """The page of finished runs of train_ppo.py on one task; runs that differ in nothing but seed and places form a group.

    Of a group the page shows means, with 95% intervals where it has two runs or more, and the texts of its first run.

    Returns: the path.
    """
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        fail("a run is named twice, and an interval needs independent runs")
    runs = [read_run(folder) for folder in folders]
    task_names = sorted({run["config"]["task"] for run in runs})
    if len(task_names) != 1:
        fail(
            f"a page needs finished runs of one task, and these are of {' and '.join(task_names) or 'none'}"
        )
    groups, task_metrics = grouped(runs), tasks.load_task(task_names[0]).METRICS
    if len(groups) > GROUPS_SHOWN:
        fail(
            f"a page shows {GROUPS_SHOWN} settings side by side, and these runs have {len(groups)}"
        )
    names = list(dict.fromkeys((*SHIFTS, *task_metrics, *CURVES)))
    values = {
        name: [row[name] for run in runs for row in run["metrics"] if name in row] for name in names
    }
    data = {
        "task": task_names[0],
        "title": f"{task_names[0]}: {' against '.join(map(', '.join, groups))}",
        "groups": [
            {"label": label, "settings": ", ".join(settings), **group_data(members, names)}
            for (label, *settings), members in groups.items()
        ],
        "learned": any(run["config"].get("critic") in ("rm", "openai") for run in runs),
        "limits": {
            name: [min(seen), max(seen)] for name, seen in values.items() if seen
        },  # of the runs, not of the intervals
        "meanings": METRICS | task_metrics,
    }
    write_html(path, "page.html", data)
    return str(path)


def write_html(path, template, data):
    """A page: one of the templates beside this file with its data in it, as JSON that no text of a model can end."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    html = (Path(__file__).parent / template).read_text(encoding="utf-8").replace("/*DATA*/", text)
    try:
        write_text(Path(path), html)
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror})")


def read_run(folder) -> dict:
    """What a finished run left in its folder, by the stem of each file's name."""
    run = {}
    for path in (Path(folder) / name for name in FILES):
        if not path.is_file():
            fail(f"{folder} is no finished run of train_ppo.py: it has no {path.name}")
        try:
            run[path.stem] = (
                read_jsonl(path)
                if path.suffix == ".jsonl"
                else json.loads(path.read_text(encoding="utf-8"))
            )
        except ValueError as error:
            fail(f"{path} is no JSON: {error}")
    if not isinstance(run["config"], dict) or "task" not in run["config"] or not run["metrics"]:
        fail(
            f"{folder} is no finished run of train_ppo.py: its config.json names no task, or its metrics.jsonl is empty"
        )
    return run


def grouped(runs) -> dict[tuple, list]:
    """Lists of runs with the same settings, each under those in which the lists differ, in words, or else the main ones."""
    groups = {}
    for run in runs:
        settings = {
            k: v
            for k, v in run["config"].items()
            if k not in NO_SETTING and v is not None and v is not False
        }
        beside = Path(run["config"]["output_dir"]).parent
        for name in (
            "policy",
            "reward_model",
        ):  # those that lie beside the run were made for its seed
            if name in settings and Path(settings[name]).parent == beside:
                del settings[name]
        members = groups.setdefault(json.dumps(settings, sort_keys=True), [])
        if run["config"]["seed"] in [other["config"]["seed"] for other in members]:
            fail(
                f"two of the runs have the same settings and the seed {run['config']['seed']}; an interval needs independent runs"
            )
        members.append(run)
    settings = [json.loads(key) for key in groups]
    names = [
        name
        for name in sorted(set().union(*settings))
        if any(s.get(name) != settings[0].get(name) for s in settings)
    ]
    names.sort(key=lambda name: name != "reward")  # what most pages compare comes first
    labels = [
        tuple(in_words(name, s.get(name)) for name in names or ("reward", "critic"))
        for s in settings
    ]
    return dict(zip(labels, groups.values()))


def in_words(name, value) -> str:
    """A setting in words.

    >>> in_words("reward", "span"), in_words("noise", ["flip", 0.3]), in_words("kl_target", None)
    ('span rewards', 'noise flip:0.3', 'no kl target')
    """
    if name == "reward" and value in REWARDS:
        return REWARDS[value]
    words = name.replace("_", " ")
    if value is None or value is True:
        return words if value else f"no {words}"
    return f"{words} {':'.join(map(str, value)) if isinstance(value, list) else value}"


def group_data(runs, names) -> dict:
    """What the page shows of runs with the same settings. A metric's curve has the steps at which all of them have it."""
    curves, means, result = {}, {}, {}
    for name in runs[0]["result"]["after"]:
        result[name] = [
            interval([run["result"][when][name] for run in runs]) for when in ("before", "after")
        ]
    for name in (*SHIFTS, *AGAINST, "shift_rank"):
        seen = [[row[name] for row in run["metrics"] if name in row] for run in runs]
        means[name] = (
            interval([sum(values) / len(values) for values in seen]) if all(seen) else None
        )
    for name in names:
        rows = [
            rows
            for rows in zip(*(run["metrics"] for run in runs))
            if all(name in row for row in rows)
        ]
        rows = [rows[i - 1] for i in spread(POINTS_SHOWN, len(rows))]
        curves[name] = [
            [at_step[0]["step"], *interval([row[name] for row in at_step])] for at_step in rows
        ]
    return {
        "seeds": [run["config"]["seed"] for run in runs],
        "result": result,
        "curves": curves,
        "means": means,
        "samples": [sample | quotes_with_tokens(sample) for sample in runs[0]["samples"]],
        "heldout": [
            row | changed_words(row["before"], row["after"])
            for row in runs[0]["heldout"][:HELDOUT_SHOWN]
        ],
    }


def quotes_with_tokens(sample) -> dict[str, list]:
    """The good and the poor quotes of a sample, each with the numbers of the tokens that it marks; none if it stands nowhere."""
    words = [token["text"] for token in sample["tokens"]]
    if words and not sample["tokens"][-1]["delta"]:
        words[-1] = ""  # EOS, as a rule: its name is no part of the text
    text, ends, found = "".join(words), list(accumulate(map(len, words))), {"good": [], "poor": []}
    for kind in found:
        given = [quoted(quote)[0] for quote in sample.get(kind, ())]
        for quote, plain in zip(sample.get(kind, ()), given):
            alone = {
                "good": [],
                "poor": [],
                kind: [plain] * given.count(plain),
            }  # a quote that is given k times marks k places
            spans, _ = resolve(text, Feedback("", **alone))
            tokens = [
                i
                for i, end in enumerate(ends)
                if any(s.start < end and end - len(words[i]) < s.end for s in spans)
            ]
            found[kind].append(
                (quote if isinstance(quote, dict) else {"text": quote}) | {"tokens": tokens}
            )
    return found


def changed_words(before, after) -> dict[str, list]:
    """Both texts in pieces [text, changed]: 1 for words that the other text does not have there.

    >>> changed_words("Ana is 27, in Porto.", "Ana is 41, in Porto.")["after"]
    [['Ana is', 0], [' 41', 1], [', in Porto.', 0]]
    """
    old, new = (re.findall(r"\s*(?:\w+|[^\w\s])", text) for text in (before, after))
    plain = ([word.strip() for word in words] for words in (old, new))
    changes = SequenceMatcher(None, *plain, autojunk=False).get_opcodes()
    return {
        "before": [
            ["".join(old[i:j]), int(change != "equal")] for change, i, j, _, _ in changes if i < j
        ],
        "after": [
            ["".join(new[i:j]), int(change != "equal")] for change, _, _, i, j in changes if i < j
        ],
    }


def interval(values) -> list[float]:
    """[mean], or [mean, low, high] of two runs or more; five digits are enough for a screen."""
    return [float(f"{x:.5g}") for x in (mean_interval(values) if len(values) > 1 else values)]


def spread(count, n) -> list[int]:
    """Up to so many of the numbers 1 to n, spread evenly, both ends among them."""
    count = min(count, n)
    return [1 + round(i * (n - 1) / max(count - 1, 1)) for i in range(count)]
