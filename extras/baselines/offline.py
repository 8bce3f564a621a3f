"""What methods start from that sample once and then train: a policy's responses, what a critic says of them, their rewards."""

import random
from typing import NamedTuple

from tqdm import tqdm

from t2g import cli, critics, tasks
from t2g.align import resolve, span_rewards, token_offsets
from t2g.feedback import Feedback
from t2g.metrics import token_counts
from t2g.policy import now
from t2g.rollout import sample


class Scored(NamedTuple):
    """A response, what the critic says of it, and that as one number."""

    example: tasks.Example
    text: str
    finished: bool  # it ended by itself
    feedback: Feedback | None  # None where the critique is unreadable
    reward: float | None  # sum over the response's tokens of delta_t, less what a missing EOS costs


def add_flags(add, num_prompts, samples_per_prompt):
    add(
        "--policy",
        help="the starting policy: a run, a folder, a hub id or a .gguf file; sft beside --output_dir if not given",
    )
    critics.add_flags(add)
    add(
        "--num_prompts",
        type=cli.positive(int),
        default=num_prompts,
        help="prompts that the policy is sampled on",
    )
    add(
        "--samples_per_prompt",
        type=cli.positive(int),
        default=samples_per_prompt,
        help="responses to each of them",
    )
    add("--response_length", type=cli.positive(int), default=64, help="most tokens of a response")
    add("--temperature", type=cli.positive(float), default=1.0, help="of sampling")
    add(
        "--missing_eos_penalty",
        type=cli.between(0, 1e6),
        default=1.0,
        help="taken from a response that does not end",
    )


def prompts_of(task, args, tokenizer) -> list[tasks.Example]:
    """--num_prompts training examples, by chance, each as often as it is to be answered; like lengths together."""
    train = tasks.short_enough(task.load(args)[0], tokenizer, args.max_prompt_length)
    chosen = random.Random(f"offline {args.seed}").choices(train, k=args.num_prompts)
    chosen.sort(key=lambda example: (len(example.prompt), example.prompt))
    return [example for example in chosen for _ in range(args.samples_per_prompt)]


def scored(
    examples, prompts, critic, tokenizer, model, args, desc="sampling", batch_size=64
) -> tuple[list[Scored], dict]:
    """A response to each prompt, criticised as one to its example; and the metrics of this."""
    rows, stats = [], []
    for start in tqdm(range(0, len(examples), batch_size), desc=desc, unit="batch"):
        some, clock = examples[start : start + batch_size], [now()]
        rollout = sample(
            model,
            tokenizer,
            prompts[start : start + batch_size],
            args.response_length,
            args.temperature,
            bf16=args.bf16,
        )
        clock.append(now())
        feedback = critic(some, rollout.texts)
        clock.append(now())
        rewards = [total(tokenizer, rollout, row, said, args) for row, said in enumerate(feedback)]
        rows += map(Scored, some, rollout.texts, rollout.finished.tolist(), feedback, rewards)
        counts = token_counts(tokenizer, rollout, feedback)
        own = tokenizer([example.prompt for example in some], add_special_tokens=False)["input_ids"]
        counts["judged_tokens"] = (
            sum(map(len, own)) / len(some) + counts["response_tokens"]
        )  # what the critic reads
        stats.append(
            (
                len(some),
                {"seconds_rollout": clock[1] - clock[0], "seconds_critique": clock[2] - clock[1]},
                counts,
            )
        )
    seconds = {name: sum(part[name] for _, part, _ in stats) for name in stats[0][1]}
    means = {name: sum(n * part[name] for n, _, part in stats) / len(rows) for name in stats[0][2]}
    readable = [row.reward for row in rows if row.reward is not None]
    if not readable:
        cli.fail(
            f"none of {len(rows)} critiques can be read, so there is nothing to learn from; see --critic and --reward_model"
        )
    return rows, {"samples": len(rows)} | seconds | means | {
        "unparsable": 1 - len(readable) / len(rows),
        "reward": sum(readable) / len(readable),
    }


def total(tokenizer, rollout, row, said, args) -> float | None:
    """The sum of delta over a response's tokens, or the number that a scalar critic says; a missing EOS costs as in PPO."""
    if said is None:
        return None
    penalty = 0.0 if rollout.finished[row] else args.missing_eos_penalty
    if isinstance(said, float):
        return said - penalty
    offsets = token_offsets(tokenizer, rollout.response[row][rollout.mask[row]].tolist())
    return span_rewards(offsets, resolve(rollout.texts[row], said)[0]).sum().item() - penalty
