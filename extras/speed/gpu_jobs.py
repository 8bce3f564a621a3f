"""The parts of the GPU check that are whole jobs of the project, run as its users run them."""

import itertools
import json
from pathlib import Path

from extras.human.records import records
from extras.speed.gpu import HERE, run
from t2g.log import read_json, read_jsonl, write_text
from t2g.notes import write_whole
from t2g.run import PHASES
from t2g.tasks import summarize


def toy(args, report):
    """The starting policy, then PPO with the rule as critic: scores before and after, seconds."""
    root = Path(args.out).resolve() / "toy"
    short = "--max_steps 2 --per_device_train_batch_size 4 " if args.rehearse else ""
    few = "--eval_samples 4 " if args.rehearse else ""
    run(f"train_sft.py {short}--output_dir", root / "sft")
    run(f"train_ppo.py --critic rule {short}{few}--output_dir", root / "ppo")
    result = read_json(root / "ppo" / "result.json")
    for name, after in result["after"].items():
        report(name, after, f"before: {result['before'][name]:.4g}")
    rows = read_jsonl(root / "ppo" / "metrics.jsonl")
    for phase in PHASES:
        seconds = [row[f"seconds_{phase}"] for row in rows]
        report(f"{phase}, seconds a step", sum(seconds) / len(seconds))
    report("seconds of the PPO stage", result["seconds"]["ppo"], "loading and measuring included")


def news(args, report):
    """SFT, one scalar and Text2Grad of recipes/smollm2_news.toml, three seeds; no BERTScore."""
    folder = Path(args.out).resolve() / "news"
    model, data = model_and_data(args, folder)
    changes = {
        "SmolLM2-135M-Instruct.Q4_1.gguf": model,
        "--data train.jsonl": f"--data {data / 'train.jsonl'}",
        "--heldout_data val.jsonl": f"--heldout_data {data / 'val.jsonl'}",
        "--bert_model minilm --bert_layers 6": "",
        '"bert_score", ': "",
    }
    flags = ["--recipe", folder / "news.toml", "--output_dir", folder / "runs", "--jobs", 6]
    flags += "--rows start scalar text2grad".split()
    if args.rehearse:
        short = "--max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1"
        changes |= {"--max_steps 20": short, "--eval_samples 250": "--eval_samples 4"}
        flags += "--seeds 0 --jobs 1".split()
    recipe = (HERE / "recipes" / "smollm2_news.toml").read_text()
    for old, new in changes.items():
        assert old in recipe, f"recipes/smollm2_news.toml has no {old}"
        recipe = recipe.replace(old, str(new))
    write_text(folder / "news.toml", recipe)
    table = json.loads(run("-m extras.reproduce", *flags).splitlines()[-1])
    for row, metrics in table["rows"].items():
        for name, cell in metrics.items():
            spread = "" if cell["low"] is None else f"[{cell['low']:.3g}, {cell['high']:.3g}]"
            if not name.endswith(("_tokens", "_flops")):
                report(f"{row}: {name}", cell["mean"], spread)


def human(args, report):
    """A reward model of DeFacto's feedback, whole articles in view, three passes; and the rule."""
    folder = Path(args.out).resolve() / "human"
    model, data = model_and_data(args, folder)
    train, heldout = (read_jsonl(data / f"{part}.jsonl") for part in ("train", "val"))
    write_whole(folder / "notes.jsonl", records(train, "train.jsonl"))
    truth = records(heldout, "val.jsonl")
    write_whole(folder / "truth.jsonl", truth)
    for record, row in zip(truth, heldout):
        example = summarize.example_of(row["article"], row["abstract"])
        feedback = summarize.critique(example, row["candidate"])
        record |= {"critique": feedback.critique, "good_spans": feedback.good}
        record["poor_spans"] = feedback.poor
        del record["kinds"]
    write_whole(folder / "rule.jsonl", truth)
    task = ["--task", "summarize", "--bf16"]
    steps = 2 if args.rehearse else 3 * len(train) // 8
    flags = ["--max_steps", steps, "--learning_rate", 1e-4, "--validation_share", 0.04]
    flags += ["--model", model, "--annotations", folder / "notes.jsonl"]
    run("train_rm.py", *task, *flags, "--output_dir", folder / "rm")
    flags = ["--annotations", folder / "truth.jsonl"]
    flags += ["--critique_length", 8] if args.rehearse else []
    printed = run("eval.py rm", folder / "rm", folder / "rule.jsonl", *task, *flags)
    for path, card in json.loads(printed.splitlines()[-1]).items():
        for sign in ("good", "poor", "any_poor"):
            for name, value in card[sign].items():
                low, high = card["intervals"][sign][name] or (0, 0)
                report(f"{Path(path).stem}: {sign}, {name}", value, f"[{low:.3f}, {high:.3f}]")
        report(f"{Path(path).stem}: readable", card["json_valid"])


def model_and_data(args, folder):
    """The paths of SmolLM2 and of DeFacto's folder; a rehearsal makes up both in the new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return rehearsal(folder) if args.rehearse else (args.model, Path(args.data).resolve())


def rehearsal(folder):
    """A small random model, and a folder of made-up texts in the fields of DeFacto."""
    from extras.speed.synthetic import random_model, sentences  # here, because it loads slowly

    random_model("tiny", folder / "model", max_position_embeddings=512)
    rows = []
    for article, other in itertools.pairwise(sentences(24, words=8)):
        feedback = dict(summary=article, explanation="It is wrong.", instruction="")
        feedback["instruction_list"] = []
        row = dict(article=article, abstract=article, candidate=other, feedback=feedback)
        rows.append(row | dict(has_error=True, intrinsic_error=True, extrinsic_error=False))
    write_whole(folder / "train.jsonl", rows[:16])
    write_whole(folder / "val.jsonl", rows[16:])
    return folder / "model", folder
