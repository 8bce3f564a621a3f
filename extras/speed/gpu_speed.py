"""The speed parts of the GPU proof: sampling, scoring and updating in bf16, with random weights.

Beside them stand the memory that extras.scale.plan foresees, figures that other projects published,
and transformers' own `generate` and `generate_batch`, both with weights in bf16.
"""

from pathlib import Path

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from extras.scale import plan
from extras.speed import given
from extras.speed.given import random_model, sentences, train_flags
from t2g import cpu
from t2g.policy import now
from t2g.rollout import encode_prompts, sample

PEAK = 989e12  # FLOP/s of an H100 in bf16, dense
UPDATE_ANCHOR = "prime-rl, 1 H100, Qwen3-0.6B, RL: 11,900, MFU 0.11"
STEP_ANCHOR = "verl, PPO, Qwen2.5-0.5B, 256 responses of 310 tokens: 67 s, generation 18.9 s of it"


def sizes(args):
    """Shapes, batches, new tokens of a response, and responses of a microbatch."""
    if args.rehearse:
        return ("tiny",), (4, 8), 8, 2
    return ("SmolLM2-135M", "Llama-1B"), (64, 256), 128, 16


def speed(args, report):
    """A step of each shape at each batch, its kernels, and its memory beside the plan's."""
    shapes, batches, new, microbatch = sizes(args)
    for shape in shapes:
        tokenizer, model = random_model(shape)
        folder = Path(args.out).resolve() / shape
        model.config.save_pretrained(folder)
        prompts = sentences(max(batches))
        length = encode_prompts(tokenizer, prompts)[0].shape[1]
        flags = ["--bf16", "--policy", folder, "--max_prompt_length", length, "--num_ppo_epochs", 4]
        flags += ["--response_length", new, "--per_device_train_batch_size", microbatch]
        learner, peaks = given.Learner(cpu.use(model), train_flags(*flags)), {}
        sample(model, tokenizer, prompts[:microbatch], 4, bf16=True)  # warms up
        learner.learn(given.made_up(2 * microbatch, length, new, model.config.vocab_size))
        for rows in batches:
            peaks[rows] = one_step(shape, learner, tokenizer, prompts[:rows], report)
        kernels(shape, learner, tokenizer, prompts[: batches[0]], report)
        del learner, model
        for rows, peak in peaks.items():
            split = ["--gradient_accumulation_steps", rows // microbatch // 2]
            planned_flags = train_flags(*flags, *split, "--eval_samples", rows)
            planned = plan.estimate(planned_flags, 1, plan.GPUS["H100-80"])
            gib = planned["gib"] - planned["memory"]["process"]
            within = abs(gib / peak - 1) <= 0.15 if peak else None
            what = f"{shape}, batch {rows}: peak memory, GiB"
            report(what, peak, f"planned {gib:.2f}; within 15%", within)


def one_step(shape, learner, tokenizer, prompts, report):
    """Seconds and tokens of a rollout and of its update. Returns the highest memory, in GiB."""
    rows, flags, model = len(prompts), learner.args, learner.actor.model
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = now()
    rollout = sample(model, tokenizer, prompts, flags.response_length, bf16=True)
    seconds = {"rollout": now() - start} | learner.learn(rollout)
    head = model.get_output_embeddings().weight.numel()
    body = sum(weights.numel() for weights in model.parameters()) - head
    sampled, epochs = int(rollout.mask.sum()), flags.num_ppo_epochs
    read = epochs * (sampled + int(rollout.prompt_mask.sum()))
    mfu = 6 * (body * read + head * epochs * sampled) / seconds["update"] / PEAK
    name = f"{shape}, batch {rows}"
    report(f"{name}: rollout, tokens/s", sampled / seconds["rollout"])
    beside = f"MFU {mfu:.3f} of 989 TFLOP/s, prompts included; {UPDATE_ANCHOR}"
    report(f"{name}: update, tokens/s", read / seconds["update"], beside)
    for phase, spent in seconds.items():
        report(f"{name}: {phase}, s", spent)
    report(f"{name}: a step of {epochs} epochs, s", sum(seconds.values()), STEP_ANCHOR)
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def kernels(shape, learner, tokenizer, prompts, report):
    """The ten dearest kernels of a short rollout and of one epoch, and what sampling waits for."""
    learner.args.num_ppo_epochs, new, model = 1, 32, learner.actor.model
    sampling, waits = given.profiled(lambda: sample(model, tokenizer, prompts, new, bf16=True))
    report(f"{shape}: host synchronisations per sampled token of a batch", waits / new)
    length, tokens = learner.args.max_prompt_length, learner.args.response_length
    rollout = given.made_up(len(prompts), length, tokens, model.config.vocab_size)
    learning, _ = given.profiled(lambda: learner.learn(rollout))
    for part, seconds in (("sampling", sampling), ("scores and an epoch", learning)):
        total = sum(seconds.values())
        for name, spent in list(seconds.items())[:10]:
            report(f"{shape}, {part}: {name[:70]}", spent, f"s, {spent / total:.1%} of {total:.3g}")


def peers(args, report):
    """Tokens a second of transformers' generate and of its continuous batching."""
    shapes, batches, new, _ = sizes(args)
    cache = dict(num_blocks=64, max_batch_tokens=64) if args.rehearse else {}
    for shape in shapes:
        tokenizer, model = random_model(shape)
        model.to(torch.bfloat16)
        settings = dict(do_sample=True, max_new_tokens=new, eos_token_id=-1)
        settings = GenerationConfig(**settings, pad_token_id=tokenizer.pad_token_id)
        for rows in batches:
            name, prompts = f"{shape}, batch {rows}", sentences(rows)
            given.generate_seconds(model, tokenizer, prompts, 4)  # warms up
            seconds = given.generate_seconds(model, tokenizer, prompts, new)
            report(f"{name}: generate, tokens/s", rows * new / seconds)
        for rows in batches:  # afterwards, for it changes the model's attention
            ids, how = tokenizer(sentences(rows))["input_ids"], ContinuousBatchingConfig(**cache)
            for _ in range(2):  # the first warms up
                start = now()
                found = model.generate_batch(ids, settings, how, persistent_manager=True)
                seconds = now() - start
            tokens = sum(len(output.generated_tokens) for output in found.values())
            name, whole = f"{shape}, batch {rows}", f"{tokens} of {rows * new} tokens came"
            ok = tokens == rows * new
            report(f"{name}: generate_batch, tokens/s", tokens / seconds, whole, ok)
            model.destroy_cached_continuous_batching_manager()
