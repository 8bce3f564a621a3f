"""Sampling, batched and with a key-value cache. Sampled ids are never re-encoded.

`sample` draws from the plain distribution at a temperature and stops at EOS. There is no top-k,
top-p, beam search or repetition penalty, because PPO's ratio is only right for tokens drawn from
the very distribution whose log-probabilities it compares.
"""

import random
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from t2g import cpu, dist
from t2g.align import response_text
from t2g.cache import next_logits, preallocated
from t2g.chat import encode_chats
from t2g.cli import fail
from t2g.grammar import FeedbackGrammar
from t2g.policy import autocast, check_numbers, context_length, eos_ids


@dataclass
class Rollout:
    """A batch of sampled responses: what sampling hands to the critic and to the update."""

    prompt: torch.Tensor  # (B, P) token ids, padded on the left
    prompt_mask: torch.Tensor  # (B, P) bool
    response: torch.Tensor  # (B, T) token ids as sampled, padded on the right
    mask: torch.Tensor  # (B, T) bool, True up to and including EOS
    finished: torch.Tensor  # (B,) bool, True if EOS was sampled
    texts: list[str]  # the responses as text, without special tokens

    def __len__(self):
        return len(self.texts)

    def rows(self, index) -> "Rollout":
        """A microbatch, without columns of prompt padding. (B, T) tensors keep their index t."""
        names = ("prompt", "prompt_mask", "response", "mask", "finished")
        tensors = {name: getattr(self, name)[index] for name in names}
        longest = int(tensors["prompt_mask"].sum(1).max())
        for name in ("prompt", "prompt_mask"):
            tensors[name] = tensors[name][:, -longest:]
        return replace(self, **tensors, texts=[self.texts[i] for i in index])

    def ids(self, row) -> list[int]:
        """The sampled ids of a response, EOS included, without padding."""
        return self.response[row][self.mask[row]].tolist()


def step_rng(seed: int, step: int, rank=0) -> random.Random:
    """A random generator of a step, the same on all ranks; seeds torch's differently on each.

    Draws depend on seed, step and rank alone, so a resumed run needs no saved generator.
    """
    rng = random.Random(f"step {step} of seed {seed}")
    torch.manual_seed(rng.getrandbits(62) + rank)
    return rng


def encode_prompts(tokenizer, prompts: list[str], device="cpu"):
    """User messages through the chat template: ids (B, P), padded on the left, and mask (B, P)."""
    batch = {"input_ids": encode_chats(tokenizer, prompts)}
    batch = tokenizer.pad(batch, padding_side="left", return_tensors="pt")
    return batch["input_ids"].to(device), batch["attention_mask"].bool().to(device)


@torch.no_grad()
def sample(
    model, tokenizer, prompts, response_length, temperature=1.0, generator=None, bf16=False,
    readable=False,
) -> Rollout:  # fmt: skip
    """One response of at most response_length tokens to each prompt; temperature 0 is greedy.

    readable: a grammar keeps responses to feedback that can be read, and greedy.

    Raises: SystemExit with one sentence if a prompt and its response do not fit the context.
    """
    prompt, prompt_mask = encode_prompts(tokenizer, prompts, model.device)
    length = prompt.shape[1] + response_length
    if length > context_length(model):
        too_many = f"a prompt of {prompt.shape[1]} tokens and {response_length} new ones"
        fail(f"{too_many} exceed the model's context of {context_length(model)}; shorten either")
    eos = torch.tensor(eos_ids(tokenizer, model), device=model.device)
    response = prompt.new_full((len(prompts), response_length), tokenizer.pad_token_id)
    mask = torch.zeros_like(response, dtype=torch.bool)
    finished = torch.zeros_like(mask[:, 0])
    grammar = FeedbackGrammar(tokenizer, model, len(prompts)) if readable else None
    past, attention, ids = preallocated(model.config, length), prompt_mask, prompt
    active = torch.arange(len(prompts), device=model.device)  # rows that have not ended
    with autocast(bf16), cpu.packed(model):  # both keep copies of the weights for the whole loop
        for t in range(response_length):
            logits = next_logits(model, ids, attention, past)
            if t == 0:
                check_numbers(logits)
            uniform = torch.rand(len(prompts), device=model.device, generator=generator)[active]
            if grammar:
                token = grammar.choose(logits.float(), active.tolist())
            else:
                token = draw(logits.float(), temperature, uniform)
            response[active, t], mask[active, t] = token, True
            ended = torch.isin(token, eos)
            if ended.any():
                finished[active[ended]] = True
                active, token, attention = active[~ended], token[~ended], attention[~ended]
                past.reorder_cache((~ended).nonzero()[:, 0])
            if not len(active):
                break
            ids = token[:, None]
            attention = torch.cat([attention, torch.ones_like(attention[:, :1])], dim=1)
    check_numbers(logits)
    response, mask = response[:, : t + 1], mask[:, : t + 1]
    texts = [response_text(tokenizer, row[m].tolist()) for row, m in zip(response, mask)]
    return Rollout(prompt, prompt_mask, response, mask, finished, texts)


def draw(logits, temperature, uniform):
    """Tokens (B,) from logits (B, V) and uniform random numbers (B,), by the inverse of the CDF."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits / temperature).softmax(-1).cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return token.clamp(max=logits.shape[1] - 1)


def respond(model, tokenizer, prompts, response_length, batch_size=64, desc=None, **sampling):
    """Responses to many prompts, in batches of similar length: texts, and which ended with EOS.

    desc shows a progress bar; sampling is passed on to sample().
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts, finished = [""] * len(prompts), [False] * len(prompts)
    hidden = desc is None or dist.rank() > 0
    with (
        dist.whole(model),
        tqdm(total=len(prompts), desc=desc, disable=hidden, unit="sample") as bar,
    ):
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            batch = [prompts[i] for i in index]
            rollout = sample(model, tokenizer, batch, response_length, **sampling)
            for i, text, ended in zip(index, rollout.texts, rollout.finished.tolist()):
                texts[i], finished[i] = text, ended
            bar.update(len(index))
    return texts, finished


def respond_together(model, tokenizer, prompts, *length, **options):
    """respond() to prompts that all ranks have, shared out over the ranks. Collective."""
    answers = respond(model, tokenizer, dist.share(prompts), *length, **options)
    texts, finished = (dist.collect(part, len(prompts)) for part in answers)
    return texts, finished
