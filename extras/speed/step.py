"""One PPO step beside one of trl 0.11.3, the peer, on the same work; sampling beside `generate`.

    python3.11 -m venv ../peer
    ../peer/bin/pip install -r extras/speed/requirements-peer.txt
    python -m extras.speed.step MODEL --peer ../peer/bin/python      # 15 minutes on 2 cores

MODEL is a folder, a hub id or a .gguf file. The work: 8 prompts of about 60 tokens, 48 new tokens
each, 4 epochs of 2 minibatches of 4. Ours is train_ppo.py as users start it, so it also criticises,
aligns and logs. The peer computes in fp32, and its update includes the forward passes that ours
counts as score. Each turn runs every program once, in a process of its own, without counting its
first step. Ratios are the peer's seconds by ours (memory: ours by the peer's), medians over turns.
"""

import json
import tempfile
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from extras.speed.given import generate_seconds, sentences
from extras.speed.gpu import run
from t2g import cli, policy
from t2g.log import read_jsonl, write_json, write_text
from t2g.policy import now
from t2g.rollout import chat_text, sample
from t2g.tasks import summarize

ROWS, MICROBATCH, EPOCHS, NEW = 8, 4, 4, 48
LORA = ["--lora_r", 16]
OURS = {"fp32": [], "bf16": ["--bf16"], "fp32, LoRA": LORA, "bf16, LoRA": ["--bf16", *LORA]}
STEP = f"--per_device_train_batch_size {MICROBATCH} --num_mini_batches {ROWS // MICROBATCH}"
STEP += f" --num_ppo_epochs {EPOCHS} --gradient_accumulation_steps 1 --response_length {NEW}"
STEP = f"{STEP} --kl_estimator k1".split()


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id or a .gguf file")
    add = cli.flags(parser)
    add("--peer", None, "the Python of the peer's environment; without it no ratios to the peer")
    add("--turns", 3, "how often every program runs")
    add("--steps", 3, "steps of each program in a turn, one more than is counted")
    args = parser.parse_args()
    if args.steps < 2:
        cli.fail("--steps must be 2 or more, for the first one is left out")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokenizer, model = prepare(work, args.model)
        result = {"sampling": sampling(work, model, tokenizer, args.turns)}
        programs = {name: (ours, flags) for name, flags in OURS.items()}
        if args.peer:
            programs["peer"] = peer, args.peer
        turns = {name: [] for name in programs}
        for name in tqdm([name for _ in range(args.turns) for name in programs], unit="run"):
            program, how = programs[name]
            turns[name].append(program(work, args.steps, how))
    for name in programs:
        result[name] = summary(turns[name], turns.get("peer"))
    for name, row in result.items():
        print(f"\n{name}")
        for key, value in row.items():
            print(f"  {key:24}{value:10.2f}")
    print(json.dumps(result))


def prepare(work, path):
    """Writes the model, and prompts as texts for us and as ids for the peer."""
    tokenizer, model = endless(path)
    policy.save(model, tokenizer, work, 1)
    (work / "checkpoint-1").rename(work / "model")
    texts = sentences(10 * ROWS)
    rows = [json.dumps({"article": text, "abstract": text}) + "\n" for text in texts]
    write_text(work / "posts.jsonl", "".join(rows))
    prompts = [chat_text(tokenizer, summarize.INSTRUCTION.format(text)) for text in texts[:ROWS]]
    ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    special = {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    sizes = {"microbatch": MICROBATCH, "epochs": EPOCHS, "response_length": NEW}
    write_json(work / "work.json", {"prompts": ids, "special_tokens": special, **sizes})
    return tokenizer, model


def endless(path):
    """A policy whose responses run on: its end token is one that is hardly ever sampled."""
    tokenizer, model = policy.load(path, policy.device())
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(max(tokenizer.added_tokens_decoder))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return tokenizer, model


def peer(work, steps, python) -> dict:
    lines = run("extras/speed/peer_trl.py", work, steps, python=python).splitlines()
    return mean_of([json.loads(line) for line in lines if line.startswith("{")][1:])


def ours(work, steps, flags) -> dict:
    where = ["--policy", work / "model", "--data", work / "posts.jsonl", "--max_steps", steps]
    alone = "--task summarize --critic rule --eval_samples 1 --resume none --save_total_limit 1"
    flags = [*where, *alone.split(), *STEP, *flags, "--output_dir", work / "run"]
    run("train_ppo.py", *flags)
    rows = read_jsonl(work / "run" / "metrics.jsonl")[1:]
    if any(row["response_tokens"] != NEW for row in rows):
        cli.fail("a response ended early, so the peer did other work; choose another model")
    names = {part: f"seconds_{part}" for part in ("rollout", "score", "update", "shift")}
    names |= {"step": "seconds", "memory": "peak_memory_gib"}
    return mean_of([{name: row[metric] for name, metric in names.items()} for row in rows])


def mean_of(rows) -> dict:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def summary(turns, peers=None) -> dict:
    """Medians over turns; and ratios to the peer within each turn."""
    found = {key: median(turn[key] for turn in turns) for key in turns[0]}
    if not peers or turns is peers:
        return found
    pairs = list(zip(peers, turns))
    for key in ("rollout", "step"):
        found[f"{key}_ratio"] = median(theirs[key] / mine[key] for theirs, mine in pairs)
    updates = [theirs["update"] / (mine["update"] + mine["score"]) for theirs, mine in pairs]
    memory = [mine["memory"] / theirs["memory"] for theirs, mine in pairs]
    return found | {"update_ratio": median(updates), "memory_ratio": median(memory)}


def sampling(work, model, tokenizer, turns) -> dict:
    """The seconds of transformers' generate by those of sample(), medians over turns."""
    load, found = AutoModelForCausalLM.from_pretrained, {}
    plain = load(work / "model", dtype=torch.float32).to(model.device)
    for bf16 in (False, True):
        for rows in (ROWS, 8 * ROWS):
            prompts = [summarize.INSTRUCTION.format(text) for text in sentences(rows)]
            sample(model, tokenizer, prompts, NEW, bf16=bf16)  # warms up
            ratios = []
            for _ in range(turns):
                theirs, start = generate_seconds(plain, tokenizer, prompts, NEW, bf16), now()
                sample(model, tokenizer, prompts, NEW, bf16=bf16)
                ratios.append(theirs / (now() - start))
            found[f"{'bf16' if bf16 else 'fp32'}, {rows} rows"] = median(ratios)
    return found


if __name__ == "__main__":
    main()
