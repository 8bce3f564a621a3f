"""Writes one HTML page on which a person marks responses as good and poor, in any browser.

    python -m extras.human.page --samples 20 --out annotate.html     # samples of runs/toy/sft
    python -m extras.human.page --responses texts.jsonl --out annotate.html
    python -m extras.human.records annotations.jsonl --out runs/toy/human.jsonl

Select words with mouse, touch or keyboard, mark them good or poor, and write why. The page needs no
network. It saves in the browser and downloads annotations.jsonl, from which the last command makes
records for train_rm.py. Below a response stand the tokens with the rewards that the marks give.
"""

import hashlib
import json
import random
from pathlib import Path

from t2g import cli, policy, stages, tasks
from t2g.align import response_text, token_offsets
from t2g.log import write_text
from t2g.notes import read_responses
from t2g.page import texts_of_tokens
from t2g.quotes import pieces
from t2g.rollout import sample

BATCH = 64  # responses that are sampled at once


def sample_records(task, args) -> tuple:
    """Samples the policy; returns its tokenizer, the records, and the sampled ids of each."""
    root = Path("runs") / task.NAME
    stages.ensure(["sft"], args, root, args.policy)
    tokenizer, model = policy.load(args.policy or root / "sft", policy.device())
    examples = tasks.short_enough(tasks.load(task, args)[0], tokenizer, model, args)
    examples = random.Random(args.seed).choices(examples, k=args.samples)
    records, ids = [], []
    for start in range(0, len(examples), BATCH):
        prompts = [example.prompt for example in examples[start : start + BATCH]]
        length, options = args.response_length, dict(temperature=args.temperature, bf16=args.bf16)
        rollout = sample(model, tokenizer, prompts, length, **options)
        ids += [rollout.ids(row) for row in range(len(rollout))]
        for prompt, text in zip(prompts, rollout.texts):
            # The seed is part of the id, so that the files of several pages can be joined.
            name = f"{args.seed}-{len(records)}"
            records.append({"id": name, "prompt": prompt, "response": text})
    return tokenizer, records, ids


def tokens_of(tokenizer, ids, text) -> list:
    """Returns [start, end, text to show] of each token; nothing if the ids decode to other text."""
    if response_text(tokenizer, ids) != text:
        return []
    offsets = token_offsets(tokenizer, ids)
    shown = texts_of_tokens(tokenizer, ids, text, offsets)
    return [[start, end, part] for (start, end), part in zip(offsets, shown)]


def write_page(path, records, tokenizer=None, ids=None):
    """Writes the page on which records are marked. ids: the token ids of each response, or None."""
    items = []
    for n, record in enumerate(records):
        text = record["response"]
        item = {"record": record, "pieces": [text[slice(*piece)] for piece in pieces(text)]}
        items.append(item | {"tokens": tokens_of(tokenizer, ids[n], text) if ids else []})
    # With "<" escaped, no text of a model can end the script element that holds the data.
    data = json.dumps(items, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    key = hashlib.sha256(data.encode()).hexdigest()[:16]  # two pages do not mix in one browser
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(path), template.replace("/*KEY*/", key).replace("/*DATA*/", data))


@cli.friendly_errors()
def main():
    parser = cli.parser(__doc__)
    add = cli.flags(parser)
    tasks.add_flags(add)
    add("--responses", None, "records to mark, as annotate.py takes (default: samples of a policy)")
    add("--policy", None, "sampled (default: sft in runs/TASK); with --responses, gives the tokens")
    add("--samples", 20, "responses to sample")
    add("--response_length", 64, "maximum tokens of a sampled response")
    add("--temperature", 1.0, "temperature of the policy")
    add("--out", "annotate.html", "the page to write")
    task, args = tasks.parse(parser, "extras.human.page")
    if args.responses:
        records, tokenizer, ids = read_responses(args.responses), None, None
        if args.policy:
            tokenizer = policy.load(args.policy)[0]
            texts = [record["response"] for record in records]
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    else:
        tokenizer, records, ids = sample_records(task, args)
    write_page(args.out, records, tokenizer, ids)
    print(f"page: {args.out}, {len(records)} responses; open it in a browser")


if __name__ == "__main__":
    main()
