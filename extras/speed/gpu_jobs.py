"""The parts of the GPU proof that are whole jobs of the project, run as its users run them."""

import itertools
import json
from pathlib import Path

from extras.human.records import records
from extras.speed.gpu import HERE, run
from t2g.log import read_jsonl, write_text
from t2g.tasks import summarize


def toy(args, report):
    """The starting policy, then PPO with the rule as critic: scores before and after, seconds."""
    root = Path(args.out).resolve() / "toy"
    short = "--max_steps 2 --per_device_train_batch_size 4 " if args.rehearse else ""
    few = "--eval_samples 4 " if args.rehearse else ""
    run(f"train_sft.py {short}--output_dir", root / "sft")
    run(f"train_ppo.py --critic rule {short}{few}--output_dir", root / "ppo")
    result = json.loads((root / "ppo" / "result.json").read_text())
    for name, after in result["after"].items():
        report(name, after, f"before: {result['before'][name]:.4g}")
    rows = read_jsonl(root / "ppo" / "metrics.jsonl")
    for phase in ("rollout", "critique", "score", "update", "shift"):
        seconds = [row[f"seconds_{phase}"] for row in rows]
        report(f"{phase}, seconds a step", sum(seconds) / len(seconds))
    report("seconds of the PPO stage", result["seconds"]["ppo"], "loading and measuring included")


def news(args, report):
    """recipes/smollm2_news, its two trained rows: means and intervals over three seeds."""
    folder = Path(args.out).resolve() / "news"
    model, data = args.model, args.data
    if args.rehearse:
        model, data = rehearsal(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = (HERE / "recipes" / "smollm2_news.toml").read_text()
    text = text.replace("SmolLM2-135M-Instruct.Q4_1.gguf", str(model))
    text = text.replace("train.jsonl", str(data))
    flags = ["--recipe", folder / "news.toml", "--output_dir", folder / "runs"]
    if args.rehearse:
        short = "--max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1"
        text = text.replace("--max_steps 20", short).replace("samples 64", "samples 4")
        flags += "--seeds 0 --jobs 1 --rows text2grad".split()
    else:
        flags += ["--jobs", 6]
    write_text(folder / "news.toml", text)
    table = json.loads(run("-m extras.reproduce", *flags).splitlines()[-1])
    for row, metrics in table["rows"].items():
        for name, cell in metrics.items():
            spread = "" if cell["low"] is None else f"[{cell['low']:.3g}, {cell['high']:.3g}]"
            if not name.endswith(("_tokens", "_flops")):
                report(f"{row}: {name}", cell["mean"], spread)


def human(args, report):
    """A reward model of DeFacto's feedback, whole articles in view, three passes; and the rule."""
    folder = Path(args.out).resolve() / "human"
    model, data = args.model, Path(args.human or folder).resolve()
    if args.rehearse:
        model, _ = rehearsal(folder)
    train, held_out = (read_jsonl(data / f"{part}.jsonl") for part in ("train", "val"))
    write_lines(folder / "notes.jsonl", records(train, "train.jsonl"))
    truth = records(held_out, "val.jsonl")
    write_lines(folder / "truth.jsonl", truth)
    for record, row in zip(truth, held_out):
        example = summarize.example_of(row["article"], row["abstract"])
        said = summarize.critique(example, row["candidate"])
        record |= {"critique": said.critique, "good_spans": said.good, "poor_spans": said.poor}
        del record["kinds"]
    write_lines(folder / "rule.jsonl", truth)
    task = ["--task", "summarize", "--bf16"]
    steps = 2 if args.rehearse else 3 * len(train) // 8
    flags = ["--max_steps", steps, "--learning_rate", 1e-4, "--validation_share", 0.04]
    flags += ["--model", model, "--annotations", folder / "notes.jsonl"]
    run("train_rm.py", *task, *flags, "--output_dir", folder / "rm")
    length = ["--critique_length", 8] if args.rehearse else []
    flags = ["--annotations", folder / "truth.jsonl", *length]
    printed = run("eval.py rm", folder / "rm", folder / "rule.jsonl", *task, *flags)
    cards = json.loads(printed.splitlines()[-1])
    for path, card in cards.items():
        for sign in ("good", "poor", "any_poor"):
            for name, value in card[sign].items():
                low, high = card["intervals"][sign][name] or (0, 0)
                report(f"{Path(path).stem}: {sign}, {name}", value, f"[{low:.3f}, {high:.3f}]")
        report(f"{Path(path).stem}: readable", card["json_valid"])


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def rehearsal(folder):
    """A small model with random weights, and DeFacto's fields with made-up texts."""
    from extras.speed.given import random_model, sentences  # here, for it takes seconds to load

    random_model("tiny", folder / "model", max_position_embeddings=512)
    texts = sentences(24, words=8)
    rows = []
    for article, other in itertools.pairwise(texts):
        said = {"summary": article, "explanation": "It is wrong.", "instruction": ""}
        rows.append({"article": article, "abstract": article, "candidate": other})
        rows[-1] |= {"has_error": True, "intrinsic_error": True, "extrinsic_error": False}
        rows[-1]["feedback"] = said | {"instruction_list": []}
    for part, some in (("train", rows[:16]), ("val", rows[16:])):
        write_lines(folder / f"{part}.jsonl", some)
    return folder / "model", folder / "train.jsonl"
