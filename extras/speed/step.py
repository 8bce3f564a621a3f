"""One PPO step beside one of trl 0.11.3, the peer, on the same work; sampling beside `generate`.

    python3.11 -m venv ../peer
    ../peer/bin/pip install -r extras/speed/requirements-peer.txt
    python -m extras.speed.step MODEL --peer ../peer/bin/python      # 15 minutes on 2 cores

MODEL is a folder, a hub id or a .gguf file. The work: 8 prompts of about 60 tokens, 48 new tokens
each, 4 epochs of 2 minibatches of 4. Ours is train_ppo.py as users start it, so it also criticises,
aligns and logs; bf16 is left out on CPUs that emulate it. The peer computes in fp32, and its update
includes the forward passes that ours counts as score. In each turn every program runs once in its
own process; its first step does not count. A ratio is the peer's seconds divided by ours (for
memory, ours divided by the peer's), the median over turns.
"""

import json
import tempfile
from itertools import product
from pathlib import Path
from statistics import fmean, median

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from extras.speed.gpu import run
from extras.speed.synthetic import generate, sentences, timed
from t2g import cli, cpu, policy
from t2g.chat import chat_text, turn_edges
from t2g.log import read_jsonl, write_json, write_text
from t2g.rollout import sample
from t2g.tasks import summarize

ROWS, MICROBATCH, EPOCHS, NEW = 8, 4, 4, 48
LORA = ["--lora_r", 16]
OURS = {"fp32": [], "bf16": ["--bf16"], "fp32, LoRA": LORA, "bf16, LoRA": ["--bf16", *LORA]}
STEP = f"--per_device_train_batch_size {MICROBATCH} --num_mini_batches {ROWS // MICROBATCH} "
STEP += f"--num_ppo_epochs {EPOCHS} --gradient_accumulation_steps 1 --kl_estimator k1 "
STEP += "--task summarize --critic rule --eval_samples 1 --resume none --save_total_limit 1"
METRICS = {part: f"seconds_{part}" for part in ("rollout", "score", "update", "shift")}
METRICS |= {"step": "seconds", "memory": "peak_memory_gib"}


@cli.friendly_errors()
def main():
    parser = cli.parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id or a .gguf file")
    add = cli.flags(parser)
    add("--peer", None, "the Python of the peer's environment; without it no ratios to the peer")
    add("--turns", 3, "how often every program runs")
    add("--steps", 3, "steps of each program in a turn; the first one is not counted")
    args = parser.parse_args()
    if args.steps < 2:
        cli.fail("--steps must be 2 or more, because the first one is left out")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokenizer, model = prepare(work, args.model)
        result = {"sampling": compare_sampling(work, model, tokenizer, args.turns)}
        ours = [name for name in OURS if "bf16" not in name or not cpu.emulates_bf16()]
        turns = {name: [] for name in (*ours, *(["peer"] if args.peer else []))}
        for name in tqdm([*turns] * args.turns, unit="run"):
            if name == "peer":
                turns[name].append(run_peer(work, args.steps, args.peer))
            else:
                turns[name].append(run_ours(work, args.steps, *OURS[name]))
    for name in turns:
        result[name] = summary(turns[name], turns.get("peer"))
    for name, row in result.items():
        print(f"\n{name}")
        for key, value in row.items():
            print(f"  {key:24}{value:10.2f}")
    print(json.dumps(result))


def prepare(work, path):
    """Saves a model whose responses run on, and prompts: texts for us, ids for the peer."""
    tokenizer, model = policy.load(path, policy.device())
    # The end token, and that of a turn, become one that is hardly ever sampled.
    end_of_turn = tokenizer.convert_ids_to_tokens(turn_edges(tokenizer)[1])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(max(tokenizer.added_tokens_decoder))
    if tokenizer.chat_template:
        template = tokenizer.chat_template.replace(end_of_turn, tokenizer.eos_token)
        tokenizer.chat_template = template
    model.generation_config.eos_token_id = tokenizer.eos_token_id
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


def run_peer(work, steps, python) -> dict:
    lines = run("extras/speed/peer_trl.py", work, steps, python=python).splitlines()
    return means([json.loads(line) for line in lines if line.startswith("{")])


def run_ours(work, steps, *flags, new=NEW) -> dict:
    """Runs train_ppo.py. Returns the mean seconds of each phase and the peak memory."""
    files = ["--policy", work / "model", "--data", work / "posts.jsonl"]
    files += ["--output_dir", work / "run", "--max_steps", steps, "--response_length", new]
    run("train_ppo.py", *STEP.split(), *files, *flags)
    rows = read_jsonl(work / "run" / "metrics.jsonl")
    if any(row["response_tokens"] != new for row in rows):
        cli.fail("a response ended early, so the work is not as planned; choose another model")
    return means([{name: row[metric] for name, metric in METRICS.items()} for row in rows])


def means(steps) -> dict:
    """Means over all steps but the first."""
    return {key: fmean(step[key] for step in steps[1:]) for key in steps[0]}


def summary(turns, peers=None) -> dict:
    """Medians over turns, and of ratios to the peer within each turn."""
    medians = {key: median(turn[key] for turn in turns) for key in turns[0]}
    if not peers or turns is peers:
        return medians
    pairs = list(zip(peers, turns))
    for key in ("rollout", "step"):
        medians[f"{key}_ratio"] = median(theirs[key] / ours[key] for theirs, ours in pairs)
    updates = [theirs["update"] / (ours["update"] + ours["score"]) for theirs, ours in pairs]
    memory = [ours["memory"] / theirs["memory"] for theirs, ours in pairs]
    return medians | {"update_ratio": median(updates), "memory_ratio": median(memory)}


def compare_sampling(work, model, tokenizer, turns) -> dict:
    """Seconds of transformers' generate divided by those of sample(), medians over turns."""
    load, medians = AutoModelForCausalLM.from_pretrained, {}
    plain = load(work / "model", dtype=torch.float32).to(model.device)
    dtypes = (False,) if cpu.emulates_bf16() else (False, True)
    for bf16, rows in product(dtypes, (ROWS, 8 * ROWS)):
        prompts = [summarize.INSTRUCTION.format(text) for text in sentences(rows)]
        sample(model, tokenizer, prompts, NEW, bf16=bf16)  # warms up
        ratios = []
        for _ in range(turns):
            _, theirs = timed(generate, plain, tokenizer, prompts, NEW, bf16=bf16)
            _, ours = timed(sample, model, tokenizer, prompts, NEW, bf16=bf16)
            ratios.append(theirs / ours)
        medians[f"{'bf16' if bf16 else 'fp32'}, {rows} rows"] = median(ratios)
    return medians


if __name__ == "__main__":
    main()
