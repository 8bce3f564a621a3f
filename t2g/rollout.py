"""Sampling: prompts in, responses out, batched, with a key-value cache. The ids that come out are never re-tokenised.

`sample` draws at a temperature and stops at EOS; no top-k, no top-p, no beams, no repetition penalty, for PPO's
ratio is only right for tokens drawn from the very distribution whose log-probabilities it compares.
"""

import random
from dataclasses import dataclass, replace

import torch

from t2g import cache, cpu
from t2g.align import response_text
from t2g.cli import fail
from t2g.policy import autocast, context_length, eos_ids, positions


@dataclass
class Rollout:
    """A batch of sampled responses: what flows from sampling to the critic and to the update."""

    prompt: torch.Tensor  # (B, P) token ids, padded on the left
    prompt_mask: torch.Tensor  # (B, P) bool
    response: torch.Tensor  # (B, T) token ids as sampled, padded on the right
    mask: torch.Tensor  # (B, T) bool, True up to and including EOS
    finished: torch.Tensor  # (B,) bool, True if EOS was sampled
    texts: list[str]  # the responses as text, without special tokens

    def __len__(self):
        return len(self.texts)

    def rows(self, index) -> "Rollout":
        """The rows of a microbatch, their prompts without columns of padding alone. (B, T) tensors keep their index t."""
        tensors = {
            name: getattr(self, name)[index]
            for name in ("prompt", "prompt_mask", "response", "mask", "finished")
        }
        longest = int(tensors["prompt_mask"].sum(1).max())
        tensors |= {name: tensors[name][:, -longest:] for name in ("prompt", "prompt_mask")}
        return replace(self, **tensors, texts=[self.texts[i] for i in index])


def step_rng(seed: int, step: int, rank=0) -> random.Random:
    """A generator for the draws of one step, the same in all processes; and torch's seeded, in each of them another.

    What is drawn hangs on no earlier step: a run that was stopped goes on with the same draws, and no state of a generator is kept.
    """
    rng = random.Random(f"step {step} of seed {seed}")
    torch.manual_seed(rng.getrandbits(62) + rank)
    return rng


def encode_prompts(tokenizer, prompts: list[str], device="cpu"):
    """User messages through the chat template: ids (B, P), padded on the left, and their mask (B, P) bool."""
    chats = [chat_text(tokenizer, prompt) for prompt in prompts]
    batch = tokenizer(
        chats, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    return batch["input_ids"].to(device), batch["attention_mask"].bool().to(device)


def chat_text(tokenizer, prompt: str) -> str:
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)


@torch.no_grad()
def sample(
    model,
    tokenizer,
    prompts: list[str],
    response_length: int,
    temperature=1.0,
    generator=None,
    bf16=False,
) -> Rollout:
    """One response to each prompt, of at most response_length tokens; temperature 0 takes the likeliest token."""
    prompt, prompt_mask = encode_prompts(tokenizer, prompts, model.device)
    if prompt.shape[1] + response_length > context_length(model):
        fail(
            f"a prompt of {prompt.shape[1]} tokens and {response_length} new ones do not fit the model's context of "
            f"{context_length(model)}; leave long prompts out with --max_prompt_length, or allow fewer new tokens "
            "(--response_length for responses, --critique_length for critiques)"
        )
    eos = torch.tensor(eos_ids(tokenizer, model), device=model.device)
    response = prompt.new_full((len(prompts), response_length), tokenizer.pad_token_id)
    mask, finished = (
        torch.zeros_like(response, dtype=torch.bool),
        torch.zeros_like(response[:, 0], dtype=torch.bool),
    )
    past, attention, ids = (
        cache.roomy(model.config, prompt.shape[1] + response_length),
        prompt_mask,
        prompt,
    )
    going = torch.arange(
        len(prompts), device=model.device
    )  # rows without EOS so far; the others are not computed any more
    with (
        autocast(bf16),
        cpu.packed(model),
    ):  # one context for the whole loop: it keeps a copy of the weights
        for t in range(response_length):
            out = model(
                input_ids=ids,
                attention_mask=attention.long(),
                position_ids=positions(attention)[:, -ids.shape[1] :],
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
            )
            uniform = torch.rand(len(prompts), device=model.device, generator=generator)[going]
            token = draw(out.logits[:, -1].float(), temperature, uniform)
            response[going, t], mask[going, t], ended = token, True, torch.isin(token, eos)
            if ended.any():
                finished[going[ended]] = True
                going, token, attention = going[~ended], token[~ended], attention[~ended]
                past.batch_select_indices((~ended).nonzero()[:, 0])
            if not len(going):
                break
            ids, attention = (
                token[:, None],
                torch.cat([attention, torch.ones_like(attention[:, :1])], dim=1),
            )
    response, mask = response[:, : t + 1], mask[:, : t + 1]
    texts = [response_text(tokenizer, row[m].tolist()) for row, m in zip(response, mask)]
    return Rollout(prompt, prompt_mask, response, mask, finished, texts)


def draw(logits, temperature, uniform):
    """Tokens (B,) from logits (B, V): where the cumulative distribution passes uniform (B,); at temperature 0 the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits / temperature).softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[
        :, 0
    ].clamp(max=logits.shape[1] - 1)
