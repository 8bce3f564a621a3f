"""One PPO step on a given rollout, for tests that compare the weights after it.

torchrun --nproc_per_node 2 tests/one_step.py MODEL OUT [CASE ...]    # OUT/CASE.safetensors each
"""

import argparse
import copy
import sys
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from t2g import cpu, dist, policy, torchrun
from t2g.checkpoint import trainable
from t2g.ppo import gae, masked_mean, whiten
from t2g.rollout import Rollout
from t2g.score import score
from train_ppo import make_models, update

PLAIN = dict(
    per_device_train_batch_size=1, num_ppo_epochs=2, num_mini_batches=1, temperature=0.9,
    entropy_coef=0.01, kl_estimator="full", cliprange=0.2, cliprange_value=0.2, vf_coef=0.1,
    max_grad_norm=0.5, bf16=False, cpu_offload=False, replicate_frozen=False, seed=3,
    gradient_checkpointing=False, lora_r=None, lora_alpha=32.0, lengths=(7, 3, 2, 5), unreadable=(),
    learning_rate=3e-4,  # a larger one lets Adam blow up the rounding of a gradient near 0
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
    """This rank's part of four prompts and four responses of these lengths."""
    rng = torch.Generator().manual_seed(5)
    prompt = torch.randint(5, vocabulary, (4, 6), generator=rng)
    response = torch.randint(5, vocabulary, (4, max(lengths)), generator=rng)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    prompt_mask = torch.arange(6) >= torch.tensor([0, 2, 1, 3])[:, None]
    tensors = (prompt, prompt_mask, response * mask, mask)
    prompt, prompt_mask, response, mask = (dist.own(x).to(dist.device()) for x in tensors)
    width = mask.sum(1).max()
    response, mask = response[:, :width], mask[:, :width]
    return Rollout(prompt, prompt_mask, response, mask, mask.any(1), [""] * len(mask))


@mock.patch.object(cpu, "emulates_bf16", lambda: False)  # bf16 is tested on any CPU
def one_step(model, case) -> tuple[dict, dict]:
    """All weights after the update, and its statistics."""
    args = argparse.Namespace(**PLAIN | CASES[case])
    actor, reference = make_models(copy.deepcopy(model), args, "nowhere")
    weights, rate = trainable(actor).values(), args.learning_rate
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0, fused=True)
    rollout = rollout_of(args.lengths, model.config.vocab_size)
    device, width = rollout.mask.device, rollout.mask.shape[1]
    readable = dist.own(torch.tensor([row not in args.unreadable for row in range(4)])).to(device)
    delta = torch.randint(-1, 2, (4, 9), generator=torch.Generator().manual_seed(6)).float()
    delta = dist.own(delta)[:, :width].to(device)
    old = score(actor, reference, rollout, args)
    tensors = (rollout.mask & readable[:, None], delta, *old)
    mask, delta, logprobs, entropy, values, kl = map(dist.gather, tensors)
    advantages, returns = gae(delta - 0.1 * kl, values, mask, 1.0, 0.95)
    batch = dict(old_logprobs=logprobs, old_values=values, returns=returns, mask=mask)
    batch["advantages"] = whiten(advantages, mask)
    stats = update(actor, optimizer, rollout, batch, args)
    stats["entropy"] = masked_mean(entropy, mask).item()
    return dist.whole_state(actor), stats


if __name__ == "__main__":
    with torchrun.session():
        torch.set_num_threads(1)
        torch.backends.cuda.matmul.allow_tf32 = False
        _, model = policy.load(sys.argv[1], empty=True)
        for case in sys.argv[3:] or CASES:
            state, stats = one_step(model, case)
            stats["processes"] = dist.size()
            for name, value in stats.items():
                state[f"stats.{name}"] = torch.tensor(value, dtype=torch.float64)
            if dist.rank() == 0:
                state = {name: tensor.clone() for name, tensor in state.items()}
                save_file(state, f"{sys.argv[2]}/{case}.safetensors")
            dist.barrier()
