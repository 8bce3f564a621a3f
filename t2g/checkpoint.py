"""The state from which a run resumes: weights, optimiser moments, random generators. No pickle.

A supervised run keeps its latest state in its folder; a run of train_ppo.py keeps one in each
checkpoint. A state has one file per rank.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from t2g import dist, policy
from t2g.cli import fail, positive
from t2g.log import put_in_place, read_json, write_json


def save(folder, model, optimizers=(), **reached):
    """Writes this rank's part of a state; `reached` is anything that JSON can hold."""
    tensors = state_of(model, optimizers) | {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    folder.mkdir(exist_ok=True)
    file = state_files(folder, dist.size())[dist.rank()]
    save_file(tensors, file, metadata={"reached": json.dumps(reached)})


def replace(folder, name, model, optimizers=(), **reached):
    """Writes the state folder/NAME-STEP whole or not at all; deletes earlier ones. Collective."""
    unfinished = folder / f"{name}.unfinished"
    if dist.rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a run that was killed
    dist.barrier()
    save(unfinished, model, optimizers, **reached)
    dist.barrier()
    if dist.rank() == 0:
        place = folder / f"{name}-{reached['step']}"
        shutil.rmtree(place, ignore_errors=True)  # left by a run that was killed after it
        earlier = states(folder, name)
        put_in_place(unfinished, place)
        for path in earlier:
            shutil.rmtree(path)
    dist.barrier()


def states(folder, name) -> list[Path]:  # two if replace() was killed
    return sorted(folder.glob(f"{name}-*"), key=policy.step_of)


def latest(folder, name) -> Path | None:
    return next(reversed(states(folder, name)), None)


def load(folder, model, optimizers=()) -> dict:
    """Restores a state that any number of ranks saved; returns `reached`."""
    files = state_files(folder, len(list(folder.glob("*.safetensors"))))
    mine = [files[dist.rank()]] if len(files) == dist.size() else files  # all, to cut anew
    tensors = {}
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, "pt")) for file in mine]
            reached = json.loads((opened[0].metadata() or {})["reached"])
            for name in opened[0].keys():  # noqa: SIM118
                parts = [file.get_tensor(name) for file in opened]
                sharded = mine is files and parts[0].ndim and not name.startswith("random.")
                tensors[name] = dist.own_chunk(torch.cat(parts)).clone() if sharded else parts[0]
    except (OSError, SafetensorError, ValueError, LookupError) as error:
        fail(f"{folder} is not a valid state ({type(error).__name__}); {remedy(folder)}")
    restore(tensors, folder, model, optimizers)
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return reached


def remedy(state) -> str:
    """What to do about a damaged state: without its whole checkpoint an earlier one is resumed."""
    damaged = state.parent if state.name == "state" else state
    return f"move {damaged} away and run the same command again"


def state_of(model, optimizers) -> dict:
    """This rank's rows of the trained weights and of the optimisers' moments, by name."""
    dist.reshard(model)
    tensors = {f"model.{name}": weight.detach() for name, weight in trainable(model).items()}
    for number, optimizer in enumerate(optimizers):
        for index, moments in optimizer.state_dict()["state"].items():
            for name, moment in moments.items():
                tensors[f"optimizer.{number}.{index}.{name}"] = moment
    return {name: dist.local(tensor).contiguous() for name, tensor in tensors.items()}


def restore(tensors, path, model, optimizers):
    """The inverse of state_of()."""
    dist.reshard(model)
    weights = {f"model.{name}": weight for name, weight in trainable(model).items()}
    shapes = {name: dist.local(weight).shape for name, weight in weights.items()}
    if shapes != {name: x.shape for name, x in tensors.items() if name.startswith("model.")}:
        fail(f"{path} belongs to another model; move the folder of the run away to begin anew")
    with torch.no_grad():
        for name, weight in weights.items():
            dist.local(weight).copy_(tensors[name])
    for number, optimizer in enumerate(optimizers):
        parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
        state = optimizer.state_dict()
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, moment = name.split(".")
                if tensor.ndim:  # sharded as its parameter is
                    rows, tensor = tensor, torch.zeros_like(parameters[int(index)])
                    dist.local(tensor).copy_(rows)
                state["state"].setdefault(int(index), {})[moment] = tensor
        optimizer.load_state_dict(state)


def trainable(model) -> dict:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def add_flags(add):
    default = "a tenth of --max_steps, at most 20, if not given"
    add("--save_steps", None, f"steps between two checkpoints; {default}", positive(int))
    add("--save_total_limit", 2, "number of checkpoints that are kept, the latest ones")
    add("--resume", "auto", "auto: continues if flags match; none: starts over; or a CHECKPOINT")


def save_checkpoint(actor, tokenizer, optimizer, args, meta):
    """Writes a checkpoint with the state to resume from, and deletes the oldest ones. Collective.

    meta: {"step", "data_hash", "start", "kl_coef"}; flags, command, commit and versions are added.
    """

    def write_state(folder):
        save(folder / "state", actor, [optimizer])
        if dist.rank() == 0:
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            versions["python"] = sys.version.split()[0]
            program = {"argv": sys.argv, "commit": commit(), "versions": versions}
            config = {"processes": dist.size(), "config": vars(args)}
            write_json(folder / "state" / "meta.json", meta | config | program)

    where = args.output_dir, meta["step"]
    policy.save(actor.model, tokenizer, *where, actor.value_head, write_state)
    if dist.rank() == 0:
        for old in policy.checkpoints(args.output_dir)[: -args.save_total_limit]:
            shutil.rmtree(old)
    dist.barrier()


def resume(actor, optimizer, args, examples) -> dict:
    """Restores the latest checkpoint of --output_dir, by any number of ranks. Collective.

    Returns: its meta.json, or that of step 0.
    """
    start = {"step": 0, "data_hash": hash_of(examples), "start": size_of(actor)}
    start["kl_coef"] = args.kl_coef
    latest = dist.rank() == 0 and policy.latest_checkpoint(args.output_dir)
    step = policy.step_of(latest) if latest else 0
    step = int(dist.totals({"step": step})["step"])  # all ranks resume what rank 0 sees
    if not step:
        return start
    folder = Path(args.output_dir) / f"checkpoint-{step}"
    state = folder / "state"
    meta = read_json(state / "meta.json", remedy(state))
    if meta.get("data_hash") != start["data_hash"]:
        if args.resume in ("auto", "none"):
            choice = f"restore them, go on with --resume {folder}, or begin anew with --resume none"
            fail(f"{folder} was made from other data; {choice}")
        print(f"the data are not those of {folder}; the run goes on with the new ones", flush=True)
    if abs(meta["start"] - start["start"]) > 1e-6 * meta["start"]:  # the reference is made from it
        choice = "restore it, or begin anew with --resume none"
        fail(f"{folder} started from another --policy; {choice}")
    load(state, actor, [optimizer])
    print(f"resuming after step {step} of {args.output_dir}", flush=True)
    if meta["config"]["kl_coef"] == args.kl_coef:  # otherwise the user asks for another one
        start["kl_coef"] = meta["kl_coef"]
    return start | {"step": step}


def size_of(module) -> float:
    """The sum of |w| over all weights of all ranks, by which models are told apart. Collective."""
    weights = [dist.local(weight).double().abs().sum() for weight in module.parameters()]
    return dist.totals({"size": sum(weights).item()})["size"]


def hash_of(examples) -> str:
    text = json.dumps(stable(examples))
    return hashlib.sha256(text.encode()).hexdigest()


def stable(value):
    """The same in each process, unlike str() of a set or of an object with its address."""
    if isinstance(value, dict):
        return {str(stable(key)): stable(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [stable(x) for x in value]
    if isinstance(value, set | frozenset):
        return sorted(str(stable(x)) for x in value)
    if value is None or isinstance(value, str | int | float):
        return value
    if fields := getattr(value, "__dict__", None):
        return stable(fields)
    return re.sub(" at 0x[0-9a-f]+", "", str(value))


def state_files(folder, processes) -> list[Path]:
    return [folder / f"{rank}-of-{processes}.safetensors" for rank in range(processes)]


def commit() -> str | None:
    command = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:  # there is no git
        return None
