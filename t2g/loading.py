"""Weights that each rank reads from the files after sharding, so that no rank holds a whole model.

Left out: weights that transformers converts as it reads them (quantised ones, .bin and .gguf files,
experts that become one tensor). policy.load reads those whole on each rank.
"""

import math
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from t2g.cache import is_plain
from t2g.log import read_json


def empty_model(path):
    """A model whose weights fill() will read, or None if they must be read at once."""
    if hasattr(AutoConfig.from_pretrained(path), "quantization_config"):
        return None
    options = dict(dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True)
    bare, report = AutoModelForCausalLM.from_pretrained(path, device_map="meta", **options)
    with init_empty_weights():  # computes the buffers, such as RoPE's frequencies, which bare lacks
        model = AutoModelForCausalLM.from_config(bare.config, dtype=torch.float32)
    model.tie_weights()
    model.generation_config = bare.generation_config
    model.files = weight_files(Path(cached_file(path, "config.json")).parent)
    model.places = dict(model.named_modules())  # LoRA keeps the modules under other names
    own = model.state_dict(keep_vars=True)
    tensors = {own.get(name) for name in model.files}  # tied weights are one, under one name
    readable = len(model.files) == len(tensors) and tensors == set(own.values())
    return model if readable and not report["mismatched_keys"] and is_plain(model) else None


def weight_files(folder) -> dict:
    """The .safetensors file of each weight in a model's folder; {} if it has none."""
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if file.is_file():
        with safe_open(file, "pt") as opened:
            return dict.fromkeys(opened.keys(), file)
    weight_map = read_json(index)["weight_map"] if index.is_file() else {}
    return {name: folder / file for name, file in weight_map.items()}


@torch.no_grad()
def fill(model, device):
    """Reads the weights of an empty model, of sharded ones this rank's rows; returns the model."""
    allocate(model, device)
    for name, file in getattr(model, "files", {}).items():
        place, _, attribute = name.rpartition(".")
        weight = getattr(model.places[place], attribute)
        with safe_open(file, "pt") as opened:  # anew, because all that was read counts as memory
            copy_rows(opened.get_slice(name), weight)
    return model


def copy_rows(saved, weight):
    """Copies a weight of a file, or the rows that FSDP gives to this rank, as torch.chunk does."""
    if isinstance(weight, DTensor):
        ranks, weight, count = weight.device_mesh, weight.to_local(), len(weight)
        start = ranks.get_local_rank() * math.ceil(count / ranks.size())
        saved = saved[start : start + len(weight)]
    weight.copy_(saved[...])


def allocate(model, device):
    """Gives empty weights memory, of which the system uses none before something is written."""
    if hasattr(model, "files"):
        model._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x)
        model.tie_weights()
