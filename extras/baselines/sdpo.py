"""SDPO, self-distillation from feedback, a baseline: the policy that has read the critique teaches.

    L = sum_t KL( pi(. | x, y_<t) || pi_teacher(. | x, y, c, y_<t) ) / number of tokens
                                                Huebotter et al. 2026 (arXiv 2601.20802), eq. 1

Rollout and critique are those of train_ppo.py. The teacher is an average of the policy's earlier
weights. Its prompt shows the response and the words of the critique, and the policy learns the
teacher's distribution at each token of the response, or of its poor spans alone (--tokens poor).
Values are not used. Left out: other divergences, other responses as demonstrations (each prompt is
answered once), off-policy correction in later epochs, and resuming.

python -m extras.baselines.sdpo                                     # the toy, into runs/toy/sdpo
python -m extras.baselines.sdpo --task summarize --policy HUB_ID --data posts.jsonl --critic rule
"""

import copy
from collections import defaultdict
from dataclasses import replace

import torch
from tqdm import trange

from extras.baselines import common
from t2g import cli, critics, dist, policy, tasks
from t2g.folder import open_log
from t2g.metrics import mean_scores, shift, summary, token_counts
from t2g.policy import Policy, Scores, autocast, check_numbers, now, response_logits
from t2g.ppo import kl_penalty, vocabulary_logprobs
from t2g.rewards import token_rewards
from t2g.rollout import encode_prompts, sample, step_rng
from t2g.run import add_step_flags, sampling, seconds_of
from t2g.score import response_logprobs, score

TOY = dict(
    learning_rate=1.7e-4, max_steps=45, per_device_train_batch_size=32, num_mini_batches=2,
    num_ppo_epochs=2, response_length=40
)  # fmt: skip
METRICS = {
    "divergence": "KL(policy || teacher that has read the critique) in nats, mean over tokens",
    "teacher_tokens": "tokens that the teacher read",
    "too_long": "share of responses whose critique does not fit the teacher's context",
}
STATUS = "reward {reward:+.2f} kl {kl:.2f} divergence {divergence:.4f}"


def add_flags(add):
    add("--tokens", "all", "which tokens learn: all, or those of poor spans", ("all", "poor"))
    rate = "r in teacher <- (1 - r) teacher + r policy, after each step; 0: never updated"
    add("--teacher_update_rate", 0.05, rate, cli.between(0, 1))
    add_step_flags(add, num_ppo_epochs=1)
    dist.add_flags(add)


@cli.friendly_errors()
def main():
    task, args = common.parse(__doc__, "sdpo", add_flags, TOY)
    args.batch_size = dist.batch_size(args) * args.num_mini_batches
    with common.started(args, empty=True) as (root, tokenizer, model):
        critic = critics.load_critic(task, args, root)
        pool = tasks.short_enough(tasks.load(task, args)[0], tokenizer, model, args)
        train(task, args, tokenizer, model, critic, pool)
        saved = policy.save(model, tokenizer, args.output_dir, args.max_steps)
        print(f"policy: {saved}")


def make_models(model, args):
    """Returns the policy, its teacher and the frozen reference, on their devices."""
    reference = dist.frozen(copy.deepcopy(model).requires_grad_(False), args)
    teacher = model
    if args.teacher_update_rate < 1:
        teacher = copy.deepcopy(model).requires_grad_(False)
        dist.shard(teacher, args.bf16, args.cpu_offload)  # as the policy, whose weights it averages
    actor = Policy(model)  # score() wants one; its values are not used
    dist.shard(model, args.bf16, args.cpu_offload, args.gradient_checkpointing)
    actor.value_head.to(dist.device())
    return actor, teacher, reference


def train(task, args, tokenizer, model, critic, pool):
    actor, teacher, reference = make_models(model, args)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    folder = cli.fresh_folder(args.output_dir) if dist.rank() == 0 else None
    log = open_log(folder, args, task.METRICS | METRICS)
    bar = trange(1, args.max_steps + 1, desc="SDPO", unit="step", disable=dist.rank() > 0)
    for step in bar:
        clock, rate = [now()], args.learning_rate * (1 - (step - 1) / args.max_steps)
        optimizer.param_groups[0]["lr"] = rate

        # 1. Rollout: one sampled response to each prompt, the prompts of train_ppo.py.
        drawn = step_rng(args.seed, step, dist.rank()).choices(pool, k=args.batch_size)
        examples = sorted(dist.own(drawn), key=lambda example: len(example.prompt))
        prompts = [example.prompt for example in examples]
        with dist.whole(model):
            rollout = sample(model, tokenizer, prompts, **sampling(args))
        clock.append(now())

        # 2. Critique: None is unreadable, and masked out of the loss.
        feedback = critic(examples, rollout.texts)
        clock.append(now())

        # 3. Hindsight: the same responses after prompts that show response and critique.
        hindsight, fits = add_critiques(tokenizer, model, prompts, rollout, feedback)
        mask = rollout.mask & fits[:, None]

        # 4. Token rewards and KL, which are logged; with --tokens poor, delta < 0 also selects.
        delta, quotes = token_rewards(tokenizer, rollout, feedback, args)
        learns = mask & (delta < 0) if args.tokens == "poor" else mask
        old = score(actor, reference, rollout, args)
        mask, delta, old = dist.gather(mask), dist.gather(delta), Scores(*map(dist.gather, old))
        clock.append(now())

        # 5. Distillation by minibatches; then the teacher follows the policy.
        stats = update(model, teacher, optimizer, rollout, hindsight, learns, args)
        move_teacher(teacher, model, args.teacher_update_rate)
        clock.append(now())

        # 6. Did the criticised tokens move?
        change = (dist.gather(response_logprobs(actor, rollout, args)) - old.logprobs) * mask
        clock.append(now())
        stats |= shift(change, delta, mask) | summary(mask, delta, quotes, old.kl, old.entropy)
        stats |= token_counts(tokenizer, rollout, feedback) | seconds_of(clock)
        means = mean_scores(task, examples, rollout.texts) | unread(feedback, fits)
        stats |= dist.means(means) | {"learning_rate": rate}
        log(step, stats)
        bar.set_postfix_str(STATUS.format_map(defaultdict(float, stats)))


def unread(feedback, fits) -> dict[str, float]:
    unparsable = feedback.count(None) / len(feedback)
    too_long = (~fits).sum().item() / len(feedback) - unparsable
    return {"unparsable": unparsable, "too_long": too_long}


def add_critiques(tokenizer, model, prompts, rollout, feedback):
    """Returns the rollout as the teacher reads it: after prompts that ask for a revision.

    A row without a readable critique, or without room for it, keeps its own prompt.

    Returns: the rollout, and the rows that have their critique, (B,) bool.
    """
    width, texts, fits = rollout.response.shape[1], [], []
    for prompt, response, one in zip(prompts, rollout.texts, feedback):
        text = common.fitting_revision(model, tokenizer, prompt, response, one, width)
        texts.append(text or prompt)
        fits.append(text is not None)
    prompt, prompt_mask = encode_prompts(tokenizer, texts, rollout.response.device)
    hindsight = replace(rollout, prompt=prompt, prompt_mask=prompt_mask)
    return hindsight, torch.tensor(fits, device=prompt.device)


def token_divergence(model, teacher, rollout, hindsight, args):
    """Returns the divergence (B, T) at each response token, with a gradient for the policy only.

    With the teacher q, the gradient is sum_v pi(v) (log pi(v) - log q(v)) grad log pi(v): a policy
    gradient in which every token v of the vocabulary has the advantage log q(v) - log pi(v).
    """
    with torch.no_grad(), autocast(args.bf16):
        teacher_logits, _ = response_logits(teacher, hindsight)
    with autocast(args.bf16):
        logits, _ = response_logits(model, rollout)
    both = [vocabulary_logprobs(x, args.temperature) for x in (logits, teacher_logits)]
    return kl_penalty(*both, "full")


def update(model, teacher, optimizer, rollout, hindsight, mask, args) -> dict[str, float]:
    """The passes over one rollout. The loss is a mean over the tokens of the whole minibatch."""
    sums, taken = defaultdict(float), 0
    for _ in range(args.num_ppo_epochs):
        for minibatch in torch.randperm(len(rollout)).chunk(args.num_mini_batches):
            token_count = dist.total(mask[minibatch].sum())
            if not token_count:  # a step would still move the weights, by Adam's momentum
                continue
            for rows in minibatch.sort().values.split(args.per_device_train_batch_size):
                parts = rollout.rows(rows), hindsight.rows(rows)
                per_token = token_divergence(model, teacher, *parts, args)
                loss = per_token.masked_fill(~mask[rows], 0).sum() / token_count
                loss.backward()
                sums["divergence"] += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            norm = dist.plain(norm)
            check_numbers(norm)
            sums["grad_norm"] += norm.item() / dist.size()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            taken += 1
    sums = {name: total / taken for name, total in sums.items()}
    for name, read in (("update_tokens", rollout), ("teacher_tokens", hindsight)):
        sums[name] = args.num_ppo_epochs * int(read.prompt_mask.sum() + read.mask.sum())
    return dist.totals(sums)


@torch.no_grad()
def move_teacher(teacher, model, rate):
    """teacher <- (1 - rate) teacher + rate policy, for each weight."""
    dist.reshard(model)  # after a step without an update its weights are still whole
    for average, weight in zip(teacher.parameters(), model.parameters()):
        average.lerp_(weight, rate)


if __name__ == "__main__":
    main()
