"""What it takes to go on as if a run had never stopped: weights, moments, how far it got. safetensors and JSON, no pickle.

Supervised runs keep one such state in their folder, with the random generators in it. Runs of train_ppo.py keep one in each
checkpoint, in as many files as there were processes; their steps draw from generators of their own (rollout.step_rng).
"""

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from t2g import dist, policy
from t2g.cli import fail, fresh_folder, positive
from t2g.log import write_json

STATE, BEST = (
    "state.safetensors",
    "best.safetensors",
)  # of a supervised run that is not done: where it stands, its best weights
UNLIKE = {"argv", "resume", "output_dir", "save_steps", "save_total_limit", "tensorboard", "eval_samples", "gradient_checkpointing",
          "cpu_offload", "replicate_frozen"}  # fmt: skip  # what may differ between a run and the one that goes on with it
FACTORS = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
}  # so may these, if the batch stays


def save(path, model, optimizers=(), **rest):
    """Writes path, whole or not at all; `rest` is whatever JSON can hold."""
    unfinished = Path(path).with_suffix(".unfinished")
    tensors = state_of(model, optimizers) | {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, unfinished, metadata={"rest": json.dumps(rest)})
    os.replace(unfinished, path)


def load(path, model, optimizers=()) -> dict:
    """Puts the state of path into model, optimisers and random generators, strictly. Returns `rest`."""
    tensors, rest = read(path)
    put(tensors, path, model, optimizers)
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return rest


def read(path, names=None) -> tuple[dict, dict]:
    """The tensors of a state's file, all if no names are given, and its `rest`."""
    try:
        with safe_open(path, "pt") as file:
            rest = (file.metadata() or {}).get("rest", "{}")
            return {
                name: file.get_tensor(name) for name in (file.keys() if names is None else names)
            }, json.loads(rest)
    except (OSError, SafetensorError, ValueError) as error:
        fail(
            f"{path} is no state of a run ({type(error).__name__}); move its folder away to begin anew or from an earlier state"
        )


def state_of(model, optimizers) -> dict:
    """This process's rows of the trainable weights and of the optimisers' moments, by name."""
    shards_only(model)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in trainable(model).items()}
    for number, optimizer in enumerate(optimizers):
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{number}.{index}.{key}": tensor for key, tensor in moments.items()
            }
    return {name: dist.local(tensor).contiguous() for name, tensor in tensors.items()}


def put(tensors, path, model, optimizers):
    """The inverse of state_of()."""
    shards_only(model)
    weights = trainable(model)
    shapes = {f"model.{name}": dist.local(weight).shape for name, weight in weights.items()}
    if shapes != {
        name: tensor.shape for name, tensor in tensors.items() if name.startswith("model.")
    }:
        fail(f"{path} belongs to another model; move its folder away to begin anew")
    with torch.no_grad():
        for name, weight in weights.items():
            dist.local(weight).copy_(tensors[f"model.{name}"])
    for number, optimizer in enumerate(optimizers):
        stepped = [weight for group in optimizer.param_groups for weight in group["params"]]
        moments = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = (
                    dist.like(stepped[int(index)], tensor) if tensor.ndim else tensor
                )
        optimizer.load_state_dict(
            {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
        )


def shards_only(model):
    """A pass may have left whole weights in a sharded model's place."""
    for part in dist.parts(model):
        part.reshard()


def trainable(model) -> dict:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def add_flags(add):
    add(
        "--save_steps",
        type=positive(int),
        help="steps between two checkpoints; a tenth of --max_steps, at most 20, if not given",
    )
    add(
        "--save_total_limit",
        type=positive(int),
        default=2,
        help="checkpoints that are kept, the last ones",
    )
    resume = "auto: go on with a run of the same flags that did not finish; none: begin anew; or a checkpoint of --output_dir"
    add("--resume", default="auto", help=resume)


def keep(actor, tokenizer, optimizer, step, args, sigterm, data_hash, **rest):
    """At every --save_steps-th step and the last, a checkpoint with the state from which train_ppo.py goes on; older ones than the
    last --save_total_limit go. Where a process has got SIGTERM, it is written now, and all of them leave. Collective.
    """
    leaving = dist.totals({"signals": len(sigterm)})["signals"]
    if not (leaving or step % args.save_steps == 0 or step == args.max_steps):
        return

    def write_state(folder):
        (folder / "state").mkdir(exist_ok=True)
        save_file(
            state_of(actor, [optimizer]), folder / "state" / state_file(dist.rank(), dist.size())
        )
        if dist.rank() == 0:
            meta = {
                "step": step,
                **rest,
                "processes": dist.size(),
                "data_hash": data_hash,
                "config": vars(args),
            }
            meta |= {"argv": sys.argv, "commit": commit(), "versions": versions()}
            write_json(folder / "state" / "meta.json", meta)

    policy.save(actor.model, tokenizer, args.output_dir, step, actor.value_head, write_state)
    for old in (
        policy.checkpoints(args.output_dir)[: -args.save_total_limit] if dist.rank() == 0 else ()
    ):
        shutil.rmtree(old)
    if leaving:
        print(f"\nSIGTERM: left after step {step}; the same command goes on from there", flush=True)
        raise SystemExit(128 + signal.SIGTERM)


def resume(actor, optimizer, args, data) -> dict:
    """Puts the last checkpoint of --output_dir, if there is one, into actor and optimiser. Returns: its meta.json, or step 0."""
    hashed = hashlib.sha256(json.dumps([example.prompt for example in data]).encode()).hexdigest()
    steps = (
        [step_of(folder) for folder in policy.checkpoints(args.output_dir)]
        if dist.rank() == 0
        else []
    )
    step = int(
        dist.totals({"step": max(steps, default=0)})["step"]
    )  # what one process sees in a shared folder, all take
    if not step:
        return {"step": 0, "data_hash": hashed}
    folder = Path(args.output_dir) / f"checkpoint-{step}"
    meta = read_meta(folder)
    if meta.get("data_hash") != hashed:
        fail(
            f"{folder} was made with other data; bring those back, or begin anew with --resume none"
        )
    files = [
        folder / "state" / state_file(rank, meta["processes"]) for rank in range(meta["processes"])
    ]
    if len(files) == dist.size():
        tensors = read(files[dist.rank()])[0]
    else:
        tensors = rows_of_all(files)
    put(tensors, folder, actor, [optimizer])
    if (
        meta["config"]["kl_coef"] != args.kl_coef
    ):  # another one is wanted now than the one that was steered
        del meta["kl_coef"]
    print(f"goes on after step {meta['step']} of {args.output_dir}", flush=True)
    return meta


def rows_of_all(files) -> dict:
    """What other processes wrote, as many rows of it as FSDP gives this one."""
    for file in files:
        read(file, names=())  # a damaged one is told of now
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
        tensors = {}
        for name in opened[0].keys():  # noqa: SIM118
            first = opened[0].get_tensor(name)
            whole = [file.get_tensor(name) for file in opened] if first.ndim else []
            tensors[name] = dist.own_chunk(torch.cat(whole)).clone() if whole else first
    return tensors


def read_meta(folder) -> dict:
    try:
        return json.loads((folder / "state" / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(
            f"{folder} holds no state to go on from ({error}); move it away to go on from the one before, if there is one"
        )


def state_file(rank, processes) -> str:
    return f"{rank}-of-{processes}.safetensors"


def versions() -> dict:
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def commit() -> str | None:
    """The commit of this code, where it is a clone and git is there."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


@contextmanager
def run_folder(args, resume="auto"):
    """The run's folder, new, or as it was when a run of the same flags was stopped. One run at a time may hold it. Collective."""
    folder = Path(args.output_dir).resolve()
    again = (
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    )  # torchrun's: the flag was obeyed at the first start
    resume = "auto" if again else resume
    with ExitStack() as stack:
        if dist.rank() == 0:
            locked = folder.is_dir() and folder.stat().st_ino
            if locked:
                stack.enter_context(held(folder))
            if again and finished(folder):
                raise SystemExit(0)
            other = other_flags(folder, args) if resume == "auto" else None
            if resume not in ("auto", "none"):
                only_until(folder, Path(resume).resolve())
            elif other is None or other:
                if other:
                    names = ", ".join(sorted(other))
                    print(
                        f"the run in {folder} did not finish, and had another {names}; moved back, that or --resume continues it"
                    )
                if fresh_folder(folder).stat().st_ino != locked:  # an empty one stays as it is
                    stack.enter_context(held(folder))
        dist.barrier()
        yield folder


def other_flags(folder, args) -> set | None:
    """The flags in which the run that was stopped in a folder differs from this one; None if there is nothing to go on from."""
    latest, config = policy.latest_checkpoint(folder), folder / "config.json"
    stands = (folder / STATE).is_file() or (
        latest and (latest / "state").is_dir() and not finished(folder)
    )
    if not (stands and config.is_file()):
        return None
    try:
        before = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        fail(
            f"{config} is damaged ({error}); mend it, move {folder} away, or begin anew with --resume none"
        )
    flags = json.loads(json.dumps(vars(args), default=str))
    free = UNLIKE | (FACTORS if "batch_size" in flags else set())
    return {
        name
        for name in (flags.keys() | before.keys()) - free
        if same_place(flags.get(name)) != same_place(before.get(name))
    }


def same_place(value):
    """A flag's value; if it is a path of something that is there, in one spelling."""
    return (
        os.path.realpath(value)
        if isinstance(value, str) and value and os.path.exists(value)
        else value
    )


def finished(folder) -> bool:
    """Whether a run of train_ppo.py left all that it leaves at its end."""
    return (folder / "result.json").is_file() and (folder / "page.html").is_file()


def only_until(folder, chosen):
    """Makes the chosen checkpoint the last of its run. Later ones and what tells of them are kept, in a folder left-N."""
    if chosen not in policy.checkpoints(folder):
        fail(
            f"--resume {chosen}: no checkpoint of --output_dir {folder}; name one of its folders checkpoint-STEP"
        )
    later = [path for path in policy.checkpoints(folder) if step_of(path) > step_of(chosen)]
    told = (
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "heldout.jsonl",
        "result.json",
        "page.html",
    )
    left = next(path for n in itertools.count(1) if not (path := folder / f"left-{n}").exists())
    left.mkdir()
    for path in filter(Path.is_file, map(folder.joinpath, told)):
        shutil.copy(path, left)
    (folder / "result.json").unlink(missing_ok=True)
    for path in later:
        path.rename(left / path.name)


def step_of(checkpoint) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


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


@contextmanager
def sigterm():
    """A list that is empty until the process gets SIGTERM, as schedulers send it some time before they kill."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
