"""The speed parts of the GPU check: steps and sampling in bf16, with random weights.

Beside them stand the memory that extras.scale.plan expects, figures that other projects published,
and transformers' own `generate` and `generate_batch`, both with weights in bf16.
"""

from pathlib import Path

import torch
from torch.profiler import profile
from transformers import ContinuousBatchingConfig, GenerationConfig

from extras.scale import plan
from extras.speed.synthetic import Learner, generate, random_model, sentences, timed, train_args
from t2g import cpu
from t2g.policy import now
from t2g.rollout import encode_prompts, sample

PEAK = 989e12  # FLOP/s of an H100 in bf16, dense
UPDATE_ANCHOR = "prime-rl, 1 H100, Qwen3-0.6B, RL: 11,900, MFU 0.11"
STEP_ANCHOR = "verl, PPO, Qwen2.5-0.5B, 256 responses of 310 tokens: 67 s, generation 18.9 s of it"
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


def sizes(args):
    """Shapes, batches, new tokens of a response, and responses of a microbatch."""
    if args.rehearse:
        return ("tiny",), (4, 8), 8, 2
    return ("SmolLM2-135M", "Llama-1B"), (64, 256), 128, 16


def speed(args, report):
    """Steps of each shape at each batch, their peak memory beside the plan's, and a profile."""
    shapes, batches, new, microbatch = sizes(args)
    for shape in shapes:
        tokenizer, model = random_model(shape)
        folder, prompts = Path(args.out).resolve() / shape, sentences(max(batches))
        model.config.save_pretrained(folder)
        length = encode_prompts(tokenizer, prompts)[0].shape[1]
        flags = ["--bf16", "--policy", folder, "--max_prompt_length", length, "--num_ppo_epochs", 4]
        flags += ["--response_length", new, "--per_device_train_batch_size", microbatch]
        learner, peaks = Learner(cpu.use(model), train_args(*flags)), {}
        learner.step(tokenizer, prompts[: 2 * microbatch])  # warms up
        for rows in batches:
            name = f"{shape}, batch {rows}"
            peaks[name, rows] = one_step(name, learner, tokenizer, prompts[:rows], report)
        profile_step(shape, learner, tokenizer, prompts[: batches[0]], report)
        del learner, model
        for (name, rows), peak in peaks.items():
            split = ["--gradient_accumulation_steps", rows // microbatch // 2]
            planned_args = train_args(*flags, *split, "--eval_samples", rows)
            planned = plan.estimate(planned_args, 1, plan.GPUS["H100-80"])
            gib = planned["gib"] - planned["memory"]["process"]
            within = abs(gib / peak - 1) <= 0.15 if peak else None
            report(f"{name}: peak memory, GiB", peak, f"planned {gib:.2f}; within 15%", within)


def one_step(name, learner, tokenizer, prompts, report):
    """Reports seconds and tokens of a step. Returns its highest memory in GiB, None on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    rollout, seconds = learner.step(tokenizer, prompts)
    model, epochs = learner.actor.model, learner.args.num_ppo_epochs
    head = model.get_output_embeddings().weight.numel()
    body = sum(weights.numel() for weights in model.parameters()) - head
    sampled = int(rollout.mask.sum())
    read = epochs * (sampled + int(rollout.prompt_mask.sum()))
    mfu = 6 * (body * read + head * epochs * sampled) / seconds["update"] / PEAK
    report(f"{name}: rollout, tokens/s", sampled / seconds["rollout"])
    beside = f"MFU {mfu:.3f} of 989 TFLOP/s, prompts included; {UPDATE_ANCHOR}"
    report(f"{name}: update, tokens/s", read / seconds["update"], beside)
    for phase, spent in seconds.items():
        report(f"{name}: {phase}, s", spent)
    report(f"{name}: a step of {epochs} epochs, s", sum(seconds.values()), STEP_ANCHOR)
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def profile_step(shape, learner, tokenizer, prompts, report):
    """Prints the most expensive kernels of a short step, and reports how often sampling waits."""
    learner.args.num_ppo_epochs, new, model = 1, 32, learner.actor.model
    with profile() as sampling:
        rollout = sample(model, tokenizer, prompts, new, bf16=True)
        now()
    with profile() as learning:
        learner.learn(rollout)
    waits = [row.count for row in sampling.key_averages() if row.key in WAITS]
    report(f"{shape}: host synchronisations per sampled token of a batch", sum(waits) / new)
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    for phase, profiler in (("sampling", sampling), ("scores and an epoch", learning)):
        print(f"{shape}, {phase}")
        print(profiler.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=70))


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
            generate(model, tokenizer, sentences(rows), 4)  # warms up
            _, seconds = timed(generate, model, tokenizer, sentences(rows), new)
            report(f"{shape}, batch {rows}: generate, tokens/s", rows * new / seconds)
        for rows in batches:  # afterwards, because it changes the model's attention
            ids, how = tokenizer(sentences(rows))["input_ids"], ContinuousBatchingConfig(**cache)
            for _ in range(2):  # the first warms up
                work = dict(continuous_batching_config=how, persistent_manager=True)
                outputs, seconds = timed(model.generate_batch, ids, settings, **work)
            tokens = sum(len(output.generated_tokens) for output in outputs.values())
            beside, ok = f"{tokens} of {rows * new} tokens came", tokens == rows * new
            name = f"{shape}, batch {rows}: generate_batch, tokens/s"
            report(name, tokens / seconds, beside, ok)
            model.destroy_cached_continuous_batching_manager()
