"""The first part of the GPU proof: the GPU takes the step that the CPU takes, in every mode.

One PPO step from a given rollout, on a small Llama with random weights; sampling against a loop
without a cache; and a run that is killed and resumed against one that is not.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from extras.speed.given import Learner, made_up, random_model, sentences, train_flags
from extras.speed.gpu import HERE
from t2g import dist, policy
from t2g.policy import Policy
from t2g.rollout import sample

STEP = "--learning_rate 3e-4 --temperature 0.9 --entropy_coef 0.01 --max_grad_norm 0.5".split()
STEP += "--num_ppo_epochs 2 --num_mini_batches 2 --per_device_train_batch_size 2".split()
FLAGS = {
    "fp32": [],
    "bf16": ["--bf16", "--learning_rate", "3e-3"],
    "lora": ["--lora_r", "4"],
    "gradient_checkpointing": ["--gradient_checkpointing"],
    "fsdp": [],
    "fsdp_bf16": ["--bf16", "--learning_rate", "3e-3"],
    "cpu_offload": ["--cpu_offload"],
}
ON_CPU = {name: name for name in ("fp32", "bf16", "lora")}  # what the other cases are held against
ON_CPU |= {"gradient_checkpointing": "fp32", "fsdp": "fp32", "fsdp_bf16": "bf16"}
ON_CPU |= {"cpu_offload": "fp32"}


def agreement(args, report):
    """Takes the steps in four processes at once, and compares their weights."""
    folder = Path(args.out).resolve() / "agreement"
    random_model("tiny", folder / "model", initializer_range=0.3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    one_process = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    sharded = ["fsdp", "fsdp_bf16"] if args.rehearse else ["fsdp", "fsdp_bf16", "cpu_offload"]
    running = [
        start(folder, "cpu", ["fp32", "bf16", "lora"], {"CUDA_VISIBLE_DEVICES": ""}),
        start(folder, "gpu", ["fp32", "bf16", "lora", "gradient_checkpointing"], {}),
        start(folder, "gpu", sharded, one_process | {"MASTER_PORT": port}),
    ]
    without_cache(folder, report)
    codes = [process.wait() for process in running]
    for case, on_cpu in ON_CPU.items():
        path = folder / f"gpu-{case}.safetensors"
        if path.is_file():
            compare(case, load_file(path), load_file(folder / f"cpu-{on_cpu}.safetensors"), report)
        elif case in sharded or not args.rehearse:
            report(f"one PPO step, {case}", "the process stopped", "see agreement.log", False)
    resume(folder, report)
    if any(codes):
        sys.exit("a process that took the steps stopped; its error stands above")


def start(folder, place, cases, environment):
    command = [sys.executable, "-m", "extras.speed.gpu_agreement", folder, place, *cases]
    return subprocess.Popen(command, cwd=HERE, env=os.environ | environment)


def main():
    """Takes one step for each case. Writes the weights that are trained, and how they moved."""
    folder, place, *cases = sys.argv[1:]
    dist.start("cpu_offload" in cases)
    for case in cases:
        flags = train_flags(*STEP, *FLAGS[case], "--policy", f"{folder}/model")
        _, model = policy.load(f"{folder}/model")
        learner = Learner(model, flags, force_fsdp=case.startswith("fsdp"))
        before = weights_of(learner)
        learner.learn(made_up(4, 12, 9, model.config.vocab_size, uneven=True))
        after = weights_of(learner)
        moves = {f"move {name}": after[name] - before[name] for name in after}
        save_file(after | moves, f"{folder}/{place}-{case}.safetensors")


def weights_of(learner) -> dict:
    named = learner.actor.named_parameters()
    return {n: dist.plain(p.detach()).cpu().clone() for n, p in named if p.requires_grad}


def compare(case, ours, cpu, report):
    """fp32: the weights agree to 1e-4. bf16: the two moves of the weights point the same way."""
    names = [name for name in cpu if name.startswith("move ")]
    pair = [torch.cat([state[name].flatten() for name in names]) for state in (ours, cpu)]
    cosine = torch.cosine_similarity(*pair, dim=0).item()
    if "bf16" in case:
        limit = "above 0.95: cosine of the moves of the weights"
        return report(f"one PPO step, {case}", cosine, limit, cosine > 0.95)
    names = [name for name in cpu if not name.startswith("move ")]
    pair = [torch.cat([state[name].flatten() for name in names]) for state in (ours, cpu)]
    error = ((pair[0] - pair[1]).norm() / pair[1].norm()).item()
    limit = f"at most 1e-4: relative difference of the weights; cosine of the moves {cosine:.6f}"
    return report(f"one PPO step, {case}", error, limit, error <= 1e-4)


@torch.no_grad()
def without_cache(folder, report):
    """sample() at temperature 0 against the likeliest token of a forward pass without a cache."""
    tokenizer, model = policy.load(folder / "model", policy.device())
    rollout = sample(model, tokenizer, sentences(6), 24, temperature=0)
    ids, mask, same, error = rollout.prompt, rollout.prompt_mask, [], 0.0
    logprobs = Policy(model).to(policy.device())(rollout).logprobs
    for t in range(rollout.response.shape[1]):
        where = dict(attention_mask=mask.long(), position_ids=policy.positions(mask))
        logits = model(input_ids=ids, use_cache=False, **where).logits[:, -1].float()
        token, counts = rollout.response[:, t], rollout.mask[:, t]
        expected = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        error = max(error, ((expected - logprobs[:, t]) * counts).abs().max().item())
        same += (logits.argmax(-1) == token)[counts].tolist()
        ids, mask = torch.cat([ids, token[:, None]], 1), torch.cat([mask, counts[:, None]], 1)
    share = sum(same) / len(same)
    report("sample(), tokens of a loop without cache", share, "1: at temperature 0", share == 1)
    report("log-probabilities, the same loop", error, "at most 1e-3 nats", error <= 1e-3)


def resume(folder, report):
    """A run that is killed after a checkpoint and started again, against one that is not killed."""
    flags = "--task toy --critic rule --max_steps 12 --save_steps 4 --eval_samples 2"
    flags += " --response_length 12 --per_device_train_batch_size 4 --num_mini_batches 2"
    flags += f" --num_ppo_epochs 1 --learning_rate 1e-4 --policy {folder}/model --output_dir"
    command = [sys.executable, str(HERE / "train_ppo.py"), *flags.split()]
    runs = [folder / "whole", folder / "killed"]
    whole, killed = [subprocess.Popen([*command, str(run)], cwd=HERE) for run in runs]
    while killed.poll() is None and not (runs[1] / "checkpoint-4").is_dir():
        time.sleep(0.01)
    killed.kill()
    in_time = killed.wait() != 0
    again = subprocess.run([*command, str(runs[1])], cwd=HERE).returncode
    if whole.wait() or again or not in_time:
        return report("killed and resumed", "a run stopped", "see agreement.log", False)
    states = [load_file(run / "checkpoint-12" / "model.safetensors") for run in runs]
    ours, theirs = (torch.cat([x.flatten() for x in state.values()]) for state in states)
    error = ((ours - theirs).norm() / theirs.norm()).item()
    limit = "at most 1e-3: relative difference of the weights to those of a run that was not killed"
    return report("killed and resumed, 12 steps", error, limit, error <= 1e-3)


if __name__ == "__main__":
    main()
