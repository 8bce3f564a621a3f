"""Supervised fine-tuning on (prompt, completion) pairs, for policies and for reward models.

    L = - E[ log p(completion | prompt) ]      mean over all completion tokens of an optimiser step

EOS is part of a completion. Baselines use the same loop with an Objective of their own.
"""

import itertools
import math
import random
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from t2g import adapters, checkpoint, dist, policy
from t2g.chat import chat_text, encode, marked, turn_edges
from t2g.cli import between, fail, positive
from t2g.folder import open_log, run_folder
from t2g.muon import Muon
from t2g.policy import autocast, check_numbers, context_length, now, response_logits
from t2g.rollout import Rollout


def add_flags(add, validation_share=0.0):
    """Adds the flags of supervised training, named as in TRL's SFTConfig."""
    add("--learning_rate", 1e-5, "peak learning rate, after warm-up")
    add("--lr_scheduler_type", "linear", "how the learning rate falls to 0", ("linear", "cosine"))
    add("--warmup_ratio", 0.05, "share of the steps in which the rate rises", between(0, 1))
    add("--max_steps", 200, "optimiser steps")
    add("--per_device_train_batch_size", 8, "sequences per microbatch")
    add("--gradient_accumulation_steps", 1, "microbatches per optimiser step and process")
    add("--max_length", None, "maximum tokens of a text; the context if not given", positive(int))
    add("--optimizer", "adamw", "muon is for models from scratch", ("adamw", "muon"))
    add("--weight_decay", 0.0, "decay per step, relative to the learning rate", between(0, 1e6))
    add("--max_grad_norm", 1.0, "maximum norm of the gradient; longer ones are clipped")
    adapters.add_flags(add)
    dist.add_flags(add)
    add("--validation_share", validation_share, "share of pairs held out", between(0, 0.5))
    add("--eval_steps", 50, "steps between two validation losses")
    add("--early_stopping_patience", 5, "stop after this many validation losses without a new best")
    add("--save_steps", 100, "steps between two states from which a stopped run resumes")


def encode_pairs(tokenizer, pairs) -> list[tuple[list[int], list[int]]]:
    """Token ids of pairs (prompt, completion); a completion ends with the template's end of turn.

    Prompt and completion are encoded as one text, because SentencePiece would put a space before a
    completion on its own; they are encoded apart only if a token would span their border.
    """
    space, end = turn_edges(tokenizer)
    mark, texts = marked(tokenizer, [text for pair in pairs for text in pair])
    chats = [chat_text(tokenizer, prompt) for prompt in texts[::2]]
    completions = texts[1::2]
    turns = [chat + space + text for chat, text in zip(chats, completions)]
    prompts, wholes = encode(tokenizer, chats, mark), encode(tokenizer, turns, mark)
    rows = []
    for prompt, whole, completion in zip(prompts, wholes, completions):
        ids = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:
            ids = encode(tokenizer, [completion], mark)[0]
        rows.append((prompt, [*ids, end]))
    return rows


def as_rollout(rows, pad_token_id, device) -> tuple[Rollout, torch.Tensor]:
    """Collates rows of token ids (prompt, completion), padded on the left only.

    The T response columns fit the longest completion. In front of a shorter one stands the end of
    its prompt, for example "pad p p | p c" beside "p p p | c c".

    Returns: the batch, and trained, (B, T) bool, True for the tokens of completions.
    """
    T = max(len(completion) for _, completion in rows)
    width = max(T + 1, max(len(prompt) + len(completion) for prompt, completion in rows))
    ids = torch.full((len(rows), width), pad_token_id)
    real = torch.zeros(ids.shape, dtype=torch.bool)
    trained = torch.zeros_like(real)
    for row, (prompt, completion) in enumerate(rows):
        start = width - len(prompt) - len(completion)
        ids[row, start:] = torch.tensor(prompt + completion)
        real[row, start:] = True
        trained[row, width - len(completion) :] = True
    ids, real, trained = ids.to(device), real.to(device), trained[:, -T:].to(device)
    prompt, prompt_mask, response, mask = ids[:, :-T], real[:, :-T], ids[:, -T:], real[:, -T:]
    texts, finished = [""] * len(rows), trained.any(1)
    return Rollout(prompt, prompt_mask, response, mask, finished, texts), trained


def length(row) -> int:
    """The number of tokens of a row; only its lists are token ids."""
    return sum(len(part) for part in row if isinstance(part, list))


def longest_text(model, args) -> int:
    """The maximum tokens of a training text: --max_length, or the context if that is shorter."""
    return min(args.max_length or context_length(model), context_length(model))


def drop_long(rows, limit, size=length):
    """Drops the rows of more than limit tokens, by size(row), and prints how many there are."""
    kept = [row for row in rows if size(row) <= limit]
    dropped = f"{len(rows) - len(kept)} of {len(rows)} training texts have more than {limit} tokens"
    if not kept:
        fail(f"{dropped}; raise --max_length, if the context is longer, or shorten them")
    if len(kept) < len(rows):
        print(f"{dropped}: dropped")
    return kept


def split(rows, args):
    """The rows for validation, and the others; sets args.batch_size and args.data_hash."""
    args.batch_size = dist.batch_size(args)
    count = round(args.validation_share * len(rows))
    heldout, rows = rows[:count], rows[count:]
    print(f"{len(rows)} pairs for training, {len(heldout)} for validation", flush=True)
    args.data_hash = checkpoint.hash_of([heldout, rows])
    return heldout, rows


def by_length(rows, args) -> list[list]:
    return chunks(sorted(rows, key=length), args.per_device_train_batch_size)


def chunks(rows, size) -> list[list]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def in_batches(rows, batch_size, seed, window=32):
    """Yields batches endlessly. The first pass keeps the order of the rows; later ones shuffle it.

    Within a window of 32 batches, rows of similar length share a batch, to save padding.
    """
    rng, queue = random.Random(seed), list(rows)
    while True:
        while len(queue) < batch_size:
            queue += rng.sample(rows, len(rows))
        near, queue = queue[: window * batch_size], queue[window * batch_size :]
        ready = chunks(sorted(near, key=length), batch_size)
        if len(ready[-1]) < batch_size:
            queue = ready.pop() + queue
        rng.shuffle(ready)
        yield from ready


class Objective(NamedTuple):
    """What train() minimises: a mean over the units (tokens, texts, pairs) of an optimiser step."""

    unit: str  # the metric under which the number of units is logged
    collate: Callable  # (rows, pad_token_id, device) -> microbatch, a tuple (Rollout, ...)
    count: Callable  # (*microbatch) -> number of its units
    loss: Callable  # (model, *microbatch, args) -> sum of losses, and sums of other metrics
    metrics: dict | None = None  # what its metrics mean, if t2g/log.py does not know them
    dropout: bool = True  # False for a loss relative to a reference, which is computed without it


def token_loss(model, batch, trained, args):
    with autocast(args.bf16):
        logits, _ = response_logits(model, batch)
    return F.cross_entropy(logits[trained].float(), batch.response[trained], reduction="sum")


NEXT_TOKEN = Objective(
    unit="tokens",
    collate=as_rollout,
    count=lambda batch, trained: int(trained.sum()),
    loss=lambda *microbatch: (token_loss(*microbatch), {}),
)


@torch.no_grad()
def validation_loss(model, tokenizer, rows, args, objective=NEXT_TOKEN) -> float:
    """The mean loss of rows that are not trained on. Collective."""
    device, loss, count = dist.device(), 0.0, 0
    for batch in by_length(dist.share(rows), args):
        microbatch = objective.collate(batch, tokenizer.pad_token_id, device)
        loss += objective.loss(model, *microbatch, args)[0].item()
        count += objective.count(*microbatch)
    sums = dist.totals({"loss": loss, "count": count})
    return sums["loss"] / sums["count"]


def prepared(model, args):
    torch.manual_seed(args.seed)  # for LoRA's first weights, the same on all ranks
    model = adapters.added(model, args)
    return dist.shard(model, args.bf16, args.cpu_offload, args.gradient_checkpointing)


def finetune(model, tokenizer, pairs, args, desc) -> Path:
    """Trains on pairs, which all ranks have, and returns the checkpoint of a plain model.

    With held-out pairs, training may stop early and keeps the model of the lowest validation loss.
    """
    if not pairs:
        fail("there are no training pairs")
    rows = drop_long(encode_pairs(tokenizer, pairs), longest_text(model, args))
    heldout, rows = split(rows, args)
    model = prepared(model, args)
    with run_folder(args) as folder:
        step = train(model, tokenizer, rows, heldout, args, folder, desc)
        return save(model, tokenizer, folder, step, args)


def train(model, tokenizer, rows, heldout, args, folder, desc, objective=NEXT_TOKEN) -> int:
    """Trains the model. Returns the step of its weights: the best step if heldout, or the last."""
    optimizers = make_optimizers(model, args)
    reached = {"step": 0, "best_step": 0, "best_loss": math.inf}
    if saved := checkpoint.latest(folder, "state"):
        reached = checkpoint.load(saved, model, optimizers)
        print(f"resuming after step {reached['step']} of {args.output_dir}", flush=True)
    log = open_log(folder, args, objective.metrics or (), keep_until=reached["step"])
    to_tensors = tokenizer.pad_token_id, dist.device()
    batches = in_batches(rows, args.batch_size, args.seed)
    batches = itertools.islice(batches, reached["step"], None)
    steps = range(reached["step"] + 1, args.max_steps + 1)
    bar = tqdm(steps, desc, args.max_steps, initial=reached["step"], disable=dist.rank() > 0)
    model.train(objective.dropout)
    for step in bar:
        start = now()
        parts = chunks(dist.share(next(batches)), args.per_device_train_batch_size)
        microbatches = [objective.collate(part, *to_tensors) for part in parts]
        metrics = train_step(model, microbatches, args, objective)
        metrics["learning_rate"] = rate = args.learning_rate * schedule(step, args)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        reached["step"], metrics["seconds_update"] = step, now() - start
        if heldout and (step % args.eval_steps == 0 or step == args.max_steps):
            model.eval()
            loss = validation_loss(model, tokenizer, heldout, args, objective)
            model.train(objective.dropout)
            metrics["validation_loss"] = loss
            if loss < reached["best_loss"]:
                reached |= {"best_step": step, "best_loss": loss}
                checkpoint.replace(folder, "best", model, step=step)
        log(step, metrics)
        bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
        patience = args.early_stopping_patience * args.eval_steps
        if heldout and step - reached["best_step"] >= patience:
            print(f"\nstopped early: the best step was {reached['best_step']}", flush=True)
            break
        if step % args.save_steps == 0:
            checkpoint.replace(folder, "state", model, optimizers, **reached)
    bar.close()
    best = checkpoint.latest(folder, "best")
    return checkpoint.load(best, model)["step"] if best else args.max_steps


def train_step(model, microbatches, args, objective=NEXT_TOKEN) -> dict:
    """Clips the gradient of the mean over the units of all ranks. Returns: metrics. Collective."""
    counts = {objective.unit: sum(objective.count(*batch) for batch in microbatches)}
    read = [int(batch.prompt_mask.sum() + batch.mask.sum()) for batch, *_ in microbatches]
    counts = dist.totals(counts | {"update_tokens": sum(read)})
    sums, count = defaultdict(float), counts[objective.unit]
    for microbatch in microbatches:
        loss, stats = objective.loss(model, *microbatch, args)
        (loss / count).backward()
        for name, value in {"loss": loss.item(), **stats}.items():
            sums[name] += value / count
    norm = dist.plain(torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm))
    check_numbers(norm)
    integers = {name: int(number) for name, number in counts.items()}
    return dist.totals(sums) | {"grad_norm": norm.item()} | integers


def make_optimizers(model, args):
    """AdamW for all weights, or Muon for the blocks' matrices and AdamW for the others."""
    matrices, rest = [], []
    for name, weight in checkpoint.trainable(model).items():
        in_block = weight.ndim == 2 and "embed" not in name and "head" not in name
        (matrices if args.optimizer == "muon" and in_block else rest).append(weight)
    both = dict(lr=args.learning_rate, weight_decay=args.weight_decay)
    optimizers = [torch.optim.AdamW(rest, **both, betas=(0.9, 0.95), fused=True)] if rest else []
    if matrices:
        optimizers.append(Muon(matrices, **both))
    return optimizers


def schedule(step, args) -> float:
    """The factor of the learning rate: linear warm-up, then linear or cosine decay to 0."""
    warmup, done = max(1, round(args.warmup_ratio * args.max_steps)), (step - 1) / args.max_steps
    decay = 1 - done if args.lr_scheduler_type == "linear" else (1 + math.cos(math.pi * done)) / 2
    return min(step / warmup, decay)


def save(model, tokenizer, folder, step, args, value_head=None) -> Path:
    """Writes the final checkpoint, with adapters merged, and deletes what a resumed run needs."""
    model = model.merge_and_unload() if args.lora_r else model
    saved = policy.save(model.eval(), tokenizer, folder, step, value_head)
    if dist.rank() == 0:
        for state in [*folder.glob("state[.-]*"), *folder.glob("best[.-]*")]:
            shutil.rmtree(state)
    return saved
