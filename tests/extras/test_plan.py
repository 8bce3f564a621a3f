"""The plan of a run: its arithmetic, its advice, and its memory against what was measured."""

import os
from functools import cache
from pathlib import Path

import pytest
import torch
from forking import output, python, result_of
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import train_ppo
from extras.scale import passes, plan, recipe
from extras.speed.synthetic import random_rollout, train_args
from t2g import adapters, cpu, dist, policy
from t2g.policy import Policy

ROOT = Path(__file__).parents[2]
SMALL = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=2)
SMALL |= dict(num_attention_heads=8, num_key_value_heads=4)
PRINT_PEAK = """
import importlib, sys
from t2g.log import peak_memory_gib
sys.argv = sys.argv[1:]
importlib.import_module(sys.argv[0].removesuffix(".py")).main()
print(peak_memory_gib())
"""
STEP = "--num_ppo_epochs 4 --per_device_train_batch_size 4 --num_mini_batches 2"
TINY = SMALL | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1)
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


def planned(machine, *words):
    """The JSON object that the command prints, and its output."""
    printed = output(f"extras.scale.plan {machine}", *words)
    return result_of(printed), printed


def planned_ppo(machine, model, *flags):
    """The plan of train_ppo.py with the rule as its critic."""
    return planned(machine, "--critic", "rule", "--policy", model, *flags)


def test_weights_and_moments_are_counted_and_sharded_and_lora_saves_moments(llama):
    runs = [("1xA100-80",), ("8xA100-80",), ("1xA100-80", "--lora_r", 8)]
    plans = [planned_ppo(name, llama(**SMALL), *STEP, *flags)[0] for name, *flags in runs]
    one, eight, lora = plans
    weights = 4 * one["parameters"] / plan.GIB
    assert one["memory"]["weights"] == one["memory"]["reference"] == pytest.approx(weights)
    assert one["memory"]["optimiser's moments"] == pytest.approx(2 * weights, rel=1e-3)
    for name in ("weights", "reference", "optimiser's moments"):
        assert eight["memory"][name] * 8 == pytest.approx(one["memory"][name])
    parts = [hours for name, hours in one["hours"].items() if name != "all"]
    assert one["hours"]["all"] == pytest.approx(sum(parts)) and len(parts) == 3
    lora, moments = lora["memory"], "optimiser's moments"
    assert lora[moments] < 0.2 * one["memory"][moments] and "reference" not in lora


def test_flops_are_two_a_weight_and_token_forward_and_six_in_an_epoch(llama):
    path = llama(**SMALL)
    found, printed = planned_ppo("1xcpu", path, *STEP, "--max_steps", 5)
    body = found["parameters"] - 2 * AutoConfig.from_pretrained(path).vocab_size * 512
    passes = 4 + 4 * 3  # rollout, two for the scores, one for the change of log pi; three an epoch
    flops = 5 * passes * 2 * body * 8 * (128 + 64)
    assert 1 < found["flops"] / flops < 1.12, "attention and logits come on top"
    assert f"the run costs {found['flops']:.1e} FLOP" in printed
    assert found["hours"] == {} and "hours\n" not in printed, "a CPU's speed is not known"


TRAINED = {
    "train_sft.py": "--model", "train_rm.py": "--model", "extras.baselines.scalar_rm": "--model",
    "extras.baselines.dpo": "--policy", "extras.baselines.ilf": "--policy",
    "extras.baselines.sdpo": "--policy",
}  # fmt: skip
SAMPLED = {
    "annotate.py": ("--policy",), "eval.py": ("policy",), "extras.baselines.reflection": (),
    "extras.benchmarks.text": (), "extras.benchmarks.code": ("--allow_code_execution",),
}  # fmt: skip


@pytest.mark.parametrize("script", TRAINED)
def test_a_stage_that_trains_shards_its_weights(llama, script):
    words = [script, TRAINED[script], llama(**TINY), "--max_steps", 10]
    one, eight = (planned(name, *words)[0] for name in ("1xA100-80", "8xA100-80"))
    assert eight["memory"]["weights"] * 8 == pytest.approx(one["memory"]["weights"])
    assert one["hours"]["update"] == pytest.approx(eight["hours"]["update"], rel=0.01)
    assert one["peak"]["update"] > 0


@pytest.mark.parametrize("script", SAMPLED)
def test_a_stage_that_samples_shares_out_its_prompts(llama, script):
    words = [script, *SAMPLED[script], llama(**TINY)]
    one, eight = (planned(name, *words)[0] for name in ("1xA100-80", "8xA100-80"))
    assert eight["memory"]["weights"] == one["memory"]["weights"]
    assert one["hours"]["rollout"] > 2 * eight["hours"]["rollout"] > 0


def test_few_layers_measure_many(llama):
    config = AutoConfig.from_pretrained(llama(**TINY | {"num_hidden_layers": 9}))
    args = train_args("--lora_r", 8, "--gradient_checkpointing", "--bf16")
    options = (args, "ppo", (2, 24, 16), True, False, False)
    few, all_layers = passes.measure_few_layers(config, *options), passes.run(config, *options)
    assert vars(few) == pytest.approx(vars(all_layers), rel=0.01)


def test_the_gradient_of_a_large_embedding_does_not_hide_the_activations(llama):
    sizes = TINY | {"num_hidden_layers": 24, "tie_word_embeddings": True}
    config = AutoConfig.from_pretrained(llama(50000, **sizes))
    options = (config, train_args(), "ppo", (4, 100, 4), False, False, False)
    few, all_layers = passes.measure_few_layers(*options), passes.run(*options)
    assert passes.measure(*options).update == all_layers.backward > 1.5 * few.backward


def test_bf16_is_planned_alike_with_and_without_a_gpu(llama, monkeypatch):
    config = AutoConfig.from_pretrained(llama(**TINY))
    shape, peaks = (2, 24, 16), []
    for device, flags in (("cpu", ()), ("cpu", ("--bf16",)), ("cuda", ("--bf16",))):
        monkeypatch.setattr(policy, "device", lambda device=device: device)
        passes.measured.clear()
        peaks.append(passes.measure(config, train_args(*flags), "ppo", shape).update)
    assert peaks[1] == peaks[2] != peaks[0]


def test_a_run_that_does_not_fit_gets_the_flags_with_which_it_does(llama):
    wide = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=1)
    path = llama(vocab_size=128256, **wide, num_attention_heads=32, num_key_value_heads=8)
    found, printed = planned_ppo("1xL4-24", path, *STEP)
    assert not found["fits"] and found["gib"] > 24 and "it does with --bf16" in printed
    again, _ = planned_ppo("1xL4-24", path, *STEP, *found["fits_with"])
    assert again["fits"]


FLAGS = [(), ("--lora_r", 8), ("--gradient_checkpointing",), ("--bf16",)]
MEASURED = [("train_ppo.py", flags) for flags in FLAGS]
MEASURED += [("train_sft.py", flags) for flags in FLAGS[::2]]


@pytest.mark.parametrize("flags", FLAGS)
def test_fake_tensors_need_as_much_memory_as_real_ones(llama, monkeypatch, flags):
    monkeypatch.setattr(cpu, "emulates_bf16", lambda: False)  # on any CPU
    sizes = SMALL | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    config = AutoConfig.from_pretrained(llama(**sizes))
    step = "--max_prompt_length 24 --response_length 16 --per_device_train_batch_size 4".split()
    args = train_args(*step, *flags)
    expected = passes.measure(config, args, "ppo", (4, 24, 16))

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    actor = Policy(adapters.added(model, args)).eval()
    dist.shard(actor.model, recompute=args.gradient_checkpointing)
    for weights in filter(lambda weights: weights.requires_grad, actor.parameters()):
        weights.register_post_accumulate_grad_hook(lambda weights: setattr(weights, "grad", None))
    rollout = random_rollout(4, 24, 16, config.vocab_size)
    names = ("old_logprobs", "advantages", "old_values", "returns")
    batch = {name: torch.zeros(4, 16) for name in names} | {"mask": rollout.mask}
    with passes.Alive() as alive:
        train_ppo.microbatch_loss(actor, rollout, batch, torch.tensor(1), args)[0].backward()
    assert alive.peak == pytest.approx(expected.update, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "flags"), MEASURED)
def test_memory_is_as_measured(llama, tokenizer, tmp_path, script, flags):
    """With blocks of 256 KiB and more returned to the system, which glibc keeps otherwise."""
    path = llama(**SMALL | {"num_hidden_layers": 6})
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    step = ["--max_steps", "2", "--per_device_train_batch_size", "32", *flags]
    if script == "train_ppo.py":
        step += "--num_ppo_epochs 1 --eval_samples 1 --num_mini_batches 2 --critic rule".split()
        step += ["--max_prompt_length", "70", "--response_length", "60", "--policy", path]
    else:
        step += ["--max_length", "84", "--optimizer", "adamw", "--model", path]
    how = dict(cwd=ROOT, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"})
    printed = python("-c", PRINT_PEAK, script, *step, "--output_dir", tmp_path / "run", **how)
    measured = float(printed.splitlines()[-1])
    assert planned("1xcpu", script, *step)[0]["gib"] == pytest.approx(measured, rel=0.15)


# ---- recipes -------------------------------------------------------------------------------------
RECIPE = '''
title = "A table"
metrics = ["good"]
main = "good"
main_title = "good answers"
curves = []
measure = "eval.py policy {out} {data}"
[words]
data = "--task summarize --data posts.jsonl --bf16"
to = "--output_dir {out}"
[stages.sft]
run = "{gpus} train_sft.py {data} --model MODEL --max_steps 100 {to}"
[stages.annotations]
needs = ["sft"]
run = """annotate.py {data} --policy {root}/sft --num_samples 1000 --max_prompt_length 100
  --response_length 50 --model gpt-4o --input_price 2 --output_price 10
  --out {root}/annotations.jsonl"""
[stages.rm]
needs = ["annotations"]
run = "{gpus} train_rm.py {data} --max_steps 100 {to}"
[rows.a]
title = "A"
needs = ["sft", "rm"]
run = "{gpus} train_ppo.py {data} {to}"
'''


def planned_recipe(name, machine, folder):
    """The commands of one seed of a recipe, by job, and the rest of its plan."""
    flags = f"--plan {machine} --seeds 0 --output_dir {folder}/out"
    result = result_of(output(f"extras.reproduce --recipe {name} {flags}"))
    return result.pop("commands"), result


@pytest.mark.parametrize("gpus", ["torchrun --nproc_per_node 8", ""])
def test_a_recipe_is_planned_by_its_commands(llama, tmp_path, gpus):
    wide = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=2)
    model = llama(vocab_size=128256, **wide, num_attention_heads=32, num_key_value_heads=8)
    path = tmp_path / "recipe.toml"
    text = RECIPE.replace("MODEL", str(model)).replace("{gpus}", gpus)
    path.write_text(text)
    commands, totals = planned_recipe(path, "8xL4-24", tmp_path)
    scripts = ["train_sft.py", "annotate.py", "train_rm.py", "train_ppo.py", "eval.py"]
    assert [line["script"] for line in commands] == scripts
    assert not (tmp_path / "out").exists(), "nothing runs"
    read, written = 100 + 50 + recipe.INSTRUCTIONS, recipe.ANSWER
    assert totals["bill"] == pytest.approx((2 * read + 10 * written) / 1000)
    hours = sum(line["processes"] * line["hours"] for line in commands)
    assert totals["gpu_hours"] == pytest.approx(hours) and hours > 0
    sft, rm = commands[0]["verdict"], commands[2]["verdict"]
    assert (sft, rm) == ("fits", "fits") if gpus else "torchrun --nproc_per_node 8" in sft and rm


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slf5k_8b", "kodcode_8b", "ultrafeedback_8b"])
def test_the_recipes_of_8b_fit_on_eight_gpus_of_80_gb(tmp_path, name):
    commands, totals = planned_recipe(name, "8xH100-80", tmp_path)
    assert {line["verdict"] for line in commands} <= {"fits", "not planned: it needs no GPU"}
    assert totals["gpu_hours"] > 10 and totals["bill"] > 10
