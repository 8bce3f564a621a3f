"""Supervised fine-tuning on (prompt, completion) pairs, the loss on the completion only: for policies and for reward models.

    L = - E[ log p(completion | prompt) ]        mean over the completions' tokens in the batch, EOS included

Left out: everything but this loss. The batch has the shape of a rollout, so that response_logits serves here as well.
"""

import random

import torch
from torch.nn import functional as F
from tqdm import tqdm

from t2g.cli import fail, positive
from t2g.policy import autocast, context_length, response_logits
from t2g.rollout import Rollout, encode_prompts


def encode_pairs(tokenizer, pairs, device) -> Rollout:
    """Pairs of texts as a batch: the prompt through the chat template, the completion with EOS behind it."""
    prompt, prompt_mask = encode_prompts(tokenizer, [prompt for prompt, _ in pairs], device)
    completions = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for _, text in pairs]
    T = max(map(len, completions))
    ids = [row + [tokenizer.pad_token_id] * (T - len(row)) for row in completions]
    mask = [[True] * len(row) + [False] * (T - len(row)) for row in completions]
    response, mask = torch.tensor(ids, device=device), torch.tensor(mask, device=device)
    return Rollout(prompt, prompt_mask, response, mask, mask.any(1), [text for _, text in pairs])


def in_batches(pairs, batch_size, max_steps, seed, window=8):
    """max_steps batches; the first pass keeps the order of the pairs, each later one is shuffled.

    Within a window of eight batches, pairs of like length go together: little padding, and still the order of the whole.
    """
    rng, queue, ready = random.Random(seed), list(pairs), []
    for _ in range(max_steps):
        if not ready:
            while len(queue) < batch_size:
                queue += rng.sample(pairs, len(pairs))
            near, queue = sorted(queue[: window * batch_size], key=lambda p: len(p[0]) + len(p[1])), queue[window * batch_size :]
            ready = [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
            if len(ready[-1]) < batch_size:
                queue = ready.pop() + queue
            rng.shuffle(ready)
        yield ready.pop()


def make_optimizers(model, kind, learning_rate):
    """AdamW for all weights, or Muon for the matrices of the blocks and AdamW for the rest (for models from scratch)."""

    def is_matrix(name, p):
        return kind == "muon" and p.ndim == 2 and "embed" not in name and "head" not in name

    matrices = [p for name, p in model.named_parameters() if is_matrix(name, p)]
    rest = [p for name, p in model.named_parameters() if not is_matrix(name, p)]
    optimizers = [torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)]
    if matrices:  # updates are scaled to the size of AdamW's, so that one learning rate serves both
        optimizers.append(torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def finetune(model, tokenizer, pairs, args, log, desc):
    """Trains model in place for args.max_steps steps: linear warm-up over 5% of them, then linear decay to 0."""
    if not pairs:
        fail("the data set is empty: there is no pair to train on")
    optimizers = make_optimizers(model, args.optimizer, args.learning_rate)
    warmup = max(1, round(0.05 * args.max_steps))
    model.train()
    bar = tqdm(total=args.max_steps, desc=desc, unit="step", mininterval=0.5)
    for step, rows in enumerate(in_batches(pairs, args.per_device_train_batch_size, args.max_steps, args.seed), 1):
        batch = encode_pairs(tokenizer, rows, model.device)
        length = batch.prompt.shape[1] + batch.response.shape[1]
        if length > context_length(model):
            fail(f"a training text of {length} tokens does not fit the model's context of {context_length(model)}; "
                 "leave long prompts out with --max_prompt_length")  # fmt: skip
        with autocast(args.bf16):
            logits, _ = response_logits(model, batch)
        loss = F.cross_entropy(logits[batch.mask].float(), batch.response[batch.mask])
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm, error_if_nonfinite=True)
        rate = args.learning_rate * min(step / warmup, 1 - (step - 1) / args.max_steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        log(step, {"loss": loss.item(), "grad_norm": grad_norm.item(), "learning_rate": rate, "tokens": int(batch.mask.sum())})
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        bar.update()
    bar.close()
    model.eval()


def add_flags(add):
    """The flags of supervised training, under the names of TRL's SFTConfig."""
    add("--learning_rate", type=positive(float), default=1e-5, help="peak learning rate, after warm-up")
    add("--max_steps", type=positive(int), default=200, help="optimiser steps")
    add("--per_device_train_batch_size", type=positive(int), default=8, help="sequences a step")
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon is for models that start from scratch")
    add("--max_grad_norm", type=positive(float), default=1.0, help="gradients are clipped to this norm")
