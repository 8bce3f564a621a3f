"""The state of training that is not done: what it takes to go on as if it had never stopped. One safetensors file, no pickle.

It holds the trainable weights, the optimisers' moments and the random generators; its header holds a JSON object of the rest. The
file appears whole or not at all: it is written under another name and renamed.
"""

import fcntl
import json
import os
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from t2g.cli import fail, fresh_folder

STATE, BEST = "state.safetensors", "best.safetensors"  # of a run that is not done: where it stands, and its best weights


def save(path, model, optimizers=(), **rest):
    """Writes path; `rest` is whatever JSON can hold."""
    unfinished = Path(path).with_suffix(".unfinished")
    tensors = {name: tensor.detach().contiguous() for name, tensor in state_of(model, optimizers).items()}
    save_file(tensors, unfinished, metadata={"rest": json.dumps(rest)})
    os.replace(unfinished, path)


def load(path, model, optimizers=()) -> dict:
    """Puts the state of path into model, optimisers and random generators, strictly. Returns `rest`."""
    try:
        with safe_open(path, "pt") as file:
            tensors, rest = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["rest"])  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        fail(f"{path} is no state of a run ({type(error).__name__}); move its folder away to begin anew")
    weights = trainable(model)
    if {f"model.{name}" for name in weights} != {name for name in tensors if name.startswith("model.")}:
        fail(f"{path} belongs to another model; move its folder away to begin anew")
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(tensors[f"model.{name}"])
    for number, optimizer in enumerate(optimizers):
        moments = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return rest


def trainable(model) -> dict:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def state_of(model, optimizers) -> dict:
    tensors = {f"model.{name}": parameter for name, parameter in trainable(model).items()}
    for number, optimizer in enumerate(optimizers):
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": tensor for key, tensor in moments.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return tensors


@contextmanager
def run_folder(args):
    """The run's folder, new, or as it was when a run of the same flags and data was stopped. One process at a time may hold it."""
    folder = Path(args.output_dir).resolve()
    with ExitStack() as stack:
        if folder.is_dir():
            stack.enter_context(held(folder))
        flags, config = json.loads(json.dumps(vars(args), default=str)), folder / "config.json"
        same = (folder / STATE).is_file() and {**flags, "argv": 0} == {**json.loads(config.read_text(encoding="utf-8")), "argv": 0}
        if not same:
            stack.enter_context(held(fresh_folder(folder)))
        yield folder


@contextmanager
def held(folder):
    """A lock on a folder that ends with the process, if not before."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another process trains in {folder}; wait for it, or choose another --output_dir")
        yield
    finally:
        os.close(handle)
