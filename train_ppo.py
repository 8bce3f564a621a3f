"""Stage 3: PPO with token rewards from critiques. Rollout -> critique -> spans -> token rewards -> KL -> GAE -> PPO.

    torchrun train_ppo.py                                              # the toy, every earlier stage included
    torchrun train_ppo.py --reward scalar --output_dir runs/toy/ppo_scalar      # the same feedback, summed at the last token
    torchrun train_ppo.py --task summarize --policy HUB_ID --data posts.jsonl --critic rule --output_dir runs/posts/ppo

The loop in train() is the algorithm; what is numbered there is numbered so in README and docs/GUIDE.md. The maths is in t2g/ppo.py.
Stopped, the same command goes on bit for bit. With torchrun --nproc_per_node N models are sharded over N processes: t2g/dist.py.
"""

import copy
import itertools
import time
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from t2g import adapters, checkpoint, cli, critics, dist, policy, stages, tasks
from t2g import page as report
from t2g.align import (
    MATCH_KINDS,
    SENTENCE_OR_LINE,
    SPAN_WEIGHTS,
    resolve,
    span_rewards,
    steps,
    token_offsets,
)
from t2g.cli import fail
from t2g.log import Logger, peak_memory_gib
from t2g.metrics import evaluate, mean_scores, shift, token_counts
from t2g.policy import Policy, autocast, now, response_logits, token_stats
from t2g.ppo import (
    AdaptiveKL,
    gae,
    kl_penalty,
    masked_mean,
    masked_variance,
    policy_loss,
    value_loss,
    whiten,
)
from t2g.rollout import sample, step_rng


def parse_args():
    parser = cli.parser(__doc__)
    add = parser.add_argument
    tasks.add_flags(add)
    add(
        "--policy",
        help="the starting policy: a run, a folder, a hub id or a .gguf file; sft beside --output_dir if not given",
    )
    critics.add_flags(add)
    add("--output_dir", help="where the run goes; runs/TASK/ppo if not given")
    where = "rewards at the spans' tokens, or summed on the last token of each sentence (prm) or of the response (scalar)"
    add("--reward", choices=("span", "prm", "scalar"), default="span", help=where)
    add(
        "--span_weights",
        choices=list(SPAN_WEIGHTS),
        default="uniform",
        help="how a span's score is shared out among its tokens",
    )
    add(
        "--max_steps",
        type=cli.positive(int),
        default=100,
        help="rollouts, each followed by one update",
    )
    add("--num_ppo_epochs", type=cli.positive(int), default=4, help="passes over a rollout")
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
    add(
        "--missing_eos_penalty",
        type=cli.between(0, 1e6),
        default=1.0,
        help="taken from a response that does not end",
    )
    add(
        "--kl_coef",
        type=cli.between(0, 1e6),
        default=0.05,
        help="coefficient of the KL penalty, at the start",
    )
    add(
        "--kl_estimator",
        choices=("k1", "k2", "k3", "abs", "full"),
        default="full",
        help="how the KL penalty is computed",
    )
    add(
        "--kl_target",
        type=cli.positive(float),
        help="nats a response that the coefficient is steered to; fixed if not given",
    )
    add(
        "--kl_horizon",
        type=cli.positive(float),
        default=10000.0,
        help="how slowly it is steered, in responses",
    )
    add("--cliprange", type=cli.positive(float), default=0.2, help="PPO's clip of the ratio")
    add(
        "--cliprange_value",
        type=cli.positive(float),
        default=0.2,
        help="clip of the value's change",
    )
    add("--vf_coef", type=cli.between(0, 1e6), default=0.1, help="weight of the value loss")
    add("--entropy_coef", type=cli.between(0, 1e6), default=0.0, help="weight of the entropy bonus")
    add("--gamma", type=cli.between(0, 1), default=1.0, help="discount")
    add("--lam", type=cli.between(0, 1), default=0.95, help="lambda of GAE")
    add(
        "--eval_samples",
        type=cli.positive(int),
        default=64,
        help="held-out prompts for the measurement before and after",
    )
    adapters.add_flags(add)
    dist.add_flags(add)
    checkpoint.add_flags(add)
    add("--tensorboard", action="store_true", help="also write TensorBoard's files")
    task, args = tasks.parse(parser, "train_ppo")
    args.output_dir = args.output_dir or f"runs/{task.NAME}/ppo"
    local_batch_size = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * args.num_mini_batches
    )
    args.batch_size = local_batch_size * dist.processes()
    args.save_steps = args.save_steps or max(1, min(20, args.max_steps // 10))
    return task, args


def main():
    task, args = parse_args()
    root = Path(args.output_dir).parent
    needed = ["sft", *critics.stages_before(args)]
    seconds = dist.start(
        args.cpu_offload, first=lambda: stages.ensure(needed, args, root, args.policy)
    )
    start = time.perf_counter()

    tokenizer, model = policy.load(args.policy or root / "sft")
    pool, heldout = (
        tasks.short_enough(part, tokenizer, args.max_prompt_length) for part in task.load(args)
    )
    critic = critics.load_critic(task, args, root, policy.device())
    reference = (
        None if args.lora_r else dist.frozen(copy.deepcopy(model), args)
    )  # with LoRA: the policy, its adapter off
    torch.manual_seed(args.seed)  # of LoRA's first weights
    actor = Policy(
        adapters.added(model, args).eval()
    )  # without dropout, for the first ratio of a step must be 1
    actor.load_value_head(args.policy or root / "sft")
    model = dist.shard(actor.model, args.bf16, args.cpu_offload, args.gradient_checkpointing)
    dist.shard(actor.value_head, cpu_offload=args.cpu_offload)

    def measure(desc):
        some, length = heldout[: args.eval_samples], args.response_length
        return evaluate(
            task, model, tokenizer, some, length, bf16=args.bf16, seed=args.seed, desc=desc
        )

    with (
        cli.friendly_errors(),
        checkpoint.run_folder(args, args.resume) as folder,
        checkpoint.sigterm() as sigterm,
    ):
        before, texts_before = measure("before")
        pages = train(
            task, args, actor, reference, critic, tokenizer, pool, heldout, folder, sigterm
        )
        after, texts_after = measure("after")
        if dist.rank() == 0:
            pages.finish(
                args,
                before,
                after,
                seconds | {"ppo": time.perf_counter() - start},
                heldout,
                texts_before,
                texts_after,
            )


def train(task, args, actor, reference, critic, tokenizer, pool, heldout, folder, sigterm):
    """The algorithm: a rollout a step, each followed by one update. Returns: the samples that the page shows."""
    model, device, step_end = (
        actor.model,
        policy.device(),
        getattr(task, "STEP_END", SENTENCE_OR_LINE),
    )
    optimizer = torch.optim.AdamW(
        checkpoint.trainable(actor).values(), lr=args.learning_rate, weight_decay=0.0, fused=True
    )
    reached = checkpoint.resume(actor, optimizer, args, data=pool)
    kl_controller = AdaptiveKL(
        reached.get("kl_coef", args.kl_coef), args.kl_target, args.kl_horizon
    )
    first, bad_steps = dist.rank() == 0, 0
    log = (
        Logger(folder, args, task.METRICS, args.tensorboard, keep_until=reached["step"])
        if first
        else None
    )
    pages = report.Samples(folder, args.max_steps, keep_until=reached["step"])
    watch = partial(
        pages.watch,
        model,
        token_rewards,
        partial(score, actor, reference),
        tokenizer,
        heldout,
        critic,
        args,
    )
    if not reached["step"]:
        watch(0)

    bar = tqdm(
        range(reached["step"] + 1, args.max_steps + 1), desc="PPO", unit="step", disable=not first
    )
    for step in bar:
        clock = [now()]
        optimizer.param_groups[0]["lr"] = rate = args.learning_rate * (
            1 - (step - 1) / args.max_steps
        )

        # 1. Rollout: one sampled response to each prompt. Every process draws all prompts and takes its own, the short ones first.
        rng = step_rng(
            args.seed, step, dist.rank()
        )  # not that of annotate.py: the critic must judge new prompts
        examples = sorted(
            dist.own(rng.choices(pool, k=args.batch_size)), key=lambda example: len(example.prompt)
        )
        with dist.whole(model):
            rollout = sample(
                model,
                tokenizer,
                [e.prompt for e in examples],
                args.response_length,
                args.temperature,
                bf16=args.bf16,
            )
        clock.append(now())

        # 2. Critique: what is wrong, and where. None where it is unreadable; such a sample is masked out of the loss.
        feedback = critic(examples, rollout.texts)
        readable = torch.tensor([f is not None for f in feedback], device=device)
        clock.append(now())

        # 3. Spans -> token rewards delta in {-1, 0, +1}.
        delta, quotes = token_rewards(tokenizer, rollout, feedback, args)
        placed = place(delta, tokenizer, rollout, step_end, args)

        # 4. KL penalty: r_t = placed_t - kl_coef KL_t, and what the policy and V were before the update. From here to the update
        # every process has the numbers of the whole batch.
        scored = score(actor, reference, rollout, args)
        everywhere = map(dist.gather, (rollout.mask & readable[:, None], delta, placed, *scored))
        mask, delta, placed, old_logprobs, entropy, old_values, kl = everywhere
        if step == 1 and not kl.abs().max() <= 1e-3:
            raise RuntimeError(
                f"before the first update policy and reference must agree; KL is {kl.abs().max():.2g} nats"
            )
        rewards = placed - kl_controller.value * kl

        # 5. Advantages by GAE, whitened over the batch.
        advantages, returns = gae(rewards, old_values, mask, args.gamma, args.lam)
        whitened = whiten(advantages, mask)
        clock.append(now())

        # 6. PPO: a few epochs of minibatches against the clipped losses.
        batch = dict(
            old_logprobs=old_logprobs,
            advantages=whitened,
            old_values=old_values,
            returns=returns,
            mask=mask,
        )
        stats = update(actor, optimizer, rollout, batch, args) if mask.any() else {}
        bad_steps = (
            bad_steps + 1
            if stats.get("skipped_updates") == args.num_ppo_epochs * args.num_mini_batches
            else 0
        )
        if bad_steps == 5:
            fail(
                f"no finite gradient in 5 steps in a row, up to {step}: lower --learning_rate and go on with --resume CHECKPOINT"
            )
        clock.append(now())

        # 7. Steer the KL coefficient, and write down what happened: first of all, whether the criticised tokens moved.
        change = (dist.gather(response_logprobs(actor, rollout, args)) - old_logprobs) * mask
        clock.append(now())
        stats |= shift(change, delta, mask)
        stats |= summary(mask, delta, dist.totals(quotes), kl, entropy, clock)
        unexplained = masked_variance(returns - old_values, mask) / masked_variance(
            returns, mask
        ).clamp(min=1e-8)
        stats |= {
            "value_explained": 1 - unexplained.item(),
            "kl_coef": kl_controller.value,
            "learning_rate": rate,
        }
        stats |= token_counts(tokenizer, rollout, feedback) | dist.means(
            mean_scores(task, examples, rollout.texts)
        )
        if mask.any():
            kl_controller.update(stats["kl"], len(mask))
        if first:
            log(step, stats)
            numbers = dict(delta=delta, kl=kl, value=old_values, advantage=whitened, shift=change)
            pages.add(step, tokenizer, examples, rollout, feedback, **numbers)
        watch(step)
        line = "reward {reward:+.2f} kl {kl:.2f} | log pi: good {shift_good:+.3f} rest {shift_rest:+.3f} poor {shift_poor:+.3f}"
        bar.set_postfix_str(line.format_map(defaultdict(float, stats)))
        checkpoint.keep(
            actor,
            tokenizer,
            optimizer,
            step,
            args,
            sigterm,
            reached["data_hash"],
            kl_coef=kl_controller.value,
        )
    return pages


def token_rewards(tokenizer, rollout, feedback, args):
    """delta (B, T) from each sample's feedback, and how many quotes were found in which way."""
    delta, counts = torch.zeros(rollout.mask.shape), dict.fromkeys((*MATCH_KINDS, "ambiguous"), 0)
    for row, (text, said) in enumerate(zip(rollout.texts, feedback)):
        if said is None:
            continue
        if isinstance(said, float):  # a learned number for the whole response
            delta[row, rollout.mask[row].sum() - 1] = said
            continue
        spans, found = resolve(text, said, severities=args.span_weights == "severity")
        offsets = token_offsets(tokenizer, rollout.response[row][rollout.mask[row]].tolist())
        delta[row, : len(offsets)] = span_rewards(offsets, spans, args.span_weights)
        counts = {kind: counts[kind] + found[kind] for kind in counts}
    return delta.to(rollout.response.device), counts


def place(delta, tokenizer, rollout, step_end, args):
    """Rewards (B, T) where --reward wants them: each step's delta summed on its last token. A missing EOS costs at the end.

    A step is a token (span), a sentence or what else ends with step_end (prm), or the whole response (scalar).
    """
    segment, last = torch.zeros_like(rollout.response), rollout.mask.sum(1, keepdim=True) - 1
    if args.reward == "span":
        segment += torch.arange(segment.shape[1], device=segment.device)
    elif args.reward == "prm":
        for row, text in enumerate(rollout.texts):
            ids = rollout.response[row][rollout.mask[row]].tolist()
            segment[row, : len(ids)] = torch.tensor(
                steps(token_offsets(tokenizer, ids), text, step_end)
            )
    following = torch.cat([segment[:, 1:], torch.full_like(last, -1)], dim=1).scatter(1, last, -1)
    sums = torch.zeros_like(delta).scatter_add(1, segment, delta).gather(1, segment)
    penalty = args.missing_eos_penalty * (~rollout.finished).float()
    return sums.where(rollout.mask & (segment != following), 0.0).scatter_add(
        1, last, -penalty[:, None]
    )


def full_kl(logits, ref_logits, temperature):
    """The exact KL (T,) of one response from the two models' logits (T, V)."""
    ours, theirs = ((x.float() / temperature).log_softmax(-1) for x in (logits, ref_logits))
    return kl_penalty(ours, theirs, "full")


@torch.no_grad()
def score(actor, reference, rollout, args):
    """Old log-probabilities, entropies, values and KL against the reference, (B, T) each, a microbatch at a time."""
    microbatches = torch.arange(len(rollout)).split(args.per_device_train_batch_size)
    parts = [score_microbatch(actor, reference, rollout.rows(rows), args) for rows in microbatches]
    return [torch.cat(column) for column in zip(*parts)]


def score_microbatch(actor, reference, rollout, args):
    with autocast(args.bf16):
        logits, states = response_logits(actor.model, rollout)
        ref_logits = reference_logits(actor, reference, rollout)
        values = actor.values(states, rollout.mask)
    logprobs, entropy = token_stats(logits, rollout, args.temperature)
    if (
        args.kl_estimator == "full"
    ):  # a response at a time, so that no second tensor of the size of the logits lives
        kl = torch.stack(
            [full_kl(*pair, args.temperature) for pair in zip(logits, ref_logits)]
        ).masked_fill(~rollout.mask, 0)
    else:
        kl = kl_penalty(
            logprobs, token_stats(ref_logits, rollout, args.temperature)[0], args.kl_estimator
        )
    return logprobs, entropy, values, kl


def reference_logits(actor, reference, rollout):
    """Of the frozen copy; without one, of the policy with its adapter off."""
    with nullcontext() if reference else actor.model.disable_adapter():
        return response_logits(reference or actor.model, rollout)[0]


@torch.no_grad()
def response_logprobs(actor, rollout, args):
    """log pi (B, T) of the response tokens under the policy as it is now, by one more forward pass."""
    microbatches = torch.arange(len(rollout)).split(args.per_device_train_batch_size)
    with autocast(args.bf16):
        return torch.cat(
            [actor(rollout.rows(rows), args.temperature).logprobs for rows in microbatches]
        )


def update(actor, optimizer, rollout, batch, args):
    """The PPO epochs over one rollout. Every loss is a sum over tokens, divided by the count of the whole minibatch, which all
    processes share; `batch` has the rows of all of them. A minibatch whose gradient is not finite changes nothing and is counted.
    """
    batch = {name: dist.own(tensor)[:, : rollout.mask.shape[1]] for name, tensor in batch.items()}
    sums, norms, first_error, optimizer_steps = (
        defaultdict(float),
        [],
        0.0,
        args.num_ppo_epochs * args.num_mini_batches,
    )
    for epoch in range(args.num_ppo_epochs):
        for number, minibatch in enumerate(
            torch.randperm(len(rollout)).chunk(args.num_mini_batches)
        ):
            token_count, said = (
                dist.total(batch["mask"][minibatch].sum()).clamp(min=1),
                defaultdict(float),
            )
            for rows in minibatch.sort().values.split(
                args.per_device_train_batch_size
            ):  # of like length: little padding
                b = {name: tensor[rows] for name, tensor in batch.items()}
                loss, stats, new_logprobs = microbatch_loss(
                    actor, rollout.rows(rows), b, token_count, args
                )
                if epoch == number == 0:
                    first_error += first_ratio_error(new_logprobs, b, args) / token_count.item()
                loss.backward()
                for name, value in stats.items():
                    said[name] += value.detach()
            norm = dist.plain(
                torch.nn.utils.clip_grad_norm_(actor.parameters(), args.max_grad_norm)
            )
            if norm.isfinite():
                optimizer.step()
                norms.append(norm.item())
                for name, value in said.items():
                    sums[name] += value.item()
            optimizer.zero_grad(set_to_none=True)
    read = args.num_ppo_epochs * int(rollout.prompt_mask.sum() + rollout.mask.sum())
    means = {
        name: value / len(norms)
        for name, value in (sums | {"grad_norm": sum(norms) / dist.size()}).items()
        if norms
    }
    stats = dist.totals(means | {"first_ratio_error": first_error, "update_tokens": read})
    return stats | {"skipped_updates": optimizer_steps - len(norms)}


def microbatch_loss(actor, rollout, b, token_count, args):
    """A microbatch's share of the minibatch's loss, what it says of it, and log pi (B, T) of its tokens."""
    with autocast(args.bf16):
        new = actor(rollout, args.temperature, args.entropy_coef > 0)
    limits = b["mask"], args.cliprange, token_count
    pg_loss, pg_stats = policy_loss(new.logprobs, b["old_logprobs"], b["advantages"], *limits)
    limits = b["mask"], args.cliprange_value, token_count
    vf_loss, vf_stats = value_loss(new.values, b["old_values"], b["returns"], *limits)
    entropy = (new.entropy * b["mask"]).sum() / token_count
    stats = {"policy_loss": pg_loss, "value_loss": vf_loss, **pg_stats, **vf_stats}
    return pg_loss + args.vf_coef * vf_loss - args.entropy_coef * entropy, stats, new.logprobs


def first_ratio_error(logprobs, b, args):
    """The sum of |log rho| before any step: 0 within rounding, or log-probabilities are computed in two ways."""
    error = (logprobs.detach() - b["old_logprobs"]).abs() * b["mask"]
    if not masked_mean(error, b["mask"]) <= (0.05 if args.bf16 else 1e-4):
        raise RuntimeError(
            f"the first ratio of a step must be 1 within rounding, but |log ratio| is {error.max():.2g}"
        )
    return error.sum().item()


def summary(mask, delta, quotes, kl, entropy, clock):
    """What a step's rollout looked like and how long its parts took; t2g/log.py has the formulas."""
    quote_count, responses = (
        max(sum(quotes[kind] for kind in MATCH_KINDS), 1),
        max(mask.any(1).sum().item(), 1),
    )
    seconds = [end - start for start, end in itertools.pairwise(clock)]
    return {
        "reward": (delta * mask).sum().item() / responses,
        "kl": (kl * mask).sum().item() / responses,
        "entropy": masked_mean(entropy, mask).item(),
        "tokens_good": masked_mean((delta > 0).float(), mask).item(),
        "tokens_poor": masked_mean((delta < 0).float(), mask).item(),
        "unparsable": 1 - mask.any(1).float().mean().item(),
        **{f"quotes_{kind}": count / quote_count for kind, count in quotes.items()},
        **{
            f"seconds_{part}": s
            for part, s in zip(("rollout", "critique", "score", "update", "shift"), seconds)
        },
        "seconds": clock[-1] - clock[0],
        "peak_memory_gib": peak_memory_gib(),
    }


if __name__ == "__main__":
    main()
