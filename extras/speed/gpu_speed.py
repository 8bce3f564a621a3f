"""The speed parts of the GPU proof: sampling, scoring and updating in bf16, with random weights.

Beside them stand transformers' own `generate` and `generate_batch`, both in their best form (weights
in bf16), the memory that extras.scale.plan foresees, and figures that other projects published.
"""

import copy
from pathlib import Path

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from extras.scale import plan
from extras.speed.given import (
    Learner,
    generate_seconds,
    made_up,
    profiled,
    random_model,
    sentences,
    train_flags,
)
from t2g.policy import now
from t2g.rollout import encode_prompts, sample

PEAK = 989e12  # FLOP/s of an H100 in bf16, dense
ANCHOR = "prime-rl, 1 H100, Qwen3-0.6B, RL: 11,900, MFU 0.11"
STEP_ANCHOR = (
    "verl, PPO, Qwen2.5-0.5B, 256 responses of 310 tokens: 67 s, of which generation 18.9 s"
)


def shapes(args) -> list[str]:
    return ["tiny"] if args.rehearse else ["SmolLM2-135M", "Llama-1B"]


def sizes(args):
    """Batches, new tokens of a response, and responses of a microbatch."""
    return ((4, 8), 8, 2) if args.rehearse else ((64, 256), 128, 16)


def speed(args, report):
    for shape in shapes(args):
        speed_of(shape, args, lambda what, *rest, name=shape: report(f"{name}, {what}", *rest))


def speed_of(shape, args, report):
    batches, new, microbatch = sizes(args)
    tokenizer, model = random_model(shape)
    folder = Path(args.out).resolve() / shape
    model.config.save_pretrained(folder)
    prompts = sentences(max(batches))
    length = encode_prompts(tokenizer, prompts)[0].shape[1]

    def flags_of(rows):
        batch = ["--per_device_train_batch_size", microbatch, "--num_mini_batches", 2]
        batch += ["--gradient_accumulation_steps", rows // microbatch // 2]
        tokens = ["--max_prompt_length", length, "--response_length", new]
        where = ["--policy", folder, "--eval_samples", rows]
        return train_flags("--bf16", "--num_ppo_epochs", 4, *batch, *tokens, *where)

    learner, peaks = Learner(model, flags_of(batches[0])), {}
    sample(model, tokenizer, prompts[:microbatch], 4, bf16=True)  # warms up
    learner.learn(made_up(2 * microbatch, length, new, model.config.vocab_size))
    for rows in batches:
        learner.args = flags_of(rows)
        peaks[rows] = one_step(learner, tokenizer, prompts[:rows], report)
    kernels(learner, tokenizer, prompts[: batches[0]], report)
    learner.optimizer = learner.reference = None
    generate(model, tokenizer, prompts, args, report)
    for rows, peak in peaks.items():
        planned = plan.estimate(flags_of(rows), 1, plan.MACHINES["H100-80"])
        gib = planned["gib"] - planned["memory"]["process"]
        within = abs(gib / peak - 1) <= 0.15 if peak else None
        report(f"peak memory, batch {rows}, GiB", peak, f"planned: {gib:.2f}, within 15%", within)


def one_step(learner, tokenizer, prompts, report):
    """Seconds and tokens of a rollout and of its update. Returns the highest memory, in GiB."""
    rows, flags, model = len(prompts), learner.args, learner.actor.model
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = now()
    rollout = sample(model, tokenizer, prompts, flags.response_length, bf16=True)
    seconds = {"rollout": now() - start} | learner.learn(rollout)
    sampled, prompt = int(rollout.mask.sum()), int(rollout.prompt_mask.sum())
    report(f"rollout, batch {rows}, tokens/s", sampled / seconds["rollout"])
    head = model.get_output_embeddings().weight.numel()
    body = sum(weights.numel() for weights in model.parameters()) - head
    read = flags.num_ppo_epochs * (sampled + prompt)
    flops = 6 * (body * read + head * flags.num_ppo_epochs * sampled)
    mfu = flops / seconds["update"] / PEAK
    speed = f"MFU {mfu:.3f} of 989 TFLOP/s, prompts included; {ANCHOR}"
    report(f"update, batch {rows}, tokens/s", read / seconds["update"], speed)
    for phase, spent in seconds.items():
        report(f"{phase}, batch {rows}, seconds", spent)
    total = sum(seconds.values())
    report(f"a step, batch {rows}, {flags.num_ppo_epochs} epochs, seconds", total, STEP_ANCHOR)
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def kernels(learner, tokenizer, prompts, report):
    """The ten dearest kernels of a short rollout and one epoch, and what sampling waits for."""
    learner.args.num_ppo_epochs, new, model = 1, 32, learner.actor.model
    seconds, waits = profiled(lambda: sample(model, tokenizer, prompts, new, bf16=True))
    report("host synchronisations per sampled token of a batch", waits / new)
    vocabulary, length = model.config.vocab_size, learner.args.max_prompt_length
    rollout = made_up(len(prompts), length, learner.args.response_length, vocabulary)
    for part, found in (
        (f"sampling {new} tokens", seconds),
        ("scores and one epoch", profiled(lambda: learner.learn(rollout))[0]),
    ):
        total = sum(found.values())
        for name, spent in list(found.items())[:10]:
            report(f"{part}: {name[:70]}", spent, f"seconds, {spent / total:.1%} of {total:.3g}")


def generate(model, tokenizer, prompts, args, report):
    """Tokens a second of transformers' generate, on weights in bf16."""
    batches, new, _ = sizes(args)
    plain = copy.deepcopy(model).to(torch.bfloat16)
    for rows in batches:
        generate_seconds(plain, tokenizer, prompts[:rows], 4)  # warms up
        seconds = generate_seconds(plain, tokenizer, prompts[:rows], new)
        report(f"transformers' generate, batch {rows}, tokens/s", rows * new / seconds)


def continuous(args, report):
    """Tokens a second of transformers' continuous batching, on weights in bf16."""
    batches, new, _ = sizes(args)
    small = dict(num_blocks=64, max_batch_tokens=64) if args.rehearse else {}
    for shape in shapes(args):
        tokenizer, model = random_model(shape)
        model = model.to(torch.bfloat16)
        settings = dict(do_sample=True, max_new_tokens=new, eos_token_id=-1)
        settings = GenerationConfig(**settings, pad_token_id=tokenizer.pad_token_id)
        for rows in batches:
            ids = [tokenizer(text)["input_ids"] for text in sentences(rows)]
            cache = ContinuousBatchingConfig(**small)
            for _ in range(2):  # the first warms up
                start = now()
                found = model.generate_batch(ids, settings, cache, persistent_manager=True)
                seconds = now() - start
            tokens = sum(len(output.generated_tokens) for output in found.values())
            whole = f"{tokens} of {rows * new} tokens came"
            what = f"generate_batch, {shape}, batch {rows}, tokens/s"
            report(what, tokens / seconds, whole, tokens == rows * new)
            model.destroy_cached_continuous_batching_manager()
