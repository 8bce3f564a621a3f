"""The plan of a run: its arithmetic, its advice, and its memory against what was measured."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import train_ppo
from extras.scale import plan
from extras.speed.synthetic import random_rollout, train_args
from t2g import adapters, dist
from t2g.policy import Policy

ROOT = Path(__file__).parents[2]
SMALL = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=2)
SMALL |= dict(num_attention_heads=8, num_key_value_heads=4)
STEP = "--num_ppo_epochs 4 --per_device_train_batch_size 4 --num_mini_batches 2"
STEP = f"{STEP} --max_prompt_length 128 --response_length 64".split()


@pytest.fixture(scope="module")
def llama(tokenizer, tmp_path_factory):
    """llama(**sizes) is a folder with a configuration and no weights, one for each sizes."""

    @cache
    def folder(vocab_size=None, **sizes):
        path = tmp_path_factory.mktemp("llama")
        special = dict(eos_token_id=tokenizer.eos_token_id)
        config = LlamaConfig(vocab_size=vocab_size or len(tokenizer), **special, **sizes)
        config.save_pretrained(path)
        return path

    return folder


@pytest.fixture
def planned(monkeypatch, capsys):
    """planned(machine, model, *flags) runs the command. Returns its JSON object and its output."""

    def run(machine, model, *flags):
        policy = ["--policy", model] if model else []
        words = ["plan", machine, "--critic", "rule", *policy, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        plan.main()
        printed = capsys.readouterr().out
        return json.loads(printed.splitlines()[-1]), printed

    return run


def test_weights_and_moments_are_counted_and_sharded(llama, planned):
    one, eight = (planned(name, llama(**SMALL), *STEP)[0] for name in ("1xA100-80", "8xA100-80"))
    weights = 4 * one["parameters"] / plan.GIB
    assert one["memory"]["weights"] == one["memory"]["reference"] == pytest.approx(weights)
    assert one["memory"]["optimiser, two moments"] == pytest.approx(2 * weights, rel=1e-3)
    for name in ("weights", "reference", "optimiser, two moments"):
        assert eight["memory"][name] * 8 == pytest.approx(one["memory"][name])
    parts = [seconds for name, seconds in one["seconds"].items() if name != "a step"]
    assert one["seconds"]["a step"] == pytest.approx(sum(parts))


def test_flops_are_two_a_weight_and_token_forward_and_six_in_an_epoch(llama, planned):
    path = llama(**SMALL)
    found, printed = planned("1xcpu", path, *STEP)
    body = found["parameters"] - 2 * AutoConfig.from_pretrained(path).vocab_size * 512
    passes = 4 + 4 * 3  # rollout, two for the scores, one for the change of log pi; three an epoch
    flops = passes * 2 * body * 8 * (128 + 64)
    assert found["flops"] == pytest.approx(flops, rel=0.25), "attention and logits come on top"
    assert f"a step costs {found['flops']:.1e} FLOP" in printed
    assert found["seconds"] == {} and "seconds\n" not in printed, "a CPU's speed is not known"


def test_lora_saves_moments_and_the_reference(llama, planned):
    plans = [planned("1xA100-80", llama(**SMALL), *STEP, *f)[0] for f in ((), ("--lora_r", 8))]
    full, lora = (plan["memory"] for plan in plans)
    assert lora["optimiser, two moments"] < 0.2 * full["optimiser, two moments"]
    assert lora["reference"] == 0 < full["reference"]


def test_a_run_that_does_not_fit_gets_the_flags_with_which_it_does(llama, planned):
    wide = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=1)
    path = llama(vocab_size=128256, **wide, num_attention_heads=32, num_key_value_heads=8)
    found, printed = planned("1xL4-24", path, *STEP)
    assert not found["fits"] and found["gib"] > 24 and "it does with --bf16" in printed
    again, _ = planned("1xL4-24", path, *STEP, *found["fits_with"])
    assert again["fits"]


@pytest.mark.parametrize("machine", ["8", "0xcpu", "2xB9000"])
def test_an_unknown_machine_is_refused(planned, refused, machine):
    assert "known: A100-40" in refused(planned, machine, None)


def test_a_plan_needs_a_model(planned, tmp_path, capsys):
    with pytest.raises(SystemExit):
        planned("1xA100-80", None, "--output_dir", tmp_path / "ppo")
    assert "--policy" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [(), ("--lora_r", 8), ("--gradient_checkpointing",), ("--bf16",)])
def test_fake_tensors_need_as_much_memory_as_real_ones(llama, flags):
    sizes = SMALL | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    config = AutoConfig.from_pretrained(llama(**sizes))
    step = "--max_prompt_length 24 --response_length 16 --per_device_train_batch_size 4".split()
    args = train_args(*step, *flags)
    expected = plan.fake_step(args, config, sharded=False)

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    actor = Policy(adapters.added(model, args)).eval()
    dist.shard(actor.model, recompute=args.gradient_checkpointing)
    for weights in filter(lambda weights: weights.requires_grad, actor.parameters()):
        weights.register_post_accumulate_grad_hook(lambda weights: setattr(weights, "grad", None))
    rollout = random_rollout(4, 24, 16, config.vocab_size)
    names = ("old_logprobs", "advantages", "old_values", "returns")
    batch = {name: torch.zeros(4, 16) for name in names} | {"mask": rollout.mask}
    with plan.Alive() as alive:
        train_ppo.microbatch_loss(actor, rollout, batch, torch.tensor(1), args)[0].backward()
    assert alive.peak == pytest.approx(expected.update_peak, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--lora_r", 8), ("--gradient_checkpointing",)])
def test_memory_is_as_measured(llama, planned, tokenizer, tmp_path, flags):
    """With blocks of 256 KiB and more returned to the system, which glibc keeps otherwise."""
    path = llama(**SMALL | {"num_hidden_layers": 6})
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    step = "--num_ppo_epochs 1 --max_steps 1 --eval_samples 1 --max_prompt_length 70"
    step += " --response_length 60 --per_device_train_batch_size 32 --num_mini_batches 2"
    step = [*step.split(), *map(str, flags)]
    command = [sys.executable, ROOT / "train_ppo.py", "--policy", path, "--critic", "rule", *step]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    how = dict(cwd=ROOT, env=environment, capture_output=True, text=True)
    done = subprocess.run([*command, "--output_dir", tmp_path / "ppo"], **how)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()
    measured = json.loads(rows[-1])["peak_memory_gib"]
    assert planned("1xcpu", path, *step)[0]["gib"] == pytest.approx(measured, rel=0.1)
