"""The policy: a causal language model with a value head on its backbone, and the log-probabilities of response tokens.

Any decoder that transformers loads will do: a hub id, a folder, or a .gguf file. The shift between logits and tokens stands
in `response_logits` and nowhere else. Left out: how responses are sampled (rollout.py), how losses are made (ppo.py).
"""

import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from t2g import adapters, cpu, dist
from t2g.cli import fail
from t2g.dist import device
from t2g.log import sync


class ResponseStats(NamedTuple):
    """What one forward pass says of the response tokens: (B, T) each, 0 off the mask."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor


class Policy(nn.Module):
    """A causal language model and a value head that starts at V = 0."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.value_head = nn.Linear(model.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, rollout, temperature=1.0, entropy_grad=False) -> ResponseStats:
        logits, states = response_logits(self.model, rollout)
        logprobs, entropy = token_stats(logits, rollout, temperature, entropy_grad)
        return ResponseStats(logprobs, entropy, self.values(states, rollout.mask))

    def values(self, states, mask):
        """V (B, T) of the states before each response token, 0 off the mask."""
        with torch.autocast(states.device.type, enabled=False):  # bf16 would leave V three digits
            return self.value_head(states.float())[..., 0].masked_fill(~mask, 0)

    def load_value_head(self, run):
        """Takes the value head of an earlier run along, where there is one."""
        saved = Path(latest_checkpoint(run) or run) / "value_head" / "value_head.safetensors"
        if saved.is_file():
            self.value_head.load_state_dict(load_file(saved))


def token_stats(logits, rollout, temperature=1.0, entropy_grad=False):
    """Log-probabilities (B, T) of the sampled tokens and entropies (B, T), in nats and fp32, 0 off the mask.

    log pi(y_t) = l_t[y_t] - logsumexp(l_t)        H_t = logsumexp(l_t) - sum_v p_t(v) l_t(v)        l = logits / temperature
    """
    logits = logits.float() / temperature
    normaliser = logits.logsumexp(-1)
    logprobs = logits.gather(-1, rollout.response[..., None])[..., 0] - normaliser
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy = normaliser - torch.stack(
            [(row.softmax(-1) * row).sum(-1) for row in logits]
        )  # a row at a time: V is large
    return logprobs.masked_fill(~rollout.mask, 0), entropy.masked_fill(~rollout.mask, 0)


def response_logits(model, rollout):
    """Logits (B, T, V) and last hidden states (B, T, H) from which each response token was predicted.

    The state before token t is that of the token before it, so all is shifted by one: here, and only here. Logits are computed
    at these T positions and not for the prompt.
    """
    T = rollout.response.shape[1]
    attention = torch.cat([rollout.prompt_mask, rollout.mask], dim=1)
    out = model(
        input_ids=torch.cat([rollout.prompt, rollout.response], dim=1),
        attention_mask=attention.long(),
        position_ids=positions(attention),
        logits_to_keep=T + 1,
        output_hidden_states=True,
        use_cache=False,
    )
    return out.logits[:, -T - 1 : -1], out.hidden_states[-1][:, -T - 1 : -1]


def positions(attention):
    """Position ids that count real tokens only, so that left padding changes nothing."""
    return (attention.long().cumsum(1) - 1).clamp(min=0)


def save(model, tokenizer, run, step, value_head=None, write_more=None) -> Path:
    """Writes run/checkpoint-{step}, whole or not at all: the plain model, or its adapter, as from_pretrained, peft and vLLM load
    it; the value head in a folder within; and what write_more(folder) writes. Collective."""
    folder = Path(run) / f"checkpoint-{step}"
    unfinished = folder.with_suffix(".unfinished")
    weights = dist.whole_state(model, trained_only=hasattr(model, "peft_config"))
    head_weights = dist.whole_state(value_head) if value_head else {}
    try:
        if dist.rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            model.save_pretrained(unfinished, state_dict=weights)
            tokenizer.save_pretrained(unfinished)
            if value_head:
                (unfinished / "value_head").mkdir()
                save_file(head_weights, unfinished / "value_head" / "value_head.safetensors")
        dist.barrier()
        if write_more:
            write_more(unfinished)
        dist.barrier()
    except (OSError, SafetensorError) as error:
        fail(
            f"{folder} cannot be written ({error}); make room or choose another --output_dir. Earlier checkpoints stay"
        )
    if dist.rank() == 0:
        sync(unfinished)
        shutil.rmtree(folder, ignore_errors=True)  # of the same step, where a kill came right after
        unfinished.rename(folder)
    return folder


def checkpoints(run) -> list[Path]:
    """The checkpoints of a run, by step."""
    found = [
        path
        for path in Path(run).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def latest_checkpoint(run) -> Path | None:
    """The checkpoint of a run with the highest step, None if there is none."""
    return next(reversed(checkpoints(run)), None)


def load(path, device="cpu") -> tuple[PreTrainedTokenizerBase, torch.nn.Module]:
    """A tokenizer and a causal language model in fp32, checked for what we need.

    Args: path, a run's folder (its latest checkpoint), a model's folder, a .gguf file or a hub id.
    """
    path = str(latest_checkpoint(path) or path)
    if adapters.there(path):
        tokenizer, model = load(adapters.base(path))
        return tokenizer, adapters.merged(model, path).to(device).eval()
    source, gguf = pretrained(path)
    if gguf and not Path(path).is_file():
        fail(f"there is no file {path}")
    elif (
        not gguf
        and path.startswith((".", "/", "runs/"))
        and not (Path(path) / "config.json").is_file()
    ):
        fail(
            f"{path} holds no model (no config.json); give a hub id, a model's folder or a .gguf file"
        )
    elif (Path(path) / "metrics.jsonl").is_file():
        fail(f"the run {path} has no checkpoint: it did not finish; run that stage again")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **gguf)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **gguf)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        fail(
            f"no model could be loaded from {path!r} (hub id, folder or .gguf file): {str(error).splitlines()[0]}"
        )
    if gguf:  # the loader marks the model as quantised, though its weights are plain now; save_pretrained would refuse it
        config = AutoConfig.from_pretrained(source, **gguf)
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(model.state_dict())
        model = plain
    if not tokenizer.chat_template:
        fail(
            f"the tokenizer of {path} has no chat template; use a chat model, or set tokenizer.chat_template and save it"
        )
    if tokenizer.eos_token_id is None:
        fail(
            f"the tokenizer of {path} has no EOS token, so no response could ever end; set tokenizer.eos_token and save it"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    model.generation_config = GenerationConfig(
        eos_token_id=eos_ids(tokenizer, model), pad_token_id=tokenizer.pad_token_id
    )
    model.name_or_path = path  # where an adapter's own files say that its base lies
    return tokenizer, cpu.use(model).to(device).eval()


def pretrained(path: str) -> tuple[str, dict]:
    """What from_pretrained wants for a folder, a hub id or a .gguf file: the place, and the file in it."""
    return (
        (str(Path(path).parent), {"gguf_file": Path(path).name})
        if path.endswith(".gguf")
        else (path, {})
    )


def eos_ids(tokenizer, model) -> list[int]:
    """All token ids that end a response: the tokenizer's, and those that the model's generation config names."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    named = named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_token_id, *named} - {None})


def context_length(model) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9


def now() -> float:
    """Seconds on the clock, after all that was sent to the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def autocast(bf16: bool):
    """bf16 matrix products with fp32 weights where asked for, else nothing."""
    return torch.autocast(device(), dtype=torch.bfloat16) if bf16 else nullcontext()
