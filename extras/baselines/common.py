"""What the baselines share: flags, the start of a run, and responses with their rewards."""

import random
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from t2g import cli, critics, dist, policy, stages, tasks, torchrun
from t2g.align import resolve, response_text, span_rewards, token_offsets
from t2g.feedback import Feedback, revision_prompt
from t2g.metrics import token_counts
from t2g.policy import now
from t2g.rewards import token_rewards
from t2g.rollout import sample
from t2g.run import sampling


class Scored(NamedTuple):
    """A response with its feedback and its reward, both None if the critique is unreadable."""

    example: tasks.Example
    text: str
    finished: bool  # it ended with EOS
    feedback: Feedback | float | None
    reward: float | None  # the sum of delta_t over its tokens, less the penalty of a missing EOS


def parse(doc, name, add_own_flags, toy):
    """Parses the flags of the baseline called name; toy: its own defaults for the toy task."""
    parser = cli.parser(doc)
    add = cli.flags(parser)
    tasks.add_flags(add)
    critics.add_flags(add)
    add("--policy", None, "starting run, folder, hub id or .gguf file; sft beside the run if none")
    add("--output_dir", None, f"folder of the run; runs/TASK/{name} if not given")
    add_own_flags(add)
    task, args = tasks.parse(parser, name, toy=toy)
    args.output_dir = args.output_dir or f"runs/{task.NAME}/{name}"
    args.span_weights, args.kl_estimator = "uniform", "full"  # flags of train_ppo.py alone
    return task, args


@contextmanager
def started(args, needs_critic=True, empty=False):
    """Runs the missing earlier stages, and joins the processes of torchrun.

    Yields: the folder of all runs, and the tokenizer and the model of the starting policy; if empty
    is True, the weights are left to dist.shard, as in policy.load.
    """
    root = Path(args.output_dir).parent
    needed = ["sft", *(critics.stages_before(args) if needs_critic else [])]
    earlier = partial(stages.ensure, needed, args, root, args.policy)
    with torchrun.session(args.cpu_offload, run_first=earlier):
        yield root, *policy.load(args.policy or root / "sft", policy.device(), empty)


def add_sampling_flags(add, num_prompts, samples_per_prompt):
    add("--num_prompts", num_prompts, "number of prompts that the policy answers")
    add("--samples_per_prompt", samples_per_prompt, "responses to each prompt")
    add("--response_length", 64, "maximum tokens of a response")
    add("--temperature", 1.0, "sampling temperature")
    add("--missing_eos_penalty", 1.0, "penalty of a response without EOS", cli.between(0, 1e6))


def draw_examples(task, args, tokenizer, model) -> list[tasks.Example]:
    """Draws --num_prompts training examples, each --samples_per_prompt times, sorted by length.

    An example is drawn more than once only if there are fewer than --num_prompts.
    """
    train = tasks.short_enough(tasks.load(task, args)[0], tokenizer, model, args)
    rng = random.Random(f"offline {args.seed}")
    draw = rng.sample if args.num_prompts <= len(train) else rng.choices
    drawn = draw(train, k=args.num_prompts)
    drawn.sort(key=lambda example: (len(example.prompt), example.prompt))
    return [example for example in drawn for _ in range(args.samples_per_prompt)]


def sample_and_score(examples, critic, tokenizer, model, args, prompts=None, size=64):
    """Samples a response for each example, and has the critic judge it. Collective.

    prompts: what the policy reads instead of the examples' own prompts, which the critic reads.
    All ranks have all examples, and each samples for a part of them.

    Returns: a list of Scored, and metrics: seconds in total, and means over the responses.
    """
    count, examples = len(examples), dist.share(examples)
    own = [example.prompt for example in examples]
    prompts = dist.share(prompts) if prompts else own
    rows, seconds, sums = [], dict(seconds_rollout=0.0, seconds_critique=0.0), defaultdict(float)
    for first in tqdm(range(0, len(examples), size), desc="sampling", unit="batch"):
        part = slice(first, first + size)
        clock = [now()]
        rollout = sample(model, tokenizer, prompts[part], **sampling(args))
        clock.append(now())
        feedback = critic(examples[part], rollout.texts)
        clock.append(now())
        seconds["seconds_rollout"] += clock[1] - clock[0]
        seconds["seconds_critique"] += clock[2] - clock[1]
        rewards = total_rewards(tokenizer, rollout, feedback, args)
        columns = examples[part], rollout.texts, rollout.finished.tolist(), feedback, rewards
        rows += map(Scored, *columns)
        means = token_counts(tokenizer, rollout, feedback)
        read = tokenizer(own[part], add_special_tokens=False)["input_ids"]
        means["judged_tokens"] = sum(map(len, read)) / len(read) + means["response_tokens"]
        for name, mean in means.items():
            sums[name] += len(read) * mean
    rows = dist.collect(rows, count)
    rewards = [row.reward for row in rows if row.reward is not None]
    if not rewards:
        cli.fail(f"none of {len(rows)} critiques is readable; see --critic and --reward_model")
    means = dist.means({name: total / len(examples) for name, total in sums.items()})
    means |= dict(unparsable=1 - len(rewards) / len(rows), reward=sum(rewards) / len(rewards))
    return rows, {"samples": len(rows), **seconds, **means}


def total_rewards(tokenizer, rollout, feedback, args) -> list[float | None]:
    """Returns the sum of delta over each response, less the penalty of a missing EOS."""
    delta, _ = token_rewards(tokenizer, rollout, feedback, args)
    penalty = args.missing_eos_penalty * (~rollout.finished).double()
    totals = (delta.double().sum(1) - penalty).tolist()
    return [None if one is None else total for one, total in zip(feedback, totals)]


def text_reward(tokenizer, text, feedback) -> float:
    """Returns the sum of delta over the tokens of a text, which need not be a sampled one.

    An unreadable critique counts as 0; a number from the critic is returned as it is.
    """
    if not isinstance(feedback, Feedback):
        return feedback or 0.0
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spans, _ = resolve(response_text(tokenizer, ids), feedback)
    return span_rewards(token_offsets(tokenizer, ids), spans).sum().item()


def fitting_revision(model, tokenizer, prompt, response, feedback, length) -> str | None:
    """Returns revision_prompt(), its prompt shortened to leave room for `length` new tokens.

    Returns None if there is no readable feedback, or if the text does not fit even so.
    """
    if feedback is None:
        return None
    if isinstance(feedback, float):
        cli.fail("the --critic gives numbers, but this method reads critiques in words")
    room = policy.context_length(model) - length
    question = partial(revision_prompt, feedback=feedback)
    text = critics.fitting_prompt(tokenizer, prompt, response, room, question)
    return text if critics.token_count(tokenizer, text) <= room else None
