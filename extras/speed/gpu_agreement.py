"""The first part of the GPU check: the GPU takes the PPO step that the CPU takes, in every mode.

It compares one step on a random rollout of a small random Llama, sampling with a forward pass
without a cache, and a run that is killed and resumed with one that is not.
"""

import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from extras.speed.gpu import HERE
from extras.speed.synthetic import Learner, random_model, random_rollout, sentences, train_args
from t2g import dist, policy, torchrun
from t2g.checkpoint import trainable
from t2g.rollout import sample

STEP = "--learning_rate 3e-4 --temperature 0.9 --entropy_coef 0.01 --max_grad_norm 0.5 "
STEP += "--num_ppo_epochs 2 --num_mini_batches 2 --per_device_train_batch_size 2 "
BF16 = "--bf16 --learning_rate 3e-3"
ON_CPU = {"fp32": "", "bf16": BF16, "lora": "--lora_r 4"}
CASES = ON_CPU | {"gradient_checkpointing": "--gradient_checkpointing"}
CASES |= {"fsdp": "", "fsdp_bf16": BF16, "cpu_offload": "--cpu_offload"}
TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # what torchrun would set
TORCHRUN |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
TOY = "--task toy --critic rule --max_steps 12 --save_steps 4 --eval_samples 2 --response_length 12"
TOY += " --per_device_train_batch_size 4 --num_mini_batches 2 --num_ppo_epochs 1"


def agreement(args, report):
    """Takes the steps on the CPU and on the GPU at once and compares their weights."""
    folder = Path(args.out).resolve() / "agreement"
    shutil.rmtree(folder, ignore_errors=True)  # what an earlier run left
    random_model("tiny", folder / "model", initializer_range=0.3)
    cases = [case for case in CASES if not (args.rehearse and case == "cpu_offload")]
    running = [
        start(folder, "cpu", ON_CPU, {"CUDA_VISIBLE_DEVICES": ""}),
        start(folder, "gpu", cases, TORCHRUN),
    ]
    compare_without_cache(folder, report)
    compare_resumed(folder, report)
    codes = [process.wait() for process in running]
    for case in cases:
        on_cpu = case if case in ON_CPU else "bf16" if "bf16" in case else "fp32"
        paths = [folder / f"gpu-{case}.safetensors", folder / f"cpu-{on_cpu}.safetensors"]
        if all(path.is_file() for path in paths):
            compare_steps(case, *map(load_file, paths), report)
    if any(codes):
        sys.exit("a process that took the steps failed; its error is above")


def start(folder, place, cases, environment):
    command = [sys.executable, "-m", "extras.speed.gpu_agreement", folder, place, *cases]
    return subprocess.Popen(command, cwd=HERE, env=os.environ | environment)


def main():
    """Takes a step for each case. Saves the weights, their change and tokens sampled after it."""
    folder, place, *cases = sys.argv[1:]
    with torchrun.session("cpu_offload" in cases):
        for case in cases:
            flags = STEP + CASES[case]
            args = train_args(*flags.split(), "--policy", f"{folder}/model")
            tokenizer, model = policy.load(args.policy)
            # FSDP shards even in one process if it believes that there are two.
            two = mock.patch.object(dist, "size", lambda: 2)
            with two if case.startswith("fsdp") else nullcontext():
                learner = Learner(model, args)
            before = trained_weights(learner.actor)
            learner.learn(random_rollout(4, 12, 9, model.config.vocab_size))
            after = trained_weights(learner.actor)
            with dist.whole(learner.actor.model):
                rollout = sample(learner.actor.model, tokenizer, sentences(4), 16, temperature=0)
            state = {"after": after, "move": after - before, "sampled": rollout.response.cpu()}
            save_file(state, f"{folder}/{place}-{case}.safetensors")


def trained_weights(actor) -> torch.Tensor:
    """All trained weights as one vector on the CPU."""
    for part in dist.parts(actor):
        part.reshard()  # a forward pass may have left gathered weights in bf16
    weights = trainable(actor).values()
    return torch.cat([dist.plain(weight.detach()).cpu().flatten() for weight in weights])


def difference(ours, theirs) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def compare_steps(case, ours, cpu, report):
    """fp32: weights agree to 1e-4, tokens exactly. bf16: the weights move in the same direction."""
    error = difference(ours["after"], cpu["after"])
    cosine = torch.cosine_similarity(ours["move"], cpu["move"], dim=0).item()
    rule = "relative difference of the weights, at most 1e-4, and the same greedy tokens after it"
    ok = error <= 1e-4 and torch.equal(ours["sampled"], cpu["sampled"])
    if "bf16" in case:
        rule, ok = "relative difference of the weights; cosine above 0.95", cosine > 0.95
    report(f"one PPO step, {case}", error, f"{rule}; cosine of the moves {cosine:.5f}", ok)


@torch.no_grad()
def compare_without_cache(folder, report):
    """sample() at temperature 0 against the likeliest tokens of a forward pass without a cache."""
    tokenizer, model = policy.load(folder / "model", policy.device())
    rollout = sample(model, tokenizer, sentences(6), 24, temperature=0)
    logits, _ = policy.response_logits(model, rollout)
    share = (logits.argmax(-1) == rollout.response)[rollout.mask].float().mean().item()
    report("sample(), tokens equal to those without a cache", share, "1: temperature 0", share == 1)


def compare_resumed(folder, report):
    """A run that is killed after a checkpoint and started again, against one that is not killed."""
    whole, killed = folder / "whole", folder / "killed"
    command = [sys.executable, "train_ppo.py", *TOY.split(), "--policy", folder / "model"]
    commands = [[*command, "--output_dir", run] for run in (whole, killed)]
    running = [subprocess.Popen(command, cwd=HERE) for command in commands]
    while running[1].poll() is None and not (killed / "checkpoint-4").is_dir():
        time.sleep(0.01)
    running[1].kill()
    in_time, error = running[1].wait() != 0, None
    codes = running[0].wait(), subprocess.run(commands[1], cwd=HERE).returncode
    if in_time and not any(codes):
        states = [load_file(run / "checkpoint-12" / "model.safetensors") for run in (whole, killed)]
        weights = [torch.cat([x.flatten() for x in state.values()]) for state in states]
        error = difference(*weights)
    limit = "relative difference of the weights to a run that was not killed, at most 1e-3"
    report("killed and resumed, 12 steps", error, limit, error is not None and error <= 1e-3)


if __name__ == "__main__":
    main()
