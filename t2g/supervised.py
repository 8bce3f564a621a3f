"""Supervised fine-tuning on (prompt, completion) pairs, the loss on the completion only: for policies and for reward models.

    L = - E[ log p(completion | prompt) ]        mean over the completions' tokens of an optimiser step, EOS included

A run that was stopped goes on where it stood when it is started again with the same flags and data. train() is the loop of the
scripts with another loss as well: they bring an Objective of their own.
"""

import hashlib
import itertools
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from t2g import adapters, checkpoint, policy
from t2g.checkpoint import BEST, STATE, run_folder
from t2g.cli import between, fail, positive
from t2g.log import Logger
from t2g.policy import autocast, context_length, now, response_logits
from t2g.rollout import Rollout, chat_text


def encode_pairs(tokenizer, pairs) -> list[tuple[list[int], list[int]]]:
    """Pairs of texts as token ids: the prompt through the chat template, the completion with EOS behind it."""
    prompts = tokenizer(
        [chat_text(tokenizer, prompt) for prompt, _ in pairs], add_special_tokens=False
    )["input_ids"]
    completions = tokenizer([completion for _, completion in pairs], add_special_tokens=False)[
        "input_ids"
    ]
    return [
        (prompt, [*completion, tokenizer.eos_token_id])
        for prompt, completion in zip(prompts, completions)
    ]


def as_rollout(rows, pad_token_id, device) -> tuple[Rollout, torch.Tensor]:
    """Rows of token ids as a batch, and which response tokens are learnt, (B, T) bool.

    All padding is on the left and the last T columns count as responses, T being the longest completion: before a shorter one
    stands the end of its prompt. So a row is padded for its whole length once, and not for its prompt and its completion apart.
    """
    T, length = (
        max(len(completion) for _, completion in rows),
        max(len(prompt) + len(completion) for prompt, completion in rows),
    )
    length = max(length, T + 1)
    ids = [
        [pad_token_id] * (length - len(prompt) - len(completion)) + prompt + completion
        for prompt, completion in rows
    ]
    there = [
        [False] * (length - len(prompt) - len(completion)) + [True] * len(prompt + completion)
        for prompt, completion in rows
    ]
    learnt = [[False] * (T - len(completion)) + [True] * len(completion) for _, completion in rows]
    ids, there, learnt = (torch.tensor(table, device=device) for table in (ids, there, learnt))
    batch = Rollout(
        ids[:, :-T], there[:, :-T], ids[:, -T:], there[:, -T:], learnt.any(1), [""] * len(rows)
    )
    return batch, learnt


def length(row) -> int:
    """Tokens of a row: its lists are token ids, whatever else it holds is not."""
    return sum(len(part) for part in row if isinstance(part, list))


def in_batches(rows, batch_size, seed, window=32):
    """Batches without end; the first pass keeps the order of the rows, each later one is shuffled.

    Within a window of 32 batches, rows of like length go together: little padding, and still the order of the whole.
    """
    rng, queue = random.Random(seed), list(rows)
    while True:
        while len(queue) < batch_size:
            queue += rng.sample(rows, len(rows))
        near, queue = sorted(queue[: window * batch_size], key=length), queue[window * batch_size :]
        ready = [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
        if len(ready[-1]) < batch_size:
            queue = ready.pop() + queue
        rng.shuffle(ready)
        yield from ready


class Objective(NamedTuple):
    """What train() lowers: a mean over units, which are tokens, texts or pairs, of all microbatches of an optimiser step."""

    unit: str  # the metric under which their number is logged
    collate: Callable  # (rows, pad_token_id, device) -> microbatch; its first two parts are those of as_rollout()
    count: Callable  # (*microbatch) -> its units
    loss: Callable  # (model, *microbatch, args) -> sum of their losses, and sums of other metrics
    measure: Callable = (
        lambda model, tokenizer, rows, args: {}
    )  # further metrics of rows that are not trained on


def token_loss(model, batch, learnt, args):
    """Sum of -log p over the tokens that are learnt."""
    with autocast(args.bf16):
        logits, _ = response_logits(model, batch)
    return F.cross_entropy(logits[learnt].float(), batch.response[learnt], reduction="sum")


NEXT_TOKEN = Objective(
    unit="tokens",
    collate=as_rollout,
    count=lambda batch, learnt: int(learnt.sum()),
    loss=lambda *microbatch: (token_loss(*microbatch), {}),
)


def make_optimizers(model, kind, learning_rate):
    """AdamW for all weights, or Muon for the matrices of the blocks and AdamW for the rest (for models from scratch)."""

    def is_matrix(name, p):
        return kind == "muon" and p.ndim == 2 and "embed" not in name and "head" not in name

    weights = checkpoint.trainable(model)
    matrices = [p for name, p in weights.items() if is_matrix(name, p)]
    rest = [p for name, p in weights.items() if not is_matrix(name, p)]
    optimizers = (
        [torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
        if rest
        else []
    )
    if matrices:  # updates are scaled to the size of AdamW's, so that one learning rate serves both
        optimizers.append(
            torch.optim.Muon(
                matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers


def finetune(model, tokenizer, pairs, args, desc) -> Path:
    """Trains for args.max_steps optimiser steps, or until the validation loss has stopped falling, and saves the best model.

    Returns: the checkpoint, a plain model whatever was trained of it.
    """
    if not pairs:
        fail("the data set is empty: there is no pair to train on")
    heldout, rows = parted(
        that_fit(encode_pairs(tokenizer, pairs), longest_text(model, args)), args
    )
    model = adapters.added(model, args)
    with run_folder(args) as folder:
        step = train(model, tokenizer, rows, heldout, args, folder, desc)
        return save(model, tokenizer, folder, step, args)


def parted(rows, args):
    """The rows for validation, the first --validation_share of them, and those to train on."""
    count = round(args.validation_share * len(rows))
    heldout, rows = rows[:count], rows[count:]
    print(f"{len(rows)} pairs to train on, {len(heldout)} for the validation loss", flush=True)
    args.data_hash = hashlib.sha256(json.dumps([heldout, rows]).encode()).hexdigest()
    return heldout, rows


def save(model, tokenizer, folder, step, args, value_head=None) -> Path:
    """The checkpoint at the end of a run, adapters merged; what a stopped run would have gone on from is no longer needed."""
    model = model.merge_and_unload() if args.lora_r else model
    saved = policy.save(model.eval(), tokenizer, folder, step, value_head)
    for name in (STATE, BEST):
        (folder / name).unlink(missing_ok=True)
    return saved


def train(model, tokenizer, rows, heldout, args, folder, desc, objective=NEXT_TOKEN) -> int:
    """The loop. Returns: the step whose weights the model has at the end: the best on the held-out rows, or else the last."""
    device = next(model.parameters()).device
    optimizers, reached = (
        make_optimizers(model, args.optimizer, args.learning_rate),
        {"step": 0, "best_step": 0, "best_loss": math.inf},
    )
    if (folder / STATE).is_file():
        reached = checkpoint.load(folder / STATE, model, optimizers)
        print(f"goes on after step {reached['step']} of {args.output_dir}", flush=True)
    log = Logger(folder, args, keep_until=reached["step"])
    batches = in_batches(rows, args.per_device_train_batch_size, args.seed)
    batches = itertools.islice(batches, reached["step"] * args.gradient_accumulation_steps, None)
    bar = tqdm(
        total=args.max_steps, initial=reached["step"], desc=desc, unit="step", mininterval=0.5
    )
    model.train()
    for step in range(reached["step"] + 1, args.max_steps + 1):
        start, parts = now(), itertools.islice(batches, args.gradient_accumulation_steps)
        microbatches = [objective.collate(some, tokenizer.pad_token_id, device) for some in parts]
        metrics = train_step(model, microbatches, args, objective)
        metrics["learning_rate"] = rate = args.learning_rate * schedule(step, args)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        reached["step"], metrics["seconds_update"] = step, now() - start
        if heldout and (step % args.eval_steps == 0 or step == args.max_steps):
            metrics |= measured(model, tokenizer, heldout, args, objective)
            if metrics["validation_loss"] < reached["best_loss"]:
                reached |= {"best_step": step, "best_loss": metrics["validation_loss"]}
                checkpoint.save(folder / BEST, model)
        log(step, metrics)
        bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
        bar.update()
        if (
            heldout
            and step - reached["best_step"] >= args.early_stopping_patience * args.eval_steps
        ):
            print(
                f"\nthe validation loss was lowest at step {reached['best_step']}: stopped early",
                flush=True,
            )
            break
        if step % args.save_steps == 0:
            checkpoint.save(folder / STATE, model, optimizers, **reached)
    bar.close()
    if heldout:
        checkpoint.load(folder / BEST, model)
    return reached["best_step"] if heldout else args.max_steps


def train_step(model, microbatches, args, objective=NEXT_TOKEN) -> dict:
    """The gradient of the mean over all units of the microbatches, however they are spread over them; clipped."""
    sums, count = (
        defaultdict(float),
        sum(objective.count(*microbatch) for microbatch in microbatches),
    )
    for microbatch in microbatches:
        loss, stats = objective.loss(model, *microbatch, args)
        (loss / count).backward()
        for name, value in {"loss": loss.item(), **stats}.items():
            sums[name] += value / count
    grad_norm = torch.nn.utils.clip_grad_norm_(
        model.parameters(), args.max_grad_norm, error_if_nonfinite=True
    )
    places = [mask for batch, *_ in microbatches for mask in (batch.prompt_mask, batch.mask)]
    read = sum(int(mask.sum()) for mask in places)
    padding = 1 - read / sum(mask.numel() for mask in places)
    return {
        **sums,
        "grad_norm": grad_norm.item(),
        objective.unit: count,
        "update_tokens": read,
        "padding": padding,
    }


def measured(model, tokenizer, rows, args, objective) -> dict:
    """Metrics of rows that are not trained on, the validation loss among them."""
    model.eval()
    found = {"validation_loss": validation_loss(model, tokenizer, rows, args, objective)}
    found |= objective.measure(model, tokenizer, rows, args)
    model.train()
    return found


@torch.no_grad()
def validation_loss(model, tokenizer, rows, args, objective=NEXT_TOKEN) -> float:
    """The mean loss of rows that are not trained on."""
    device = next(model.parameters()).device
    parts = [
        objective.collate(some, tokenizer.pad_token_id, device) for some in by_length(rows, args)
    ]
    loss = sum(objective.loss(model, *part, args)[0].item() for part in parts)
    return loss / sum(objective.count(*part) for part in parts)


def by_length(rows, args) -> list[list]:
    """All rows in batches, those of like length together."""
    size, rows = args.per_device_train_batch_size, sorted(rows, key=length)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def schedule(step, args) -> float:
    """The share of the learning rate at a step: up linearly over warmup_ratio of the steps, down to 0 by a line or a cosine."""
    warmup, done = max(1, round(args.warmup_ratio * args.max_steps)), (step - 1) / args.max_steps
    down = 1 - done if args.lr_scheduler_type == "linear" else (1 + math.cos(math.pi * done)) / 2
    return min(step / warmup, down)


def longest_text(model, args) -> int:
    """Most tokens of a training text: --max_length, and never more than the model's context."""
    return min(args.max_length or context_length(model), context_length(model))


def that_fit(rows, limit, size=length):
    """The rows of at most `limit` tokens by size(row); how many are left out is said."""
    kept = [row for row in rows if size(row) <= limit]
    if len(kept) < len(rows):
        print(
            f"{len(rows) - len(kept)} of {len(rows)} training texts have more than {limit} tokens and are left out"
        )
    if not kept:
        fail(
            f"there is no training text of at most {limit} tokens; raise --max_length, if the model's context allows it"
        )
    return kept


def add_flags(add, validation_share=0.0):
    """The flags of supervised training, under the names of TRL's SFTConfig."""
    add(
        "--learning_rate",
        type=positive(float),
        default=1e-5,
        help="peak learning rate, after warm-up",
    )
    add(
        "--lr_scheduler_type",
        choices=("linear", "cosine"),
        default="linear",
        help="how the learning rate falls to 0",
    )
    add(
        "--warmup_ratio",
        type=between(0, 1),
        default=0.05,
        help="share of the steps over which the learning rate rises",
    )
    add("--max_steps", type=positive(int), default=200, help="optimiser steps")
    add(
        "--per_device_train_batch_size",
        type=positive(int),
        default=8,
        help="sequences of a microbatch",
    )
    add(
        "--gradient_accumulation_steps",
        type=positive(int),
        default=1,
        help="microbatches of an optimiser step",
    )
    add(
        "--max_length",
        type=positive(int),
        help="most tokens of a training text; the model's context if not given",
    )
    add(
        "--optimizer",
        choices=("adamw", "muon"),
        default="adamw",
        help="muon is for models that start from scratch",
    )
    add(
        "--max_grad_norm",
        type=positive(float),
        default=1.0,
        help="gradients are clipped to this norm",
    )
    adapters.add_flags(add)
    add(
        "--validation_share",
        type=between(0, 0.5),
        default=validation_share,
        help="share of the pairs kept for the validation loss",
    )
    add("--eval_steps", type=positive(int), default=50, help="steps between two validation losses")
    add(
        "--early_stopping_patience",
        type=positive(int),
        default=5,
        help="validation losses in a row without a new lowest before it stops",
    )
    add(
        "--save_steps",
        type=positive(int),
        default=100,
        help="steps between two states from which a stopped run goes on",
    )
