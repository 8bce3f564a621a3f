"""The plan of a run: its arithmetic, what it says where a run does not fit, and its memory against what was measured."""

import argparse
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import one_step
import pytest
import torch
from test_resume import run
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import train_ppo
from extras.scale import plan
from t2g import adapters, dist
from t2g.policy import Policy
from t2g.rollout import Rollout

ROOT = Path(__file__).parents[2]
SIZES = dict(
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
)
TOO_LOW = pytest.mark.xfail(
    reason="0.89 GiB planned, 1.15 to 1.20 measured: where the rest goes is not known yet"
)
SHAPE = ("--num_ppo_epochs", 4, "--per_device_train_batch_size", 4, "--num_mini_batches", 2)
SHAPE += ("--max_prompt_length", 128, "--response_length", 64)


@pytest.fixture(scope="module")
def llama(tokenizer, tmp_path_factory):
    """llama(**sizes) is a folder with a configuration and no weights, one for each sizes."""

    @cache
    def folder(vocab_size=None, **sizes):
        path = tmp_path_factory.mktemp("llama")
        LlamaConfig(
            vocab_size=vocab_size or len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes
        ).save_pretrained(path)
        return path

    return folder


@cache
def planned(where, policy, *flags):
    code, printed = run(("--policy", policy, "--critic", "rule", *flags, "--plan", where))
    assert code == 0, printed
    return json.loads(printed.splitlines()[-1]), printed


def test_weights_and_moments_are_counted_and_shared_out(llama):
    path = llama(**SIZES)
    one, eight = (planned(where, path, *SHAPE)[0] for where in ("1xA100-80", "8xA100-80"))
    weights = 4 * one["parameters"] / plan.GIB
    assert one["memory"]["weights"] == one["memory"]["reference"] == pytest.approx(weights)
    assert one["memory"]["optimiser, two moments"] == pytest.approx(2 * weights, rel=1e-3)
    for name, gib in eight["memory"].items():
        assert (
            name == "process"
            or gib * 8 == pytest.approx(one["memory"][name])
            or name == "gradients"
        )
    assert one["seconds"]["a step"] == pytest.approx(
        sum(s for name, s in one["seconds"].items() if name != "a step")
    )


def test_flops_are_those_of_six_times_the_parameters(llama):
    path = llama(**SIZES)
    found, vocabulary = (
        planned("1xA100-80", path, *SHAPE)[0],
        AutoConfig.from_pretrained(path).vocab_size,
    )
    body, tokens = found["parameters"] - 2 * vocabulary * 512, 8 * (128 + 64)
    passes = (
        3 + 4 * 3
    )  # forward twice for the scores, once for the change of log pi, and three forward equivalents an epoch
    assert found["flops"] == pytest.approx(passes * 2 * body * tokens, rel=0.25), (
        "attention and logits come on top"
    )


def test_adapters_save_moments_and_the_reference(llama):
    path = llama(**SIZES)
    without, with_it = (
        planned("1xA100-80", path, *SHAPE, *flags)[0]["memory"] for flags in ((), ("--lora_r", 8))
    )
    assert (
        with_it["optimiser, two moments"] < 0.2 * without["optimiser, two moments"]
        and with_it["reference"] == 0
    )


def test_what_does_not_fit_is_told_the_flags_with_which_it_does(llama):
    sizes = SIZES | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    path = llama(vocab_size=128256, **sizes | {"num_hidden_layers": 1})
    found, printed = planned("1xL4-24", path, *SHAPE)
    assert not found["fits"] and found["gib"] > 24 and "it does with --bf16" in printed
    again, _ = planned("1xL4-24", path, *SHAPE, *found["fits_with"])
    assert again["fits"]


@pytest.mark.parametrize(
    "where, said",
    [("8", "give a number"), ("0xcpu", "give a number"), ("2xB9000", "known: A100-40")],
)
def test_an_unknown_machine_is_refused(llama, where, said):
    code, printed = run(("--policy", llama(**SIZES), "--critic", "rule", "--plan", where))
    assert code == 2 and said in printed


def test_a_plan_needs_a_model(tmp_path):
    code, printed = run(("--output_dir", tmp_path / "ppo", "--plan", "1xA100-80"))
    assert code == 2 and "--policy" in printed


@pytest.mark.parametrize(
    "changed", [{}, {"lora_r": 8}, {"gradient_checkpointing": True}, {"bf16": True}]
)
def test_fake_tensors_take_what_real_ones_do(llama, tmp_path, changed):
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    path = llama(**sizes)
    flags = dict(
        max_prompt_length=24, response_length=16, kl_estimator="full", per_device_train_batch_size=4
    )
    args = argparse.Namespace(**one_step.PLAIN | flags | changed)
    config = AutoConfig.from_pretrained(path)
    expected = plan.fake_step(args, config, sharded=False)

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    actor = Policy(adapters.added(model, args)).eval()
    dist.shard(actor.model, recompute=args.gradient_checkpointing)
    for weights in filter(lambda weights: weights.requires_grad, actor.parameters()):
        weights.register_post_accumulate_grad_hook(lambda weights: setattr(weights, "grad", None))
    rows = (
        torch.zeros(4, 24, dtype=torch.long),
        torch.arange(24) >= torch.tensor([[0], [3], [9], [1]]),
    )  # padded, as rollouts are
    rollout = Rollout(*rows, rows[0][:, :16], rows[1][:, -16:], None, [""] * 4)
    batch = {
        name: torch.zeros(4, 16) for name in ("old_logprobs", "advantages", "old_values", "returns")
    } | {"mask": rollout.mask}
    with plan.Alive() as alive:
        loss, _, _ = train_ppo.microbatch_loss(actor, rollout, batch, torch.tensor(1), args)
        loss.backward()
    assert alive.peak == pytest.approx(expected.update_peak, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [(), ("--lora_r", 8), pytest.param(("--gradient_checkpointing",), marks=TOO_LOW)]
)
def test_memory_is_as_measured(llama, tokenizer, tmp_path, flags):
    """With blocks of 256 KiB and more given back when they are freed; glibc else keeps them, and more the longer it runs."""
    path = llama(**SIZES | {"num_hidden_layers": 6})
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    shape = "--num_ppo_epochs 1 --max_steps 1 --eval_samples 1 --max_prompt_length 70 --response_length 60".split()
    shape += [*flags, "--per_device_train_batch_size", 32, "--num_mini_batches", 2]
    where = ("--policy", path, "--output_dir", tmp_path / "ppo")
    command = [sys.executable, ROOT / "train_ppo.py", *where, "--critic", "rule", *shape]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads((tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()[-1])[
        "peak_memory_gib"
    ]
    assert planned("1xcpu", path, *shape)[0]["gib"] == pytest.approx(measured, rel=0.15)
