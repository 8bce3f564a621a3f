"""The page of runs of train_ppo.py: one HTML file, made from their folders, without network.

It shows the tokens of sampled responses coloured by delta or another of their numbers, with the
critique and its quotes; whether the criticised tokens moved; held-out prompts before and after
training; and the curves. Texts of models are put on the page as text, never as markup.
eval.py page writes the page of several runs, and eval.py rm that of critics (t2g/card.py).
"""

import json
import re
from difflib import SequenceMatcher
from itertools import accumulate
from pathlib import Path

from t2g import dist, tasks
from t2g.align import resolve, token_offsets
from t2g.cli import fail
from t2g.feedback import Feedback, quoted
from t2g.folder import RESUME_IGNORES
from t2g.log import METRICS, read_json, read_jsonl, truncate, write_json, write_text

# A page stays small and legible.
STEPS_SHOWN, SAMPLES_PER_STEP, POINTS_SHOWN, HELDOUT_SHOWN, GROUPS_SHOWN = 12, 4, 400, 6, 4
SHIFTS = ("shift_good", "shift_rest", "shift_poor")
AGAINST = ("shift_poor_above", "shift_good_below")
CURVES = (
    *("reward", "kl", "entropy", "tokens_good", "tokens_poor", "response_tokens", "eos_rate"),
    *("approx_kl", "clipfrac", "value_explained", "unparsable", "quotes_lost"),
)
FILES = ("config.json", "metrics.jsonl", "samples.jsonl", "heldout.jsonl", "result.json")
REWARDS = {"span": "span rewards", "prm": "rewards by sentence", "scalar": "one scalar"}
NO_SETTING = RESUME_IGNORES | {"seed", "batch_size"}  # the latter follows from other settings


class Samples:
    """Keeps a few responses of a dozen steps, spread evenly, with the numbers at their tokens.

    Some are of training, others answer the same held-out prompts each time. Rank 0 writes.
    """

    def __init__(self, folder, max_steps, keep_until=0):
        """A resumed run keeps the samples up to keep_until, the step that it resumes from."""
        self.folder, self.steps = Path(folder), [0, *spread(STEPS_SHOWN, max_steps)]
        if dist.rank() == 0:
            truncate(self.folder / "samples.jsonl", keep_until)

    def add(self, step, tokenizer, examples, rollout, feedback, heldout=False, **at_tokens):
        """Keeps some rows of a rollout, if the step is shown; at_tokens: (B, T) tensors by name."""
        count = len(rollout) if step in self.steps else 0
        at_tokens = {name: tensor.cpu() for name, tensor in at_tokens.items() if count}
        for number in spread(SAMPLES_PER_STEP, count):
            row = number - 1
            ids, text, one = rollout.ids(row), rollout.texts[row], feedback[row]
            tokens, written = [], 0
            for t, (start, end) in enumerate(token_offsets(tokenizer, ids)):
                # A character of several tokens is shown once, a special token by its name.
                shown = text[max(start, written) : end] if start < end else tokenizer.decode(ids[t])
                written = max(written, end)
                numbers = {name: round(x[row, t].item(), 4) for name, x in at_tokens.items()}
                tokens.append({"text": shown, **numbers})
            if not isinstance(one, Feedback):  # unreadable, or a learned scalar
                one = Feedback(None if one is None else f"{one:+.2f}")
            line = {"step": step, "heldout": heldout, "prompt": examples[row].prompt}
            line |= {"tokens": tokens, **vars(one)}
            with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def finish(self, args, heldout, before, after, seconds):
        """Writes result.json, heldout.jsonl and the page, and prints the results.

        Args: before and after, scores and texts of metrics.evaluate(); seconds, of each stage.
        """
        seconds = {stage: round(number, 1) for stage, number in seconds.items()}
        (scores, texts), (scores_after, texts_after) = before, after
        page = str(Path(args.output_dir) / "page.html")
        result = {"before": scores, "after": scores_after, "seconds": seconds, "page": page}
        lines = ""
        for example, a, b in zip(heldout, texts, texts_after):
            row = {"prompt": example.prompt, "before": a, "after": b}
            lines += json.dumps(row, ensure_ascii=False) + "\n"
        write_text(self.folder / "heldout.jsonl", lines)
        write_json(self.folder / "result.json", result)
        write_page(self.folder / "page.html", [self.folder])
        print(f"\n{'held-out prompts':24}{'before':>10}{'after':>10}")
        for name in scores:
            print(f"{name:24}{scores[name]:10.3f}{scores_after[name]:10.3f}")
        print(f"\npolicy: {args.output_dir}/checkpoint-{args.max_steps}\npage:   {page}")
        print(json.dumps(result))


def write_page(path, folders) -> str:
    """Writes the page of finished runs of train_ppo.py on one task; returns the path.

    Runs that differ in seed and folders alone form a group. Of a group the page shows the mean and
    each seed, and the texts of its first run.
    """
    runs = [read_run(folder) for folder in folders]
    task_names = sorted({run["config"]["task"] for run in runs})
    if len(task_names) != 1:
        fail(f"a page needs runs of one task; these are of {' and '.join(task_names) or 'none'}")
    groups = grouped(runs)
    if len(groups) > GROUPS_SHOWN:
        fail(f"a page shows {GROUPS_SHOWN} settings side by side; these runs have {len(groups)}")
    task_metrics = tasks.load_task(task_names[0]).METRICS
    names, shown = list(dict.fromkeys((*SHIFTS, *task_metrics, *CURVES))), []
    for (label, *settings), members in groups.items():
        group = {"label": label, "settings": ", ".join(settings)}
        shown.append(group | group_data(members, names))
    data = {
        "task": task_names[0],
        "title": f"{task_names[0]}: {' against '.join(map(', '.join, groups))}",
        "groups": shown,
        "learned": any(run["config"].get("critic") in ("rm", "openai") for run in runs),
        "meanings": METRICS | task_metrics,
    }
    write_html(path, data)
    return str(path)


def write_html(path, data):
    """Writes page.html with `data` in it, as JSON that no text of a model can end."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(path), template.replace("/*DATA*/", text))
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror})")


def read_run(folder) -> dict:
    """The files of a finished run, by the stem of each file's name."""
    run = {}
    for path in (Path(folder) / name for name in FILES):
        if not path.is_file():
            fail(f"{folder} is no finished run of train_ppo.py: it has no {path.name}")
        run[path.stem] = read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)
    return run


def grouped(runs) -> dict[tuple, list]:
    """Runs with the same settings, under the settings in which the groups differ, in words."""
    groups = {}
    for run in runs:
        config, settings = run["config"], {}
        beside = str(Path(config["output_dir"]).parent)
        for name, value in config.items():
            # a policy or a reward model beside the run was made for its seed
            made = name in ("policy", "reward_model") and str(Path(value or "").parent) == beside
            off = value is None or value is False
            if name not in NO_SETTING and not off and not made:
                settings[name] = value
        members = groups.setdefault(json.dumps(settings, sort_keys=True), [])
        if config["seed"] in [other["config"]["seed"] for other in members]:
            fail(f"two of the runs have the same settings and the seed {config['seed']}")
        members.append(run)
    settings = [json.loads(key) for key in groups]
    names = sorted(set().union(*settings), key=lambda name: (name != "reward", name))
    names = [name for name in names if any(s.get(name) != settings[0].get(name) for s in settings)]
    names = names or ["reward", "critic"]
    labels = [tuple(in_words(name, s.get(name)) for name in names) for s in settings]
    return dict(zip(labels, groups.values()))


def in_words(name, value) -> str:
    """A setting in words.

    >>> in_words("reward", "span"), in_words("noise", ["flip", 0.3]), in_words("kl_target", None)
    ('span rewards', 'noise flip:0.3', 'no kl target')
    """
    if name == "reward" and value in REWARDS:
        return REWARDS[value]
    words = name.replace("_", " ")
    if value is None:
        return f"no {words}"
    if value is True:
        return words
    return f"{words} {':'.join(map(str, value)) if isinstance(value, list) else value}"


def group_data(runs, names) -> dict:
    """What the page shows of runs with the same settings.

    A metric's curve has the steps at which all runs have it; a number is [mean, each seed's value].
    """
    curves, means, result, first = {}, {}, {}, runs[0]
    steps = list(zip(*(run["metrics"] for run in runs)))
    for name in names:
        shared = [rows for rows in steps if all(name in row for row in rows)]
        shown = [shared[i - 1] for i in spread(POINTS_SHOWN, len(shared))]
        points = [mean_and_seeds([row[name] for row in rows]) for rows in shown]
        curves[name] = [[rows[0]["step"], *point] for rows, point in zip(shown, points)]
    for name in (*SHIFTS, *AGAINST, "shift_rank"):
        logged = [[row[name] for row in run["metrics"] if name in row] for run in runs]
        if all(logged):
            means[name] = mean_and_seeds([sum(values) / len(values) for values in logged])
    for name in first["result"]["after"]:
        before, after = ([run["result"][w][name] for run in runs] for w in ("before", "after"))
        result[name] = [mean_and_seeds(before), mean_and_seeds(after)]
    heldout = first["heldout"][:HELDOUT_SHOWN]
    return {
        "seeds": [run["config"]["seed"] for run in runs],
        "result": result,
        "curves": curves,
        "means": means,
        "samples": [sample | quotes_with_tokens(sample) for sample in first["samples"]],
        "heldout": [row | changed_words(row["before"], row["after"]) for row in heldout],
    }


def mean_and_seeds(values) -> list[float]:
    """[mean], or [mean, each value] of several runs; five digits are enough for a screen."""
    numbers = [sum(values) / len(values), *(values if len(values) > 1 else ())]
    return [float(f"{number:.5g}") for number in numbers]


def quotes_with_tokens(sample) -> dict[str, list]:
    """The good and poor quotes of a sample, each with the numbers of the tokens that it marks."""
    words = [token["text"] for token in sample["tokens"]]
    if words and not sample["tokens"][-1]["delta"]:
        words[-1] = ""  # mostly EOS, whose name is no part of the text
    text, ends = "".join(words), list(accumulate(map(len, words)))
    linked = {"good": [], "poor": []}
    for kind, quotes in linked.items():
        given = [quoted(quote)[0] for quote in sample[kind]]
        for quote, plain in zip(sample[kind], given):
            # a quote that is given k times marks k places
            spans, _ = resolve(text, Feedback("", **{kind: [plain] * given.count(plain)}))
            marked = []
            for i, (word, end) in enumerate(zip(words, ends)):
                if any(span.start < end and end - len(word) < span.end for span in spans):
                    marked.append(i)
            entry = quote if isinstance(quote, dict) else {"text": quote}
            quotes.append(entry | {"tokens": marked})
    return linked


def changed_words(before, after) -> dict[str, list]:
    """Both texts in pieces [text, changed]; 1 for words that the other text does not have there.

    >>> changed_words("Ana is 27, in Porto.", "Ana is 41, in Porto.")["after"]
    [['Ana is', 0], [' 41', 1], [', in Porto.', 0]]
    """
    old, new = (re.findall(r"\s*(?:\w+|[^\w\s])", text) for text in (before, after))
    plain = ([word.strip() for word in words] for words in (old, new))
    pieces = {"before": [], "after": []}
    for change, a, b, c, d in SequenceMatcher(None, *plain, autojunk=False).get_opcodes():
        for when, words in (("before", old[a:b]), ("after", new[c:d])):
            if words:
                pieces[when].append(["".join(words), int(change != "equal")])
    return pieces


def spread(count, n) -> list[int]:
    """Up to `count` of the numbers 1 to n, evenly spread, the first and the last among them."""
    count = min(count, n)
    return [1 + round(i * (n - 1) / max(count - 1, 1)) for i in range(count)]
