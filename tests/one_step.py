"""One PPO step on a rollout that is given, in as many processes as start it: what it leaves must not hang on their number.

torchrun --nproc_per_node 2 tests/one_step.py MODEL OUT         # writes OUT/CASE.safetensors for each case
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from t2g import adapters, checkpoint, dist, policy
from t2g.policy import Policy
from t2g.ppo import gae, masked_mean, whiten
from t2g.rollout import Rollout
from train_ppo import score, update

PLAIN = dict(
    per_device_train_batch_size=1, num_ppo_epochs=2, num_mini_batches=1, temperature=0.9, entropy_coef=0.01, kl_estimator="full",
    cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, max_grad_norm=0.5, bf16=False, cpu_offload=False, replicate_frozen=False,
    gradient_checkpointing=False, lora_r=None, lora_alpha=32.0, lengths=(7, 3, 2, 5), unreadable=(),
    learning_rate=3e-4,  # no more, for Adam blows up the rounding of a gradient that is nearly 0
)  # fmt: skip
CASES = {
    "uneven_lengths": {},
    "microbatches": {"per_device_train_batch_size": 2},
    "one_critique_is_unreadable": {"unreadable": (1,)},
    "all_of_one_process_are_unreadable": {"unreadable": (2, 3)},
    "all_are_unreadable": {"unreadable": (0, 1, 2, 3)},
    "lora": {"lora_r": 4},
    "lora_and_an_unreadable_process": {"lora_r": 4, "unreadable": (0, 1)},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "replicated_reference": {"replicate_frozen": True},
    "bf16": {"bf16": True, "learning_rate": 3e-3},
}


def rollout_of(lengths, vocabulary) -> Rollout:
    """Four prompts and four responses of these lengths; a process has its part, no wider than the longest of its own."""
    rng = torch.Generator().manual_seed(5)
    prompt = torch.randint(5, vocabulary, (4, 6), generator=rng)
    response = torch.randint(5, vocabulary, (4, max(lengths)), generator=rng)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    prompt_mask = torch.arange(6) >= torch.tensor([0, 2, 1, 3])[:, None]
    prompt, prompt_mask, response, mask = map(
        dist.own, (prompt, prompt_mask, response * mask, mask)
    )
    width = mask.sum(1).max()
    return Rollout(
        prompt, prompt_mask, response[:, :width], mask[:, :width], mask.any(1), [""] * len(mask)
    )


def one_step(model, case) -> tuple[dict, dict]:
    """All weights after the update, and the metrics of it."""
    args = argparse.Namespace(**PLAIN | CASES[case])
    torch.manual_seed(3)  # of LoRA's first weights
    reference = None if args.lora_r else dist.frozen(copy.deepcopy(model), args)
    actor = Policy(adapters.added(copy.deepcopy(model), args).eval())
    dist.shard(actor.model, args.bf16, recompute=args.gradient_checkpointing)
    dist.shard(actor.value_head)
    optimizer = torch.optim.AdamW(
        checkpoint.trainable(actor).values(), lr=args.learning_rate, weight_decay=0.0, fused=True
    )
    rollout = rollout_of(args.lengths, model.config.vocab_size)
    readable = dist.own(torch.tensor([row not in args.unreadable for row in range(4)]))
    delta = dist.own(
        torch.randint(-1, 2, (4, 9), generator=torch.Generator().manual_seed(6)).float()
    )[:, : rollout.mask.shape[1]]
    scored = score(actor, reference, rollout, args)
    mask, delta, logprobs, entropy, values, kl = map(
        dist.gather, (rollout.mask & readable[:, None], delta, *scored)
    )
    advantages, returns = gae(delta - 0.1 * kl, values, mask, 1.0, 0.95)
    batch = dict(
        old_logprobs=logprobs,
        advantages=whiten(advantages, mask),
        old_values=values,
        returns=returns,
        mask=mask,
    )
    stats = update(actor, optimizer, rollout, batch, args)
    stats["entropy"] = masked_mean(entropy, mask).item()
    return dist.whole_state(actor), stats


if __name__ == "__main__":
    with dist.session():
        torch.set_num_threads(1)
        _, model = policy.load(sys.argv[1])
        for case in CASES:
            state, stats = one_step(model, case)
            stats["processes"] = dist.size()
            state |= {
                f"stats.{name}": torch.tensor(value, dtype=torch.float64)
                for name, value in stats.items()
            }
            if dist.rank() == 0:
                save_file(
                    {name: tensor.clone() for name, tensor in state.items()},
                    f"{sys.argv[2]}/{case}.safetensors",
                )
            dist.barrier()
