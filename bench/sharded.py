"""What sharding costs where there is nothing to share: a plain model against the same under FSDP2 in one process, in turns.
A ratio above 1 says that the sharded one is faster.

    torchrun bench/sharded.py HUB_ID_OR_FOLDER

The last line is one JSON object, {"rollout": ratio, "update": ratio, "step": ratio}, medians over the turns.
"""

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from t2g import dist, policy
from t2g.policy import Policy, now
from t2g.ppo import gae, whiten
from t2g.rollout import sample
from train_ppo import score, update


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--response_length", type=int, default=48)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    of_ppo = dict(num_ppo_epochs=1, num_mini_batches=1, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, max_grad_norm=1.0)
    of_ppo |= dict(per_device_train_batch_size=args.rows // 2, entropy_coef=0.0, temperature=1.0, kl_estimator="k3")
    vars(args).update(of_ppo)
    tokenizer, model = policy.load(args.model, policy.device())
    prompts = ["Say what this text is about: " + "the cat sat on the mat and slept, " * 5] * args.rows
    plain = Policy(copy.deepcopy(model)).to(policy.device())
    dist.start()
    sharded = Policy(model)
    dist.shard(sharded.model, args.bf16)
    dist.shard(sharded.value_head)
    actors = {"plain": plain, "sharded": sharded}
    optimizers = {name: torch.optim.AdamW(actor.parameters(), lr=1e-7) for name, actor in actors.items()}
    seconds = {(name, part): [] for name in actors for part in ("rollout", "update")}
    for turn in range(args.turns + 1):  # the first one warms up
        for name in sorted(actors, reverse=turn % 2 == 0):
            times = step(actors[name], optimizers[name], tokenizer, prompts, args)
            for part, time in times.items() if turn else ():
                seconds[name, part].append(time)
            print(f"turn {turn} {name:8}" + "".join(f"{part:>10} {time:.3f} s" for part, time in times.items()), flush=True)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    ratio = {part: median["plain", part] / median["sharded", part] for part in ("rollout", "update")}
    whole = {name: sum(median[name, part] for part in ratio) for name in actors}
    print(json.dumps({name: round(value, 3) for name, value in (ratio | {"step": whole["plain"] / whole["sharded"]}).items()}))


def step(actor, optimizer, tokenizer, prompts, args):
    torch.manual_seed(0)
    start = now()
    with dist.whole(actor.model):
        rollout = sample(actor.model, tokenizer, prompts, args.response_length, bf16=args.bf16)
    sampled = now()
    logprobs, _, values, kl = score(actor, actor.model, rollout, args)
    advantages, returns = gae(torch.ones_like(kl), values, rollout.mask, 1.0, 0.95)
    batch = dict(old_logprobs=logprobs, advantages=whiten(advantages, rollout.mask), old_values=values, returns=returns)
    update(actor, optimizer, rollout, batch | {"mask": rollout.mask}, args)
    return {"rollout": sampled - start, "update": now() - sampled}


if __name__ == "__main__":
    main()
