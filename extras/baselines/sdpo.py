"""Baseline: self-distillation from feedback (SDPO). Rollout -> critique -> the policy that has read it -> distil it into itself.

    python train_sdpo.py                                               # the toy, every earlier stage included
    python train_sdpo.py --task summarize --policy HUB_ID --data posts.jsonl --critic rule --output_dir runs/posts/sdpo

    L = sum_t D( pi(. | x, y_<t), pi_teacher(. | x, y, c, y_<t) ) / tokens        Hübotter et al. 2026 (arXiv 2601.20802), eq. 1

The same critiques as train_ppo.py's, used in another way: the words of a critique stand before the eyes of a teacher, which is the
policy itself some steps ago, and what it would then have said at each token of the response is learnt. No quotes, no V. Left out:
other responses to the prompt as demonstrations (each prompt is answered once), and importance weights of later passes.
"""

import copy
import math
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from t2g import cli, critics, policy, stages, tasks
from t2g.feedback import revision_prompt
from t2g.log import Logger
from t2g.metrics import mean_scores, shift, summary, token_counts
from t2g.policy import Policy, autocast, context_length, now, response_logits
from t2g.ppo import kl_penalty
from t2g.rewards import token_rewards
from t2g.rollout import encode_prompts, sample, step_rng
from t2g.run import seconds_of
from t2g.score import response_logprobs, score

TOY = dict(
    learning_rate=1.5e-3, max_steps=45, per_device_train_batch_size=32, num_mini_batches=2,
    num_ppo_epochs=2, response_length=40
)  # fmt: skip


def parse_args():
    parser = cli.parser(__doc__)
    add = parser.add_argument
    tasks.add_flags(add)
    add(
        "--policy",
        help="the starting policy: a run, a folder, a hub id or a .gguf file; sft beside --output_dir if not given",
    )
    critics.add_flags(add)
    add("--output_dir", help="where the run goes; runs/TASK/sdpo if not given")
    add(
        "--divergence",
        choices=("reverse_kl", "forward_kl", "jsd"),
        default="reverse_kl",
        help="D, from policy to teacher",
    )
    rate = "how far the teacher follows the policy after a rollout: 1 is the policy itself, 0 the starting policy"
    add("--teacher_update_rate", type=cli.between(0, 1), default=0.05, help=rate)
    add(
        "--max_steps",
        type=cli.positive(int),
        default=100,
        help="rollouts, each followed by one update",
    )
    add("--num_ppo_epochs", type=cli.positive(int), default=1, help="passes over a rollout")
    add(
        "--num_mini_batches",
        type=cli.positive(int),
        default=2,
        help="optimiser steps a pass; times the next two it is a rollout",
    )
    add(
        "--gradient_accumulation_steps",
        type=cli.positive(int),
        default=1,
        help="microbatches a minibatch",
    )
    add(
        "--per_device_train_batch_size",
        type=cli.positive(int),
        default=8,
        help="responses a microbatch",
    )
    add(
        "--learning_rate",
        type=cli.positive(float),
        default=1e-6,
        help="AdamW's learning rate, falling linearly to 0",
    )
    add(
        "--max_grad_norm",
        type=cli.positive(float),
        default=1.0,
        help="gradients are clipped to this norm",
    )
    add("--response_length", type=cli.positive(int), default=64, help="most tokens of a response")
    add(
        "--temperature",
        type=cli.positive(float),
        default=1.0,
        help="of sampling and of all log-probabilities",
    )
    add("--tensorboard", action="store_true", help="also write TensorBoard's files")
    for_the_log = dict(kl_estimator="full", span_weights="uniform")
    parser.set_defaults(**for_the_log)
    task, args = tasks.parse(parser, "sdpo", toy=TOY)
    args.output_dir = args.output_dir or f"runs/{task.NAME}/sdpo"
    args.batch_size = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * args.num_mini_batches
    )
    return task, args


def main():
    task, args = parse_args()
    root = Path(args.output_dir).parent
    stages.ensure(["sft", *critics.stages_before(args)], args, root, args.policy)
    start = time.perf_counter()

    device = policy.device()
    tokenizer, model = policy.load(args.policy or root / "sft", device)
    actor, reference = (
        Policy(model).to(device),
        copy.deepcopy(model).requires_grad_(False),
    )  # both to measure, its V is not used
    teacher = model if args.teacher_update_rate == 1 else copy.deepcopy(reference)
    critic = critics.load_critic(task, args, root, device)
    train = tasks.short_enough(task.load(args)[0], tokenizer, args.max_prompt_length)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True
    )
    log = Logger(cli.fresh_folder(args.output_dir), args, task.METRICS, args.tensorboard)

    bar = tqdm(range(1, args.max_steps + 1), desc="SDPO", unit="step")
    for step in bar:
        clock = [now()]
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (step - 1) / args.max_steps)

        # 1. Rollout: one sampled response to each prompt, the prompts of train_ppo.py.
        drawn = step_rng(args.seed, step).choices(train, k=args.batch_size)
        examples = sorted(drawn, key=lambda example: len(example.prompt))
        prompts = [example.prompt for example in examples]
        rollout = sample(
            model, tokenizer, prompts, args.response_length, args.temperature, bf16=args.bf16
        )
        clock.append(now())

        # 2. Critique. None where it is unreadable; such a sample is masked out of the loss.
        feedback = critic(examples, rollout.texts)
        clock.append(now())

        # 3. Hindsight: the same responses behind other prompts, which show the response and its critique.
        hindsight, fits = with_critiques(
            tokenizer, context_length(model), prompts, rollout, feedback
        )
        mask = rollout.mask & fits[:, None]

        # 4. Measure what train_ppo.py learns from, and here is only written down.
        delta, quotes = token_rewards(tokenizer, rollout, feedback, args)
        old_logprobs, entropy, _, kl = score(actor, reference, rollout, args)
        clock.append(now())

        # 5. Distil: minibatches of the divergence from what the teacher would have said.
        stats = (
            update(model, teacher, optimizer, rollout, hindsight, mask, args) if mask.any() else {}
        )

        # 6. The teacher follows the policy, slowly.
        follow(teacher, model, args.teacher_update_rate)
        clock.append(now())

        # 7. Write down what happened.
        change = (response_logprobs(actor, rollout, args) - old_logprobs) * mask
        clock.append(now())
        stats |= shift(change, delta, mask)
        stats |= summary(mask, delta, quotes, kl, entropy) | seconds_of(clock)
        stats |= token_counts(tokenizer, rollout, feedback)
        unread, left_out = feedback.count(None), (~fits).sum().item()
        stats |= {
            "unparsable": unread / len(feedback),
            "too_long": (left_out - unread) / len(feedback),
        }
        stats["learning_rate"] = optimizer.param_groups[0]["lr"]
        log(step, stats | mean_scores(task, examples, rollout.texts))
        line = "reward {reward:+.2f} kl {kl:.2f} divergence {divergence:.4f}"
        bar.set_postfix_str(line.format_map(defaultdict(float, stats)))

    saved = policy.save(model, tokenizer, args.output_dir, args.max_steps)
    print(f"policy: {saved} ({time.perf_counter() - start:.0f} s)")


def with_critiques(tokenizer, context, prompts, rollout, feedback):
    """The rollout as the teacher reads it: the same responses, each behind the prompt that asks to write it anew with its critique.

    Where that is too long for a context of so many tokens, the middle of the prompt is left out. A row that is too long even so, or
    has no critique, keeps its own prompt. Returns: the rollout, and which rows do have their critique, (B,) bool.
    """
    room, asked, fits = context - rollout.response.shape[1], [], []
    for prompt, response, said in zip(prompts, rollout.texts, feedback):
        question = partial(revision_prompt, feedback=said)
        text = (
            prompt
            if said is None
            else critics.fitting_prompt(tokenizer, prompt, response, room, question)
        )
        fits.append(said is not None and critics.token_count(tokenizer, text) <= room)
        asked.append(text if fits[-1] else prompt)
    prompt, prompt_mask = encode_prompts(tokenizer, asked, rollout.response.device)
    return replace(rollout, prompt=prompt, prompt_mask=prompt_mask), torch.tensor(
        fits, device=prompt.device
    )


def divergence(logprobs, teacher_logprobs, kind):
    """How far a policy p is from its teacher q at each token, in nats, over the whole vocabulary (SDPO, eq. 1 and sec. 2.3).

        reverse_kl    KL(p || q) = sum_v p(v) (log p(v) - log q(v))
        forward_kl    KL(q || p)
        jsd           (KL(p || m) + KL(q || m)) / 2,  m = (p + q) / 2        never above log 2

    The gradient of reverse_kl is sum_v p(v) (log p(v) - log q(v)) grad log p(v): a policy gradient in which every token v of the
    vocabulary, sampled or not, has the advantage log q(v) - log p(v).

    Args: (..., V) log-softmaxes. Returns: (...).
    """
    if kind == "reverse_kl":
        return kl_penalty(logprobs, teacher_logprobs, "full")
    if kind == "forward_kl":
        return kl_penalty(teacher_logprobs, logprobs, "full")
    if kind == "jsd":
        middle = torch.logaddexp(logprobs, teacher_logprobs) - math.log(2)
        return (
            kl_penalty(logprobs, middle, "full") + kl_penalty(teacher_logprobs, middle, "full")
        ) / 2
    raise ValueError(f"unknown divergence {kind!r}: use reverse_kl, forward_kl or jsd")


def token_divergence(model, teacher, rollout, hindsight, args):
    """The divergence (B, T) at each response token; a gradient for the policy and none for the teacher."""
    with torch.no_grad(), autocast(args.bf16):
        teacher_logits, _ = response_logits(teacher, hindsight)
    with autocast(args.bf16):
        logits, _ = response_logits(model, rollout)
    ours, theirs = (
        (x.float() / args.temperature).log_softmax(-1) for x in (logits, teacher_logits)
    )
    return divergence(ours, theirs, args.divergence)


def update(model, teacher, optimizer, rollout, hindsight, mask, args):
    """The passes over one rollout. The loss is a sum over tokens, divided by the count of the whole minibatch."""
    sums, optimizer_steps = defaultdict(float), args.num_ppo_epochs * args.num_mini_batches
    for _ in range(args.num_ppo_epochs):
        for minibatch in torch.randperm(len(rollout)).chunk(args.num_mini_batches):
            token_count = mask[minibatch].sum().clamp(min=1)
            for rows in minibatch.sort().values.split(args.per_device_train_batch_size):
                at_tokens = token_divergence(
                    model, teacher, rollout.rows(rows), hindsight.rows(rows), args
                )
                loss = at_tokens.masked_fill(~mask[rows], 0).sum() / token_count
                loss.backward()
                sums["divergence"] += loss.item() / optimizer_steps
            norm = torch.nn.utils.clip_grad_norm_(
                model.parameters(), args.max_grad_norm, error_if_nonfinite=True
            )
            sums["grad_norm"] += norm.item() / optimizer_steps
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for name, read in (("update_tokens", rollout), ("teacher_tokens", hindsight)):
        sums[name] = args.num_ppo_epochs * int(read.prompt_mask.sum() + read.mask.sum())
    return dict(sums)


@torch.no_grad()
def follow(teacher, model, rate):
    """teacher <- (1 - rate) teacher + rate policy, weight by weight."""
    for theirs, ours in zip(teacher.parameters(), model.parameters()):
        theirs.lerp_(ours, rate)


if __name__ == "__main__":
    main()
