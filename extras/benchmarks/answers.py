"""Writes a model's answers in the formats of alpaca_eval and of FastChat's MT-Bench.

Win rates against a baseline, also length-controlled ones (pip install alpaca-eval):

    python -m extras.benchmarks.answers MODEL outputs.json --prompts alpaca_eval.json
    alpaca_eval --model_outputs outputs.json

MT-Bench; the judge runs in FastChat/fastchat/llm_judge, where question.jsonl is data/mt_bench's:

    python -m extras.benchmarks.answers MODEL data/mt_bench/model_answer/NAME.jsonl \\
        --prompts question.jsonl
    python gen_judgment.py --model-list NAME --judge-model gpt-4 --parallel 4
    python show_result.py --model-list NAME

Held-out prompts of a task, for extras.benchmarks.win_rate or for alpaca_eval:

    python -m extras.benchmarks.answers MODEL outputs.json --task qa --data FILE

The temperature of an MT-Bench question follows from its category, as in FastChat.
"""

import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from extras import benchmarks
from t2g import chat, cli, policy, tasks
from t2g.log import write_text

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
TEMPERATURES |= dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
LENGTH = 1024  # tokens of an answer to --prompts, if --response_length is not given


@cli.friendly_errors()
def main():
    parser, add = benchmarks.parser(__doc__, task=True)
    parser.add_argument("model", help="a run, a model's folder, a .gguf file or a hub id")
    parser.add_argument("out", help="file of the answers; tables show its name as the model's")
    add("--prompts", None, "alpaca_eval's prompts or FastChat's question.jsonl")
    _, args = tasks.parse(parser, "benchmark")
    path = Path(args.out)
    path.resolve().parent.mkdir(parents=True, exist_ok=True)
    questions = benchmarks.read_texts(args.prompts) if args.prompts else []
    if questions and all({"question_id", "turns"} <= row.keys() for row in questions):
        rows = answer_turns(questions, path.stem, args)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        rows = [row | {"generator": path.stem} for row in answer_prompts(args)]
        text = json.dumps(rows, indent=1, ensure_ascii=False)
    write_text(path, text)
    print(f"{len(rows)} answers: {path}")


def answer_prompts(args) -> list[dict]:
    """Answers alpaca_eval's prompts, or the held-out prompts of the task."""
    if not args.prompts:
        examples, texts = benchmarks.respond_to_heldout(args.model, args)
        pairs = zip(examples, texts)
        return [{"instruction": example.prompt, "output": text} for example, text in pairs]
    rows = benchmarks.read_texts(args.prompts, "instruction")
    prompts = [row["instruction"] for row in rows]
    texts = benchmarks.respond_to(prompts, args.model, args, args.response_length or LENGTH)
    return [row | {"output": text} for row, text in zip(rows, texts)]


def answer_turns(questions, name, args) -> list[dict]:
    """Answers MT-Bench's questions one by one, as FastChat does."""
    tokenizer, model = policy.load(args.model, policy.device())
    torch.manual_seed(args.seed)
    rows = []
    for question in tqdm(questions, desc=args.model, unit="question"):
        choice = {"index": 0, "turns": converse(model, tokenizer, question, args)}
        row = {"question_id": question["question_id"], "model_id": name, "choices": [choice]}
        row["answer_id"] = f"{name}-{question['question_id']}"
        rows.append(row | {"tstamp": time.time()})
    return rows


@torch.no_grad()
def converse(model, tokenizer, question, args) -> list[str]:
    """Returns the answer to each turn, with the earlier turns and answers before it."""
    messages, context = [], policy.context_length(model)
    temperature = TEMPERATURES.get(question.get("category"), 0.7)
    sampling = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    for turn in question["turns"]:
        messages.append({"role": "user", "content": turn})
        text = chat.render(tokenizer, *messages, add_generation_prompt=True)
        batch = tokenizer([text], add_special_tokens=False, return_tensors="pt").to(model.device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        room = min(args.response_length or LENGTH, context - ids.shape[1])
        if room < 1:
            cli.fail(f"question {question['question_id']} does not fit the context of {context}")
        with policy.autocast(args.bf16):
            output = model.generate(ids, attention_mask=mask, max_new_tokens=room, **sampling)
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": answer})
    return [message["content"] for message in messages[1::2]]


if __name__ == "__main__":
    main()
