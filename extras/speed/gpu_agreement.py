"""The first part of the GPU proof: the GPU takes the step that the CPU takes, in every mode.

One PPO step from a given rollout, on a small Llama with random weights; sampling against a loop
without a cache; and a run that is killed and resumed against one that is not.
"""

import os
import shutil
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
BF16 = ["--bf16", "--learning_rate", "3e-3"]
CASES = {"fp32": [], "bf16": BF16, "lora": ["--lora_r", "4"]}  # those that the CPU takes too
MODES = {"gradient_checkpointing": ["--gradient_checkpointing"]}  # the others, held against these
SHARDED = {"fsdp": [], "fsdp_bf16": BF16, "cpu_offload": ["--cpu_offload"]}  # under torchrun
TOY = "--task toy --critic rule --max_steps 12 --save_steps 4 --eval_samples 2 --response_length 12"
TOY += " --per_device_train_batch_size 4 --num_mini_batches 2 --num_ppo_epochs 1"


def agreement(args, report):
    """Takes the steps in three processes at once, and compares their weights."""
    folder = Path(args.out).resolve() / "agreement"
    shutil.rmtree(folder, ignore_errors=True)  # what an earlier run left
    random_model("tiny", folder / "model", initializer_range=0.3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    torchrun |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    sharded = [case for case in SHARDED if not (args.rehearse and case == "cpu_offload")]
    running = [
        start(folder, "cpu", CASES, {"CUDA_VISIBLE_DEVICES": ""}),
        start(folder, "gpu", CASES | MODES, {}),
        start(folder, "gpu", sharded, torchrun),
    ]
    without_cache(folder, report)
    resume(folder, report)
    codes = [process.wait() for process in running]
    for case in [*CASES, *MODES, *sharded]:
        against = case if case in CASES else "bf16" if "bf16" in case else "fp32"
        paths = [folder / f"gpu-{case}.safetensors", folder / f"cpu-{against}.safetensors"]
        if all(path.is_file() for path in paths):
            compare(case, *map(load_file, paths), report)
    if any(codes):
        sys.exit("a process that took the steps stopped; its error stands above")


def start(folder, place, cases, environment):
    command = [sys.executable, "-m", "extras.speed.gpu_agreement", folder, place, *cases]
    return subprocess.Popen(command, cwd=HERE, env=os.environ | environment)


def main():
    """Takes one step for each case. Writes the weights, their moves, and tokens sampled then."""
    folder, place, *cases = sys.argv[1:]
    with dist.session("cpu_offload" in cases):
        for case in cases:
            flags = train_flags(
                *STEP, *(CASES | MODES | SHARDED)[case], "--policy", f"{folder}/model"
            )
            tokenizer, model = policy.load(f"{folder}/model")
            learner = Learner(model, flags, force_fsdp=case.startswith("fsdp"))
            before = weights_of(learner)
            learner.learn(made_up(4, 12, 9, model.config.vocab_size, uneven=True))
            after = weights_of(learner)
            with dist.whole(learner.actor.model):
                rollout = sample(learner.actor.model, tokenizer, sentences(4), 16, temperature=0)
            state = {"after": after, "move": after - before, "sampled": rollout.response.cpu()}
            save_file(state, f"{folder}/{place}-{case}.safetensors")


def weights_of(learner) -> torch.Tensor:
    """All trained weights, on the CPU."""
    for part in dist.parts(learner.actor):
        part.reshard()  # a forward pass may have left gathered weights in bf16
    trained = [p.detach() for p in learner.actor.parameters() if p.requires_grad]
    return torch.cat([dist.plain(weights).cpu().flatten() for weights in trained])


def compare(case, ours, cpu, report):
    """fp32: weights agree to 1e-4, tokens exactly. bf16: the weights move in the same direction."""
    error = ((ours["after"] - cpu["after"]).norm() / cpu["after"].norm()).item()
    cosine = torch.cosine_similarity(ours["move"], cpu["move"], dim=0).item()
    same = torch.equal(ours["sampled"], cpu["sampled"])
    rule = "relative difference of the weights, at most 1e-4, and the same greedy tokens after it"
    ok = error <= 1e-4 and same
    if "bf16" in case:
        rule, ok = "relative difference of the weights; cosine above 0.95", cosine > 0.95
    report(f"one PPO step, {case}", error, f"{rule}; cosine of the moves {cosine:.5f}", ok)


@torch.no_grad()
def without_cache(folder, report):
    """sample() at temperature 0 against the likeliest token of a forward pass without a cache."""
    tokenizer, model = policy.load(folder / "model", policy.device())
    rollout = sample(model, tokenizer, sentences(6), 24, temperature=0)
    logprobs = Policy(model).to(policy.device())(rollout).logprobs
    ids, mask, same, error = rollout.prompt, rollout.prompt_mask, [], 0.0
    for t in range(rollout.response.shape[1]):
        where = dict(attention_mask=mask.long(), position_ids=policy.positions(mask))
        logits = model(input_ids=ids, use_cache=False, **where).logits[:, -1].float()
        token, counts = rollout.response[:, t], rollout.mask[:, t]
        expected = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        error = max(error, ((expected - logprobs[:, t]) * counts).abs().max().item())
        same += (logits.argmax(-1) == token)[counts].tolist()
        ids, mask = torch.cat([ids, token[:, None]], 1), torch.cat([mask, counts[:, None]], 1)
    share = sum(same) / len(same)
    report("sample(), tokens equal to a loop without cache", share, "1: temperature 0", share == 1)
    report("log-probabilities, the same loop", error, "at most 1e-3 nats", error <= 1e-3)


def resume(folder, report):
    """A run that is killed after a checkpoint and started again, against one that is not killed."""
    command = [sys.executable, "train_ppo.py", *TOY.split(), "--policy", folder / "model"]
    runs = [folder / "whole", folder / "killed"]
    commands = [[*command, "--output_dir", run] for run in runs]
    whole, killed = (subprocess.Popen(command, cwd=HERE) for command in commands)
    while killed.poll() is None and not (runs[1] / "checkpoint-4").is_dir():
        time.sleep(0.01)
    killed.kill()
    in_time = killed.wait() != 0
    again = subprocess.run(commands[1], cwd=HERE).returncode
    error = None
    if not whole.wait() and not again and in_time:
        states = [load_file(run / "checkpoint-12" / "model.safetensors") for run in runs]
        ours, theirs = (torch.cat([x.flatten() for x in state.values()]) for state in states)
        error = ((ours - theirs).norm() / theirs.norm()).item()
    limit = "relative difference of the weights to a run that was not killed, at most 1e-3"
    report("killed and resumed, 12 steps", error, limit, error is not None and error <= 1e-3)


if __name__ == "__main__":
    main()
