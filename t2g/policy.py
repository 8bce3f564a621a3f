"""The policy: a causal language model with a value head, and log-probabilities of responses.

Any decoder that transformers loads will do: a hub id, a folder or a .gguf file. The shift between
logits and tokens stands in `response_logits` and nowhere else. Left out: sampling (rollout.py) and
losses (ppo.py).
"""

import math
import os
import re
import shutil
import textwrap
import time
from contextlib import contextmanager, nullcontext
from json import JSONDecodeError
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from t2g import adapters, cpu, dist, loading
from t2g.cache import check_batching, positions
from t2g.chat import control_tokens, encode_chats, template_kwargs, turn_edges
from t2g.cli import FAILURES, fail
from t2g.dist import device
from t2g.log import print_once, put_in_place
from t2g.ppo import entropies, sampled_logprobs, vocabulary_logprobs

DAMAGED = (EOFError, JSONDecodeError, SafetensorError, UnpicklingError)


class Scores(NamedTuple):
    """The numbers of response tokens: (B, T) each, 0 off the mask."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None  # None if not asked for
    values: torch.Tensor
    kl: torch.Tensor | None = None  # against the reference, by score()


class Policy(nn.Module):
    """A causal language model and a value head, which starts at V = 0."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.value_head = nn.Linear(model.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, rollout, temperature=1.0, with_entropy=False) -> Scores:
        logits, states = response_logits(self.model, rollout)
        log_p = vocabulary_logprobs(logits, temperature)
        logprobs = sampled_logprobs(log_p, rollout.response).masked_fill(~rollout.mask, 0)
        entropy = None
        if with_entropy:  # one response at a time, because another (B, T, V) would be large
            rows = torch.stack([entropies(row) for row in log_p])
            entropy = rows.masked_fill(~rollout.mask, 0)
        return Scores(logprobs, entropy, self.values(states, rollout.mask))

    def values(self, states, mask):
        """V (B, T) of the states before each response token, 0 off the mask."""
        with torch.autocast(states.device.type, enabled=False):  # bf16 has three digits
            return self.value_head(states.float())[..., 0].masked_fill(~mask, 0)

    def load_value_head(self, run):
        """Loads the value head of an earlier run, if it saved one."""
        folder = Path(latest_checkpoint(run) or run)
        saved = folder / "value_head" / "value_head.safetensors"
        if saved.is_file():
            self.value_head.load_state_dict(load_file(saved))


def response_logits(model, rollout):
    """Logits (B, T, V) and last hidden states (B, T, H) from which response tokens are predicted.

    Token t is predicted from the state of token t - 1, so everything is shifted by one: here, and
    only here. Logits are computed at these T positions alone.
    """
    T = rollout.response.shape[1]
    attention = torch.cat([rollout.prompt_mask, rollout.mask], dim=1)
    with captured_input(model.get_output_embeddings()) as states:
        logits = model(
            input_ids=torch.cat([rollout.prompt, rollout.response], dim=1),
            attention_mask=attention.long(),
            position_ids=positions(attention),
            logits_to_keep=T + 1,
            use_cache=False,
        ).logits
    return logits[:, -T - 1 : -1], states[0][:, -T - 1 : -1]


def check_numbers(x):
    """Fails at NaN and infinity; -inf is a number here, the logit of an impossible token."""
    if not (x < math.inf).all():
        why = "its weights hold NaN or infinity, or --learning_rate is too high"
        fail(f"the model computes values that are not numbers: {why}")


@contextmanager
def captured_input(module):
    """Yields a list that gets the input of each forward pass of a module."""
    inputs = []
    handle = module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def save(model, tokenizer, run, step, value_head=None, write_more=None) -> Path:
    """Writes run/checkpoint-{step} whole or not at all. Collective.

    It holds the plain model, or its adapter, as from_pretrained, peft and vLLM load it; the value
    head in a folder of its own; and what write_more(folder) writes on each rank.
    """
    folder = Path(run) / f"checkpoint-{step}"
    unfinished = folder.with_suffix(".unfinished")
    weights = dist.whole_state(model, trained_only=hasattr(model, "peft_config"))
    head_weights = dist.whole_state(value_head) if value_head else {}
    for weight in weights.values():
        check_numbers(weight)
    try:
        if dist.rank() == 0:
            for leftover in Path(run).glob("checkpoint-*.unfinished"):
                shutil.rmtree(leftover)
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
        fail(f"{folder} cannot be written ({error}); free some space. Earlier checkpoints stay")
    if dist.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed right after it
        put_in_place(unfinished, folder)
    return folder


def checkpoints(run) -> list[Path]:
    """The checkpoints of a run, by step."""
    folders = [path for path in Path(run).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(folders, key=step_of)


def step_of(checkpoint) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def latest_checkpoint(run) -> Path | None:
    """The checkpoint of a run with the highest step, None if there is none."""
    return next(reversed(checkpoints(run)), None)


def load(path, device="cpu", empty=False) -> tuple:
    """A tokenizer, padding on the left, and a causal language model in fp32, in eval mode.

    Args: path, a run's folder (its latest checkpoint), a model's folder, a .gguf file or a hub id;
        empty, to leave the weights to dist.shard or dist.frozen in several processes, if they can
        be read in slices.
    Raises: SystemExit with one sentence if there is no such model, or no chat template or EOS.
    """
    path = str(latest_checkpoint(path) or path)
    path = os.path.abspath(path) if os.path.exists(path) else path
    if (Path(path) / "metrics.jsonl").is_file():
        fail(f"the run {path} has no checkpoint, so it did not finish: run that stage again")
    try:
        tokenizer, model = read(path, empty and dist.size() > 1)
    except (*FAILURES, *DAMAGED, StrictDataclassError) as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 400)
        hint = "give a hub id, a model's folder or a .gguf file"
        hint = "a file is damaged or a git-lfs pointer" if isinstance(error, DAMAGED) else hint
        fail(f"no model could be loaded from {path!r} ({reason}); {hint}")
    if not tokenizer.chat_template:
        fail(f"the tokenizer of {path} has no chat template: use a chat model, or set and save one")
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {path} has no EOS token: set tokenizer.eos_token and save it")
    unused = template_kwargs.keys() - re.findall(r"\w+", str(tokenizer.chat_template))
    if unused:
        print(f"--chat_template_kwargs: the template of {path} has no {', '.join(sorted(unused))}")
    size = len(model.get_input_embeddings().weight)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= size:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    ends = sorted({*eos_ids(tokenizer, model), turn_edges(tokenizer)[1]})
    control = set(control_tokens(tokenizer))  # no text is encoded to them
    ids = [i for token, i in tokenizer.get_vocab().items() if token not in control]
    if max(*ends, *ids, *encode_chats(tokenizer, [""])[0]) >= size:
        remedy = "resize and save the model's embeddings"
        fail(f"the tokenizer of {path} has more tokens than the model's {size}: {remedy}")
    ids = dict(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    model.generation_config = GenerationConfig(**ids)
    model.name_or_path = path  # an adapter's files name it as their base
    model = cpu.use(model).eval()
    if model.device.type != "meta":
        check_batching(model.to(device))
    return tokenizer, model


def read(path, empty=False) -> tuple:
    """A model with its adapter merged, and its tokenizer; an adapter's own one takes precedence."""
    if adapters.is_adapter(path):
        base = adapters.base_of(path)
        print(f"{path} is an adapter of {base}", flush=True)
        tokenizer, model = read(str(latest_checkpoint(base) or base))
        if (Path(path) / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(path)
        return tokenizer, adapters.merge(model, path)
    source, gguf = pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(source, **gguf)
    if empty and not gguf:
        model = loading.empty_model(source)
        if model is not None:
            return tokenizer, model
    options = dict(dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True)
    model, report = AutoModelForCausalLM.from_pretrained(source, **options, **gguf)
    check_keys(path, report)
    if gguf:  # the loader marks the weights as quantised, which save_pretrained refuses
        config = AutoConfig.from_pretrained(source, **gguf)
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(model.state_dict())
        model = plain
    return tokenizer, model


def check_keys(path, report):
    """Fails if weights of the model are missing, left over or of another shape."""
    wrong = []
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(map(str, report[f"{kind}_keys"]))
        if keys:
            wrong.append(f"{len(keys)} {kind} ({', '.join(keys[:3])})")
    if wrong:
        fail(f"the weights of {path} do not fit its config: {'; '.join(wrong)}; save it again")


def pretrained(path: str) -> tuple[str, dict]:
    """The arguments of from_pretrained for a hub id, a folder or a .gguf file."""
    if path.endswith(".gguf"):
        return str(Path(path).parent), {"gguf_file": Path(path).name}
    return path, {}


def eos_ids(tokenizer, model) -> list[int]:
    """The token ids that end a response: the tokenizer's and the model's."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    named = named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_token_id, *(i for i in named if isinstance(i, int))})


def context_length(model) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9


def now() -> float:
    """Seconds on the clock, after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def autocast(bf16: bool):
    """bf16 matrix products with fp32 weights, if asked for and not emulated."""
    enabled = dist.in_bf16(bf16)
    if bf16 and not enabled:
        print_once("--bf16: computes in fp32, because bf16 would be emulated here, which is slower")
    return torch.autocast(device(), dtype=torch.bfloat16) if enabled else nullcontext()
