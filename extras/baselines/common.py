"""What the baselines share: flags, the start of a run, and sampling once before training."""

import random
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from t2g import cli, critics, policy, stages, tasks
from t2g.align import resolve, span_rewards, token_offsets
from t2g.feedback import Feedback
from t2g.metrics import token_counts
from t2g.policy import now
from t2g.rollout import sample


class Scored(NamedTuple):
    """A response with its feedback and its reward, both None if the critique is unreadable."""

    example: tasks.Example
    text: str
    finished: bool  # it ended with EOS
    feedback: Feedback | None
    reward: float | None  # the sum of delta_t over its tokens, less the penalty of a missing EOS


def parse(doc, name, add_own_flags, toy):
    """Parses the flags of the baseline called name; toy: its own defaults for the toy task."""
    parser = cli.parser(doc)
    add = cli.flags(parser)
    tasks.add_flags(add)
    critics.add_flags(add)
    add("--policy", None, "starting policy: run, folder, hub id or .gguf file; sft if not given")
    add("--output_dir", None, f"folder of the run; runs/TASK/{name} if not given")
    add_own_flags(add)
    task, args = tasks.parse(parser, name, toy=toy)
    args.output_dir = args.output_dir or f"runs/{task.NAME}/{name}"
    return task, args


def start(args, needs_critic=True):
    """Runs the missing earlier stages. Returns: the run's parent folder, tokenizer and policy."""
    root = Path(args.output_dir).parent
    needed = ["sft", *(critics.stages_before(args) if needs_critic else [])]
    stages.ensure(needed, args, root, args.policy)
    torch.manual_seed(args.seed)
    return root, *policy.load(args.policy or root / "sft", policy.device())


def add_sampling_flags(add, num_prompts, samples_per_prompt):
    add("--num_prompts", num_prompts, "number of prompts that the policy answers")
    add("--samples_per_prompt", samples_per_prompt, "responses to each prompt")
    add("--response_length", 64, "maximum tokens of a response")
    add("--temperature", 1.0, "sampling temperature")
    add("--missing_eos_penalty", 1.0, "penalty of a response without EOS", cli.between(0, 1e6))


def draw_examples(task, args, tokenizer) -> list[tasks.Example]:
    """Draws --num_prompts training examples, each --samples_per_prompt times, sorted by length."""
    train = tasks.short_enough(task.load(args)[0], tokenizer, args.max_prompt_length)
    drawn = random.Random(f"offline {args.seed}").choices(train, k=args.num_prompts)
    drawn.sort(key=lambda example: (len(example.prompt), example.prompt))
    return [example for example in drawn for _ in range(args.samples_per_prompt)]


def sample_and_score(examples, prompts, critic, tokenizer, model, args, desc="sampling", size=64):
    """Samples a response to each prompt, which the critic judges as a response to its example.

    Returns: a list of Scored, and metrics: seconds in total, and means over the responses.
    """
    rows, seconds, sums = [], {"seconds_rollout": 0.0, "seconds_critique": 0.0}, {}
    for start in tqdm(range(0, len(examples), size), desc=desc, unit="batch"):
        batch, batch_prompts = examples[start : start + size], prompts[start : start + size]
        clock = [now()]
        length = args.response_length
        rollout = sample(model, tokenizer, batch_prompts, length, args.temperature, bf16=args.bf16)
        clock.append(now())
        feedback = critic(batch, rollout.texts)
        clock.append(now())
        seconds["seconds_rollout"] += clock[1] - clock[0]
        seconds["seconds_critique"] += clock[2] - clock[1]
        for row, one in enumerate(feedback):
            text, finished = rollout.texts[row], bool(rollout.finished[row])
            reward = total_reward(tokenizer, rollout, row, one, args)
            rows.append(Scored(batch[row], text, finished, one, reward))
        counts = token_counts(tokenizer, rollout, feedback)
        own = tokenizer([example.prompt for example in batch], add_special_tokens=False)
        prompt_tokens = sum(len(ids) for ids in own["input_ids"]) / len(batch)
        counts["judged_tokens"] = prompt_tokens + counts["response_tokens"]  # the critic's input
        for name, mean in counts.items():
            sums[name] = sums.get(name, 0) + len(batch) * mean
    rewards = [row.reward for row in rows if row.reward is not None]
    if not rewards:
        cli.fail(f"none of {len(rows)} critiques is readable; see --critic and --reward_model")
    means = {name: total / len(rows) for name, total in sums.items()}
    means["unparsable"] = 1 - len(rewards) / len(rows)
    means["reward"] = sum(rewards) / len(rewards)
    return rows, {"samples": len(rows), **seconds, **means}


def in_words(feedback, args):
    """Returns the feedback, which must have critiques and not numbers."""
    if any(isinstance(one, float) for one in feedback):
        cli.fail(f"--critic {args.critic} gives numbers, but this method reads critiques in words")
    return feedback


def total_reward(tokenizer, rollout, row, feedback, args) -> float | None:
    """Returns the sum of delta over a response's tokens, less the penalty of a missing EOS.

    Feedback may be a float, the reward of the whole response.
    """
    if feedback is None:
        return None
    penalty = 0.0 if rollout.finished[row] else args.missing_eos_penalty
    if isinstance(feedback, float):
        return feedback - penalty
    offsets = token_offsets(tokenizer, rollout.ids(row))
    spans, _ = resolve(rollout.texts[row], feedback)
    return span_rewards(offsets, spans).sum().item() - penalty
