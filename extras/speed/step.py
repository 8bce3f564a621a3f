"""One PPO step against the peer that the field came from, trl 0.11.3, on the same work in turns; and sampling against `generate`.

    python3.11 -m venv ../peer && ../peer/bin/pip install -r requirements-bench.txt
    python -m bench.step MODEL --peer ../peer/bin/python        # MODEL: a folder, a hub id or a .gguf file; 15 minutes on 2 cores

8 prompts of about 60 tokens, 48 new tokens each, none of which ends a response; 4 epochs of 2 minibatches of 4. Ours is
train_ppo.py as users start it: it also criticises, aligns and logs. The peer is in fp32, and its update holds its forward passes
for old log-probabilities and reference, so ours counts them too. Each turn runs every program once, in a process of its own; the
first step of a process is left out. Ratios are the peer's seconds by ours (of memory ours by the peer's), medians over turns.

Shares: of the peak of matrix products that the update reaches, 6 FLOPs a weight and token; of the memory's bandwidth that decoding
reaches, each weight being read once a token. Both peaks are measured here.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from extras.scale import plan
from t2g import cli, policy
from t2g.log import read_jsonl, write_json, write_text
from t2g.rollout import chat_text, sample
from t2g.tasks import summarize

HERE = Path(__file__).resolve().parents[2]
ROWS, MICROBATCH, EPOCHS, NEW, WORDS_EACH = 8, 4, 4, 48, 22
OURS = {
    "fp32": [],
    "bf16": ["--bf16"],
    "fp32, LoRA": ["--lora_r", "16"],
    "bf16, LoRA": ["--bf16", "--lora_r", "16"],
}
WORDS = "the a river house bread old green walks sings under over town morning paper letter boat seven many children and but".split()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id or a .gguf file")
    parser.add_argument(
        "--peer",
        help="the Python of an environment with requirements-bench.txt; without it no ratios to the peer",
    )
    parser.add_argument(
        "--turns", type=cli.positive(int), default=3, help="how often every program runs"
    )
    parser.add_argument(
        "--steps",
        type=cli.positive(int),
        default=3,
        help="of each program in each turn, one more than is counted",
    )
    args = parser.parse_args()
    if args.steps < 2:
        cli.fail("--steps must be 2 or more, for the first one is left out")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokenizer, model = prepare(work, args.model)
        sizes = {
            "weights": sum(p.numel() for p in model.parameters()),
            "head": model.get_output_embeddings().weight.numel(),
        }
        plain = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32).to(
            model.device
        )
        decoding = decode(model, plain, tokenizer, args.turns)
        del model, plain
        machine = dict(zip(("gib", "bf16", "fp32", "bandwidth"), plan.this_machine()))
        programs = {"peer": lambda: peer(work, args)} if args.peer else {}
        programs |= {
            name: lambda flags=flags: ours(work, args, flags) for name, flags in OURS.items()
        }
        seen = {name: [] for name in programs}
        for name in tqdm([name for _ in range(args.turns) for name in programs], unit="run"):
            seen[name].append(programs[name]())
    result = {
        name: summary(name, turns, seen.get("peer"), sizes, machine) for name, turns in seen.items()
    }
    for name, row in decoding.items():
        result.setdefault(name, {}).update(row)
    show(result, machine)
    print(json.dumps(result | {"machine": machine}))


def prepare(work, path):
    """The work: a model, and prompts, as texts for us and as ids for the peer."""
    tokenizer, model = endless(path)
    policy.save(model, tokenizer, work, 1)
    (work / "checkpoint-1").rename(work / "model")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=WORDS_EACH)) for _ in range(10 * ROWS)]
    rows = [
        {"article": text.capitalize() + ".", "abstract": text.capitalize() + "."} for text in texts
    ]
    write_text(work / "posts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    prompts = [
        chat_text(tokenizer, summarize.INSTRUCTION.format(row["article"])) for row in rows[:ROWS]
    ]
    write_json(
        work / "work.json",
        {
            "prompts": [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts],
            "special_tokens": {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token},
            "microbatch": MICROBATCH, "epochs": EPOCHS, "response_length": NEW,
        },
    )  # fmt: skip
    return tokenizer, model


def endless(path):
    """A policy whose responses run on: its end token is one that is hardly ever sampled."""
    tokenizer, model = policy.load(path, policy.device())
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(max(tokenizer.added_tokens_decoder))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return tokenizer, model


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        cli.fail(
            f"{' '.join(map(str, command))} stopped with {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return done.stdout


def peer(work, args) -> list[dict]:
    lines = run([args.peer, HERE / "bench" / "peer_trl.py", work, str(args.steps)]).splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")][1:]


def ours(work, args, flags) -> list[dict]:
    out = work / "run"
    command = [
        sys.executable,
        HERE / "train_ppo.py",
        "--task",
        "summarize",
        "--critic",
        "rule",
        "--policy",
        work / "model",
    ]
    command += [
        "--data",
        work / "posts.jsonl",
        "--source_field",
        "article",
        "--reference_field",
        "abstract",
    ]
    command += [
        "--num_mini_batches",
        ROWS // MICROBATCH,
        "--per_device_train_batch_size",
        MICROBATCH,
        "--num_ppo_epochs",
        EPOCHS,
    ]
    command += [
        "--gradient_accumulation_steps",
        1,
        "--response_length",
        NEW,
        "--kl_estimator",
        "k1",
        "--max_steps",
        args.steps,
    ]
    command += [
        "--eval_samples",
        1,
        "--resume",
        "none",
        "--save_total_limit",
        1,
        "--output_dir",
        out,
        *flags,
    ]
    run([str(word) for word in command])
    rows = read_jsonl(out / "metrics.jsonl")[1:]
    assert all(row["response_tokens"] == NEW for row in rows), (
        "every response has the same number of tokens"
    )
    parts = ("rollout", "critique", "score", "update", "shift")
    return [
        {part: row[f"seconds_{part}"] for part in parts}
        | {"step": row["seconds"], "memory": row["peak_memory_gib"], "tokens": row["update_tokens"]}
        for row in rows
    ]


def summary(name, turns, peers, sizes, machine) -> dict:
    """Medians over turns of a program's means over steps; ratios to the peer within each turn."""
    means = list(map(mean_of, turns))
    found = {key: median(turn[key] for turn in means) for key in means[0]}
    if name == "peer":
        return {"seconds": found}
    dtype = name[:4]
    flops = (
        6 * (sizes["weights"] - sizes["head"]) * found["tokens"]
        + 6 * sizes["head"] * ROWS * NEW * EPOCHS
    )
    if "LoRA" in name:
        flops *= 2 / 3  # frozen weights have no gradient
    read = sizes["weights"] * (2 if dtype == "bf16" else 4) * NEW
    shares = {"update_mfu": flops / found["update"] / machine[dtype] / 1e12}
    shares |= {
        "decode_bandwidth": read / found["rollout"] / machine["bandwidth"] / 1e9,
        "tokens_per_second": ROWS * NEW / found["step"],
    }
    if peers:
        theirs = list(map(mean_of, peers))
        for key in ("rollout", "step"):
            shares[f"{key}_ratio"] = median(
                other[key] / mine[key] for other, mine in zip(theirs, means)
            )
        shares["update_ratio"] = median(
            other["update"] / (mine["update"] + mine["score"]) for other, mine in zip(theirs, means)
        )
        shares["memory_ratio"] = median(
            mine["memory"] / other["memory"] for other, mine in zip(theirs, means)
        )
    return {"seconds": found} | shares


def mean_of(rows) -> dict:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def decode(model, plain, tokenizer, turns) -> dict:
    """Sampling by sample() against transformers' generate, in turns: {"fp32": {"decode_ratio": {rows: ratio}}, "bf16": ...}."""
    found = {}
    for dtype in ("fp32", "bf16"):
        ratios = {}
        for rows in (ROWS, 8 * ROWS):
            prompts = [summarize.INSTRUCTION.format(" ".join(WORDS))] * rows
            texts = [chat_text(tokenizer, prompt) for prompt in prompts]
            batch = tokenizer(texts, add_special_tokens=False, return_tensors="pt").to(model.device)

            def generate(batch=batch, dtype=dtype):
                with policy.autocast(dtype == "bf16"), torch.no_grad():
                    length = dict(min_new_tokens=NEW, max_new_tokens=NEW)
                    plain.generate(
                        **batch,
                        do_sample=True,
                        top_k=0,
                        top_p=1.0,
                        **length,
                        pad_token_id=tokenizer.pad_token_id,
                    )

            def ours(prompts=prompts, dtype=dtype):
                sample(model, tokenizer, prompts, NEW, bf16=dtype == "bf16")

            ours()
            seconds = [(timed(generate), timed(ours)) for _ in range(turns)]
            ratios[rows] = median(theirs / mine for theirs, mine in seconds)
        found[dtype] = {"decode_ratio": ratios}
    return found


def timed(work) -> float:
    start = policy.now()
    work()
    return policy.now() - start


def show(result, machine):
    peaks = [f"{machine[dtype] * 1000:.0f} GFLOP/s in {dtype}" for dtype in ("fp32", "bf16")]
    print(f"\npeaks: {', '.join(peaks)}, {machine['bandwidth']:.0f} GB/s")
    for name, row in result.items():
        print(f"\n{name}")
        for key, value in {
            **row["seconds"],
            **{key: value for key, value in row.items() if key != "seconds"},
        }.items():
            print(f"  {key:24}{value if isinstance(value, dict) else format(value, '10.2f')}")


if __name__ == "__main__":
    main()
