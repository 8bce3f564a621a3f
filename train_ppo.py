"""Stage 3: PPO with token rewards from critiques. Rollout -> critique -> spans -> token rewards -> KL -> GAE -> PPO.

    torchrun train_ppo.py                                              # the toy, every earlier stage included
    torchrun train_ppo.py --reward scalar --output_dir runs/toy/ppo_scalar      # the same feedback, summed at the last token
    torchrun train_ppo.py --task summarize --policy HUB_ID --data posts.jsonl --critic rule --output_dir runs/posts/ppo

The loop in main() is the algorithm; what is numbered there is numbered so in the README. The maths is in t2g/ppo.py.
"""

import copy
import itertools
import json
import time
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from t2g import ablations, cli, critics, policy, report, stages, tasks
from t2g.align import MATCH_KINDS, SENTENCE_OR_LINE, SPAN_WEIGHTS, resolve, span_rewards, steps, token_offsets
from t2g.log import Logger, peak_memory_gib, write_json
from t2g.metrics import evaluate, mean_scores, shift, token_counts
from t2g.policy import Policy, autocast, now, response_logits, token_stats
from t2g.ppo import AdaptiveKL, gae, kl_penalty, masked_mean, masked_variance, policy_loss, value_loss, whiten
from t2g.rollout import sample, step_rng


def parse_args():
    parser = cli.parser(__doc__)
    add = parser.add_argument
    tasks.add_flags(add)
    add("--policy", help="the starting policy: a run, a folder, a hub id or a .gguf file; sft beside --output_dir if not given")
    critics.add_flags(add)
    add("--output_dir", help="where the run goes; runs/TASK/ppo if not given")
    where = "rewards at the spans' tokens, or summed on the last token of each sentence (prm) or of the response (scalar)"
    add("--reward", choices=("span", "prm", "scalar"), default="span", help=where)
    add("--span_weights", choices=list(SPAN_WEIGHTS), default="uniform", help="how a span's score is shared out among its tokens")
    ablations.add_flags(add)
    add("--max_steps", type=cli.positive(int), default=100, help="rollouts, each followed by one update")
    add("--num_ppo_epochs", type=cli.positive(int), default=4, help="passes over a rollout")
    add("--num_mini_batches", type=cli.positive(int), default=2, help="optimiser steps a pass; times the next two it is a rollout")
    add("--gradient_accumulation_steps", type=cli.positive(int), default=1, help="microbatches a minibatch")
    add("--per_device_train_batch_size", type=cli.positive(int), default=8, help="responses a microbatch")
    add("--learning_rate", type=cli.positive(float), default=1e-6, help="AdamW's learning rate, falling linearly to 0")
    add("--max_grad_norm", type=cli.positive(float), default=1.0, help="gradients are clipped to this norm")
    add("--response_length", type=cli.positive(int), default=64, help="most tokens of a response")
    add("--temperature", type=cli.positive(float), default=1.0, help="of sampling and of all log-probabilities")
    add("--missing_eos_penalty", type=cli.between(0, 1e6), default=1.0, help="taken from a response that does not end")
    add("--kl_coef", type=cli.between(0, 1e6), default=0.05, help="coefficient of the KL penalty, at the start")
    add("--kl_estimator", choices=("k1", "k2", "k3", "abs", "full"), default="full", help="how the KL penalty is computed")
    add("--kl_target", type=cli.positive(float), help="nats a response that the coefficient is steered to; fixed if not given")
    add("--kl_horizon", type=cli.positive(float), default=10000.0, help="how slowly it is steered, in responses")
    add("--cliprange", type=cli.positive(float), default=0.2, help="PPO's clip of the ratio")
    add("--cliprange_value", type=cli.positive(float), default=0.2, help="clip of the value's change")
    add("--vf_coef", type=cli.between(0, 1e6), default=0.1, help="weight of the value loss")
    add("--entropy_coef", type=cli.between(0, 1e6), default=0.0, help="weight of the entropy bonus")
    add("--gamma", type=cli.between(0, 1), default=1.0, help="discount")
    add("--lam", type=cli.between(0, 1), default=0.95, help="lambda of GAE")
    add("--eval_samples", type=cli.positive(int), default=64, help="held-out prompts for the measurement before and after")
    add("--tensorboard", action="store_true", help="also write TensorBoard's files")
    task, args = tasks.parse(parser, "train_ppo")
    args.output_dir = args.output_dir or f"runs/{args.task}/ppo"
    args.batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.num_mini_batches
    return task, args


def main():
    task, args = parse_args()
    root = Path(args.output_dir).parent
    seconds = stages.ensure(["sft", *critics.stages_before(args)], args, root, args.policy)
    start = time.perf_counter()

    device = policy.device()
    tokenizer, model = policy.load(args.policy or root / "sft", device)
    actor, reference = Policy(model).to(device), copy.deepcopy(model).requires_grad_(False)
    actor.load_value_head(args.policy or root / "sft")
    critic = critics.chosen(task, args, root, device)
    train, heldout = (tasks.short_enough(part, tokenizer, args.max_prompt_length) for part in task.load(args))
    heldout = heldout[: args.eval_samples]
    step_end = getattr(task, "STEP_END", SENTENCE_OR_LINE)
    kl_controller = AdaptiveKL(args.kl_coef, args.kl_target, args.kl_horizon)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=args.learning_rate, weight_decay=0.0)
    log = Logger(cli.fresh_folder(args.output_dir), args, task.METRICS, args.tensorboard)
    pages = report.Samples(args.output_dir, args.max_steps)
    measure = dict(response_length=args.response_length, bf16=args.bf16, seed=args.seed)
    before, texts_before = evaluate(task, model, tokenizer, heldout, **measure, desc="before")

    bar = tqdm(range(1, args.max_steps + 1), desc="PPO", unit="step")
    for step in bar:
        clock = [now()]
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (step - 1) / args.max_steps)

        # 1. Rollout: one sampled response to each prompt.
        rng = step_rng(args.seed, step)  # not that of annotate.py: the critic must judge new prompts
        examples = rng.choices(train, k=args.batch_size)
        prompts = [example.prompt for example in examples]
        rollout = sample(model, tokenizer, prompts, args.response_length, args.temperature, bf16=args.bf16)
        clock.append(now())

        # 2. Critique: what is wrong, and where. None where it is unreadable; such a sample is masked out of the loss.
        feedback = critic(examples, rollout.texts)
        readable = torch.tensor([f is not None for f in feedback], device=device)
        mask = rollout.mask & readable[:, None]
        clock.append(now())

        # 3. Spans -> token rewards delta in {-1, 0, +1}.
        delta, quotes = token_rewards(tokenizer, rollout, feedback, args, rng)

        # 4. KL penalty: r_t = delta_t - kl_coef KL_t, and what the policy and V were before the update.
        old_logprobs, entropy, old_values, kl = score(actor, reference, rollout, args)
        if step == 1 and not kl.abs().max() <= 1e-3:
            raise RuntimeError(f"before the first update policy and reference must agree; KL is {kl.abs().max():.2g} nats")
        rewards = place(delta, tokenizer, rollout, step_end, args) - kl_controller.value * kl

        # 5. Advantages by GAE, whitened over the batch.
        advantages, returns = gae(rewards, old_values, mask, args.gamma, args.lam)
        whitened = whiten(advantages, mask)
        clock.append(now())

        # 6. PPO: a few epochs of minibatches against the clipped losses.
        batch = dict(old_logprobs=old_logprobs, advantages=whitened, old_values=old_values, returns=returns, mask=mask)
        stats = update(actor, optimizer, rollout, batch, args) if mask.any() else {}
        clock.append(now())

        # 7. Steer the KL coefficient, and write down what happened: first of all, whether the criticised tokens moved.
        change = (response_logprobs(actor, rollout, args) - old_logprobs) * mask
        clock.append(now())
        stats |= shift(change, delta, mask)
        stats |= summary(rollout, mask, delta, quotes, kl, entropy, clock)
        stats |= token_counts(tokenizer, rollout, feedback)
        unexplained = masked_variance(returns - old_values, mask) / masked_variance(returns, mask).clamp(min=1e-8)
        stats |= {"value_explained": 1 - unexplained.item(), "kl_coef": kl_controller.value}
        stats |= {"learning_rate": optimizer.param_groups[0]["lr"]}
        if mask.any():
            kl_controller.update(stats["kl"], len(rollout))
        log(step, stats | mean_scores(task, examples, rollout.texts))
        at_tokens = dict(delta=delta, kl=kl, value=old_values, advantage=whitened, shift=change)
        pages.add(step, tokenizer, examples, rollout, feedback, **at_tokens)
        line = "reward {reward:+.2f} kl {kl:.2f} | log pi: good {shift_good:+.3f} rest {shift_rest:+.3f} poor {shift_poor:+.3f}"
        bar.set_postfix_str(line.format_map(defaultdict(float, stats)))

    policy.save(model, tokenizer, args.output_dir, args.max_steps, actor.value_head)
    after, texts_after = evaluate(task, model, tokenizer, heldout, **measure, desc="after")
    seconds["ppo"] = time.perf_counter() - start
    result = {"before": before, "after": after, "seconds": {stage: round(s, 1) for stage, s in seconds.items()}}
    result["page"] = str(Path(args.output_dir) / "page.html")
    write_json(Path(args.output_dir) / "result.json", result)
    pages.finish(heldout, texts_before, texts_after)
    print(f"\n{'held-out prompts':24}{'before':>10}{'after':>10}")
    print("\n".join(f"{name:24}{before[name]:10.3f}{after[name]:10.3f}" for name in before))
    print(f"\npolicy: {args.output_dir}/checkpoint-{args.max_steps}\npage:   {result['page']}\n{json.dumps(result)}")


def token_rewards(tokenizer, rollout, feedback, args, rng):
    """delta (B, T) from each sample's feedback, and how many quotes were found in which way."""
    delta, counts = torch.zeros(rollout.mask.shape), dict.fromkeys((*MATCH_KINDS, "ambiguous"), 0)
    for row, (text, said) in enumerate(zip(rollout.texts, feedback)):
        if said is None:
            continue
        if isinstance(said, float):  # a learned number for the whole response
            delta[row, rollout.mask[row].sum() - 1] = said
            continue
        spans, found = resolve(text, said, severities=args.span_weights == "severity")
        spans = ablations.change(spans, text, args, rng)
        offsets = token_offsets(tokenizer, rollout.response[row][rollout.mask[row]].tolist())
        delta[row, : len(offsets)] = span_rewards(offsets, spans, args.span_weights)
        counts = {kind: counts[kind] + found[kind] for kind in counts}
    return delta.to(rollout.response.device), counts


def place(delta, tokenizer, rollout, step_end, args):
    """Rewards (B, T) where --reward wants them: each step's delta summed on its last token. A missing EOS costs at the end.

    A step is a token (span), a sentence or what else ends with step_end (prm), or the whole response (scalar).
    """
    step, last = torch.zeros_like(rollout.response), rollout.mask.sum(1, keepdim=True) - 1
    if args.reward == "span":
        step += torch.arange(step.shape[1], device=step.device)
    elif args.reward == "prm":
        for row, text in enumerate(rollout.texts):
            ids = rollout.response[row][rollout.mask[row]].tolist()
            step[row, : len(ids)] = torch.tensor(steps(token_offsets(tokenizer, ids), text, step_end))
    following = torch.cat([step[:, 1:], torch.full_like(last, -1)], dim=1).scatter(1, last, -1)
    sums = torch.zeros_like(delta).scatter_add(1, step, delta).gather(1, step)
    penalty = args.missing_eos_penalty * (~rollout.finished).float()
    return sums.where(rollout.mask & (step != following), 0.0).scatter_add(1, last, -penalty[:, None])


def full_kl(logits, ref_logits, temperature):
    """The exact KL (T,) of one response from the two models' logits (T, V)."""
    ours, theirs = ((x.float() / temperature).log_softmax(-1) for x in (logits, ref_logits))
    return kl_penalty(ours, theirs, "full")


@torch.no_grad()
def score(actor, reference, rollout, args):
    """Old log-probabilities, entropies, values and KL against the reference, (B, T) each, a microbatch at a time."""
    parts = []
    for rows in torch.arange(len(rollout)).split(args.per_device_train_batch_size):
        some = rollout.rows(rows)
        with autocast(args.bf16):
            logits, states = response_logits(actor.model, some)
            ref_logits, _ = response_logits(reference, some)
            values = actor.values(states, some.mask)
        logprobs, entropy = token_stats(logits, some, args.temperature)
        if args.kl_estimator == "full":  # a response at a time, so that no second tensor of the size of the logits lives
            kl = torch.stack([full_kl(*pair, args.temperature) for pair in zip(logits, ref_logits)]).masked_fill(~some.mask, 0)
        else:
            kl = kl_penalty(logprobs, token_stats(ref_logits, some, args.temperature)[0], args.kl_estimator)
        parts.append((logprobs, entropy, values, kl))
    return [torch.cat(column) for column in zip(*parts)]


@torch.no_grad()
def response_logprobs(actor, rollout, args):
    """log pi (B, T) of the response tokens under the policy as it is now, by one more forward pass."""
    parts = []
    for rows in torch.arange(len(rollout)).split(args.per_device_train_batch_size):
        with autocast(args.bf16):
            parts.append(actor(rollout.rows(rows), args.temperature).logprobs)
    return torch.cat(parts)


def update(actor, optimizer, rollout, batch, args):
    """The PPO epochs over one rollout. Every loss is a sum over tokens, divided by the count of the whole minibatch."""
    sums, optimizer_steps = defaultdict(float), args.num_ppo_epochs * args.num_mini_batches
    for epoch in range(args.num_ppo_epochs):
        for number, minibatch in enumerate(torch.randperm(len(rollout)).chunk(args.num_mini_batches)):
            token_count = batch["mask"][minibatch].sum().clamp(min=1)
            for rows in minibatch.split(args.per_device_train_batch_size):
                b = {name: tensor[rows] for name, tensor in batch.items()}
                with autocast(args.bf16):
                    new = actor(rollout.rows(rows), args.temperature, args.entropy_coef > 0)
                if epoch == number == 0:
                    sums["first_ratio_error"] = max(sums["first_ratio_error"], first_ratio_error(new.logprobs, b, args))
                limits = b["mask"], args.cliprange, token_count
                pg_loss, pg_stats = policy_loss(new.logprobs, b["old_logprobs"], b["advantages"], *limits)
                limits = b["mask"], args.cliprange_value, token_count
                vf_loss, vf_stats = value_loss(new.values, b["old_values"], b["returns"], *limits)
                entropy = (new.entropy * b["mask"]).sum() / token_count
                (pg_loss + args.vf_coef * vf_loss - args.entropy_coef * entropy).backward()
                for name, value in {"policy_loss": pg_loss, "value_loss": vf_loss, **pg_stats, **vf_stats}.items():
                    sums[name] += value.item() / optimizer_steps
            norm = torch.nn.utils.clip_grad_norm_(actor.parameters(), args.max_grad_norm, error_if_nonfinite=True)
            sums["grad_norm"] += norm.item() / optimizer_steps
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    sums["update_tokens"] = args.num_ppo_epochs * int(rollout.prompt_mask.sum() + rollout.mask.sum())
    return dict(sums)


def first_ratio_error(logprobs, b, args):
    """The largest |log rho| before any step: 0 within rounding, or log-probabilities are computed in two ways."""
    error = (logprobs.detach() - b["old_logprobs"]).abs() * b["mask"]
    if not masked_mean(error, b["mask"]) <= (0.05 if args.bf16 else 1e-4):
        raise RuntimeError(f"the first ratio of a step must be 1 within rounding, but |log ratio| is {error.max():.2g}")
    return error.max().item()


def summary(rollout, mask, delta, quotes, kl, entropy, clock):
    """What a step's rollout looked like and how long its parts took; t2g/log.py has the formulas."""
    quote_count, responses = max(sum(quotes[kind] for kind in MATCH_KINDS), 1), max(mask.any(1).sum().item(), 1)
    seconds = [end - start for start, end in itertools.pairwise(clock)]
    return {
        "reward": (delta * mask).sum().item() / responses,
        "kl": (kl * mask).sum().item() / responses,
        "entropy": masked_mean(entropy, mask).item(),
        "tokens_good": masked_mean((delta > 0).float(), mask).item(),
        "tokens_poor": masked_mean((delta < 0).float(), mask).item(),
        "eos_rate": rollout.finished.float().mean().item(),
        "unparsable": 1 - mask.any(1).float().mean().item(),
        **{f"quotes_{kind}": count / quote_count for kind, count in quotes.items()},
        **{f"seconds_{part}": s for part, s in zip(("rollout", "critique", "score", "update", "shift"), seconds)},
        "seconds": clock[-1] - clock[0],
        "peak_memory_gib": peak_memory_gib(),
    }


if __name__ == "__main__":
    main()
