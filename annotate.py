"""Stage 1: responses -> critiques and spans. Samples from a policy and lets the task's program write what is good and poor in them.

    python annotate.py                                                 # the toy: 6000 samples, criticised by its rule
    python annotate.py --task summarize --policy MODEL --data posts.jsonl --num_samples 500 --out runs/posts/annotations.jsonl

Each line of --out: {"id", "prompt", "response", "critique", "good_spans", "poor_spans", "status", "reason"}. With --severity, a
span is {"text": ..., "severity": ...} where the critic says how much it matters.
"""

import json
import random
import time
from pathlib import Path

import torch

from t2g import cli, critics, policy, stages, tasks
from t2g.rollout import respond


def main():
    parser = cli.parser(__doc__)
    add = parser.add_argument
    tasks.add_flags(add)
    add(
        "--policy",
        help="whose responses are criticised: a run, a folder, a hub id or a .gguf file; sft beside --out if not given",
    )
    add("--out", help="the .jsonl file to write; runs/TASK/annotations.jsonl if not given")
    add("--num_samples", type=cli.positive(int), default=500, help="responses to sample and criticise")
    add("--response_length", type=cli.positive(int), default=64, help="most tokens of a response")
    add("--temperature", type=cli.positive(float), default=1.0, help="sampling temperature")
    add("--severity", action="store_true", help="keep how bad or good each quote is, where the critic says so")
    task, args = tasks.parse(parser, "annotate")
    out = Path(args.out or f"runs/{args.task}/annotations.jsonl")
    if out.exists():
        cli.fail(f"{out} exists already; move it away or choose another --out")
    cli.make_folder(out.parent, "--out")
    stages.ensure(["sft"], args, out.parent, args.policy)
    start = time.perf_counter()

    torch.manual_seed(args.seed)
    tokenizer, model = policy.load(args.policy or out.parent / "sft", policy.device())
    examples = tasks.short_enough(task.load(args)[0], tokenizer, args.max_prompt_length)
    chosen = random.Random(args.seed).choices(examples, k=args.num_samples)
    sampling = dict(temperature=args.temperature, bf16=args.bf16)
    texts, _ = respond(model, tokenizer, [e.prompt for e in chosen], args.response_length, 128, "sampling to annotate", **sampling)
    feedback = critics.rule_critic(task)(chosen, texts)
    if not args.severity:
        feedback = [f.plain() for f in feedback]

    unfinished = out.with_suffix(".unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        for number, (example, text, f) in enumerate(zip(chosen, texts, feedback)):
            record = {"id": str(number), "prompt": example.prompt, "response": text, "critique": f.critique, "good_spans": f.good,
                      "poor_spans": f.poor, "status": "ok", "reason": ""}  # fmt: skip
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    unfinished.rename(out)
    print(f"annotations: {out}, {len(texts)} records ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
