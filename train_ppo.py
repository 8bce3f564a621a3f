"""Stage 3: PPO with token rewards: rollout, critique, spans, token rewards, KL, GAE, update.

    torchrun train_ppo.py                                         # the toy, earlier stages too
    torchrun train_ppo.py --reward scalar --output_dir runs/toy/ppo_scalar    # one scalar
    torchrun train_ppo.py --task summarize --policy HUB_ID --data posts.jsonl --critic rule

The loop in train() is the algorithm, numbered as in docs/GUIDE.md; the maths is in t2g/ppo.py.
Kill it at any moment: the same command resumes it. t2g/dist.py shards it over many processes.
"""

import copy
import time
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path

from t2g import cli  # isort: skip  # first, so that Ctrl-C ends the slow imports quietly
import torch

from t2g import adapters, checkpoint, critics, dist, policy, stages, tasks, torchrun
from t2g.align import SPAN_WEIGHTS
from t2g.folder import run_folder
from t2g.metrics import evaluate, mean_scores, shift, summary, token_counts, value_explained
from t2g.page import SAMPLES_PER_STEP
from t2g.policy import Policy, autocast
from t2g.ppo import AdaptiveKL, gae, policy_loss, value_loss, whiten
from t2g.rewards import place_rewards, token_rewards
from t2g.rollout import sample
from t2g.run import Run, add_step_flags, sampling
from t2g.score import Scores, response_logprobs, score

KL_KINDS = ("full", "k1", "k2", "k3", "abs")


def parse_args():
    parser = cli.parser(__doc__)
    add = cli.flags(parser)
    tasks.add_flags(add)
    critics.add_flags(add)
    add("--policy", None, "starting run, folder, hub id or .gguf file; sft beside the run if none")
    add("--output_dir", None, "folder of the run; runs/TASK/ppo if not given")
    add("--eval_samples", 64, "held-out prompts that are measured before and after")
    add("--tensorboard", False, "also write TensorBoard files")
    add_algorithm_flags(add)
    for module in (adapters, dist, checkpoint):
        module.add_flags(add)
    task, args = tasks.parse(parser, "train_ppo")
    args.output_dir = args.output_dir or f"runs/{task.NAME}/ppo"
    args.batch_size = dist.batch_size(args) * args.num_mini_batches
    args.save_steps = args.save_steps or max(1, min(20, args.max_steps // 10))
    if args.kl_target and not args.kl_coef:
        cli.fail("--kl_target multiplies --kl_coef, which must therefore be above 0")
    if args.kl_target and args.batch_size >= 5 * args.kl_horizon:
        cli.fail(f"--kl_horizon must be above a fifth of a step's {args.batch_size} responses")
    return task, args


def add_algorithm_flags(add):
    at_least_0, share = cli.between(0, 1e6), cli.between(0, 1)
    where = "rewards stay on tokens (span), or are summed per step (prm) or response (scalar)"
    add("--reward", "span", where, ("span", "prm", "scalar"))
    add("--span_weights", "uniform", "weights of the tokens of a span", tuple(SPAN_WEIGHTS))
    add_step_flags(add, num_ppo_epochs=4)
    add("--missing_eos_penalty", 1.0, "penalty of a response without EOS", at_least_0)
    add("--kl_coef", 0.05, "initial coefficient of the KL penalty", at_least_0)
    add("--kl_estimator", "full", "estimator of the KL penalty; full is exact", KL_KINDS)
    add("--kl_target", None, "target KL of a response; kl_coef adapts to it", cli.positive(float))
    add("--kl_horizon", 10000.0, "number of responses over which kl_coef adapts")
    add("--cliprange", 0.2, "clip range of the ratio")
    add("--cliprange_value", 0.2, "clip range of the value function")
    add("--vf_coef", 0.1, "weight of the value loss", at_least_0)
    rate = "learning rate of the value head; 0.2 / hidden size if not given"
    add("--value_learning_rate", None, rate, cli.positive(float))
    add("--entropy_coef", 0.0, "weight of the entropy bonus", at_least_0)
    add("--gamma", 1.0, "discount factor", share)
    add("--lam", 0.95, "lambda of GAE", share)


@cli.friendly_errors()
def main():
    task, args = parse_args()
    root = Path(args.output_dir).parent
    start_model = args.policy or root / "sft"
    needed = ["sft", *critics.stages_before(args)]
    earlier = partial(stages.ensure, needed, args, root, args.policy)
    with torchrun.session(args.cpu_offload, run_first=earlier) as seconds:
        start = time.perf_counter()
        tokenizer, model = policy.load(start_model, empty=True)
        parts = tasks.load(task, args)
        pool, heldout = (tasks.short_enough(part, tokenizer, model, args) for part in parts)
        measured = heldout[: args.eval_samples]
        critic = critics.load_critic(task, args, root)
        actor, reference = make_models(model, args, start_model)
        measure = partial(evaluate, task, actor.model, tokenizer, measured, args)
        with run_folder(args) as folder:
            before = measure("before")
            run = Run(args, task, tokenizer, actor, pool, heldout, folder)
            train(task, args, actor, reference, critic, tokenizer, run)
            after = measure("after")
            if dist.rank() == 0:
                seconds |= {"ppo": time.perf_counter() - start}
                run.samples.finish(args, before, after, seconds)


def make_models(model, args, start):
    """The policy with its value head, and the frozen reference, which LoRA does not need (None)."""
    reference = None if args.lora_r else dist.frozen(copy.deepcopy(model), args)
    torch.manual_seed(args.seed)  # for LoRA's first weights
    actor = Policy(adapters.added(model, args)).eval()  # no dropout: the first ratio must be 1
    actor.load_value_head(start)
    dist.shard(actor.model, args.bf16, args.cpu_offload, args.gradient_checkpointing)
    dist.shard(actor.value_head, cpu_offload=args.cpu_offload)
    return actor, reference


def train(task, args, actor, reference, critic, tokenizer, run):
    """The algorithm: in each step one rollout, and one PPO update on it."""
    kl_controller = AdaptiveKL(run.kl_coef, args.kl_target, args.kl_horizon)
    show_heldout(0, actor, reference, critic, run)
    for step in run.steps():
        # 1. Rollout: one sampled response to each prompt of this rank.
        examples = run.draw(step)
        prompts = [example.prompt for example in examples]
        with dist.whole(actor.model):
            rollout = sample(actor.model, tokenizer, prompts, **sampling(args))
        run.end_phase("rollout")

        # 2. Critique: what is wrong, and where. An unreadable one, None, is masked out of the loss.
        feedback = critic(examples, rollout.texts)
        run.end_phase("critique")

        # 3. Spans -> token rewards delta, in {-1, 0, +1} by default, placed as --reward says.
        delta, quotes = token_rewards(tokenizer, rollout, feedback, args)
        placed = place_rewards(delta, tokenizer, rollout, task, args)

        # 4. KL penalty: r_t = placed_t - kl_coef KL_t. From here on, tensors are of all ranks.
        old = score(actor, reference, rollout, args)
        mask, delta, placed, old = global_batch(rollout, feedback, delta, placed, old)
        check_reference(step, old.kl)
        rewards = placed - kl_controller.value * old.kl

        # 5. Advantages by GAE, whitened over the batch.
        advantages, returns = gae(rewards, old.values, mask, args.gamma, args.lam)
        whitened = whiten(advantages, mask)
        run.end_phase("score")

        # 6. PPO: a few epochs of minibatches against the clipped losses.
        batch = dict(old_logprobs=old.logprobs, old_values=old.values, advantages=whitened)
        batch |= dict(returns=returns, mask=mask)
        stats = update(actor, run.optimizer, rollout, batch, args)
        run.end_phase("update")

        # 7. Did the criticised tokens move? Log, save, and steer the KL coefficient.
        change = (dist.gather(response_logprobs(actor, rollout, args)) - old.logprobs) * mask
        run.end_phase("shift")
        stats |= shift(change, delta, mask) | summary(mask, delta, quotes, old.kl, old.entropy)
        stats |= token_counts(tokenizer, rollout, feedback) | {"kl_coef": kl_controller.value}
        stats |= {"value_explained": value_explained(old.values, returns, mask)}
        run.log(step, stats | dist.means(mean_scores(task, examples, rollout.texts)))
        numbers = dict(delta=delta, kl=old.kl, value=old.values, advantage=whitened, shift=change)
        run.samples.add(step, tokenizer, examples, rollout, feedback, **numbers)
        show_heldout(step, actor, reference, critic, run)
        kl_controller.update(stats["kl"], int(mask.any(1).sum()))
        run.save_or_stop(step, kl_controller.value)


def show_heldout(step, actor, reference, critic, run):
    """Steps 1 to 4 on a few held-out prompts, with the same random numbers each time."""
    args, examples = run.args, run.heldout[:SAMPLES_PER_STEP]
    if step not in run.samples.steps or step < run.first - 1:  # not shown, or before a resumed run
        return
    generator = torch.Generator(dist.device()).manual_seed(args.seed)
    prompts = [example.prompt for example in examples]
    with dist.whole(actor.model):
        options = sampling(args) | {"generator": generator}
        rollout = sample(actor.model, run.tokenizer, prompts, **options)
    feedback = critic(examples, rollout.texts)  # on all ranks, for a learned critic is sharded
    delta, _ = token_rewards(run.tokenizer, rollout, feedback, args)
    old = score(actor, reference, rollout, args)
    numbers = dict(delta=delta, kl=old.kl, value=old.values)
    run.samples.add(step, run.tokenizer, examples, rollout, feedback, heldout=True, **numbers)


def global_batch(rollout, feedback, delta, placed, old):
    """The tensors of all ranks, and the mask of tokens with a readable critique. Collective."""
    readable = torch.tensor([one is not None for one in feedback], device=delta.device)
    mask = dist.gather(rollout.mask & readable[:, None])
    return mask, dist.gather(delta), dist.gather(placed), Scores(*map(dist.gather, old))


def check_reference(step, kl):
    if step == 1 and not kl.abs().max() <= 1e-3:
        fault = f"policy and reference differ before the first update (KL {kl.abs().max():.2g})"
        raise RuntimeError(f"{fault}: is there dropout, or do the two compute in different dtypes?")


def update(actor, optimizer, rollout, batch, args) -> dict[str, float]:
    """The PPO epochs over one rollout; `batch` holds (B, T) tensors of the global batch.

    A minibatch without a readable critique, or whose gradient is not finite, changes nothing and is
    counted. Returns means over the steps taken.
    """
    length = rollout.mask.shape[1]  # of this rank's longest response; other ranks' may be longer
    batch = {name: dist.own(x)[:, :length] for name, x in batch.items()}
    taken = []  # the statistics of each optimiser step: this rank's parts of global means
    first_ratio_error = 0.0
    for minibatch in minibatches(len(rollout), args):
        token_count = dist.total(batch["mask"][minibatch].sum())
        if not token_count:  # a step would still move the weights, by Adam's momentum
            continue
        stats = accumulate_gradient(actor, rollout, batch, minibatch, token_count, args)
        ratio_error = stats.pop("ratio_error")
        if not taken:
            first_ratio_error = dist.total(ratio_error).item()
            check_first_ratio(first_ratio_error, args.bf16)
        norm = torch.nn.utils.clip_grad_norm_(actor.parameters(), args.max_grad_norm)
        norm = dist.plain(norm)  # the norm before clipping
        if norm.isfinite():
            optimizer.step()
            taken.append(stats | {"grad_norm": norm / dist.size()})  # the same on each rank
        optimizer.zero_grad(set_to_none=True)
    tokens = args.num_ppo_epochs * int(rollout.prompt_mask.sum() + rollout.mask.sum())
    totals = dist.totals(means(taken) | {"update_tokens": tokens})
    skipped = args.num_ppo_epochs * args.num_mini_batches - len(taken)
    return totals | {"first_ratio_error": first_ratio_error, "skipped_updates": skipped}


def minibatches(count, args):
    """Yields random minibatches of the rows; an epoch has each row once."""
    for _ in range(args.num_ppo_epochs):
        yield from torch.randperm(count).chunk(args.num_mini_batches)


def accumulate_gradient(actor, rollout, batch, minibatch, token_count, args) -> dict:
    """Adds up a minibatch's gradient over its microbatches, and returns its statistics.

    Each loss is a sum over tokens divided by token_count, that of the global minibatch, so no split
    into microbatches or ranks changes the step.
    """
    sums = defaultdict(float)
    # Sorted rows have prompts of similar length.
    for rows in minibatch.sort().values.split(args.per_device_train_batch_size):
        part = {name: x[rows] for name, x in batch.items()}
        loss, stats = microbatch_loss(actor, rollout.rows(rows), part, token_count, args)
        loss.backward()
        for name, value in stats.items():
            sums[name] += value.detach()
    return sums


def microbatch_loss(actor, rollout, batch, token_count, args):
    """A microbatch's part of its minibatch's loss, and of the statistics."""
    with autocast(args.bf16):
        new = actor(rollout, args.temperature, with_entropy=args.entropy_coef > 0)
    mask, old_logprobs, old_values = batch["mask"], batch["old_logprobs"], batch["old_values"]
    pg_loss, pg_stats = policy_loss(
        new.logprobs, old_logprobs, batch["advantages"], mask, args.cliprange, token_count
    )
    vf_loss, vf_stats = value_loss(
        new.values, old_values, batch["returns"], mask, args.cliprange_value, token_count
    )
    loss = pg_loss + args.vf_coef * vf_loss
    if args.entropy_coef:
        loss = loss - args.entropy_coef * (new.entropy * mask).sum() / token_count
    stats = {"policy_loss": pg_loss, "value_loss": vf_loss, **pg_stats, **vf_stats}
    stats["ratio_error"] = ((new.logprobs - old_logprobs).abs() * mask).sum() / token_count
    return loss, stats


def means(rows: list[dict]) -> dict[str, float]:
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    return {name: torch.stack(x).double().mean().item() for name, x in columns.items()}


def check_first_ratio(error, bf16):
    """Checks that rho is 1 within rounding before the first optimiser step on a rollout.

    Otherwise score() and the update compute different log-probabilities. error: the mean |log rho|
    of that minibatch. bf16 logits of 16 to 32 are multiples of 0.125, so bf16 only warns, once.
    """
    if not bf16 and not error <= 1e-4:
        fault = f"the first ratio of a step must be 1, but the mean |log ratio| is {error:.2g}"
        raise RuntimeError(f"{fault}: is there dropout, or is padding not masked?")
    if not error <= 0.05 and dist.rank() == 0:  # Python shows a warning of the same text once
        text = "first ratios are far from 1: see first_ratio_error in metrics.jsonl"
        warnings.warn(text, stacklevel=2)


if __name__ == "__main__":
    main()
