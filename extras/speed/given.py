"""One PPO step on made-up work, in this process: what the benches of this folder time and profile.

It calls the functions of train_ppo.py that the loop calls. Left out: critics, alignment, logging.
"""

import copy
import random
import sys
from contextlib import nullcontext
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import train_ppo
from t2g import adapters, dist, policy
from t2g.policy import Policy, now
from t2g.ppo import gae, whiten
from t2g.rollout import Rollout, encode_prompts
from t2g.tasks import toy

SHAPES = {
    "SmolLM2-135M": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536,
                         num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3),
    "Llama-1B": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192,
                     num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8),
    "tiny": dict(vocab_size=2048, hidden_size=32, intermediate_size=64,
                 num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
}  # fmt: skip
WORDS = (
    "the a river house bread old green walks sings under over town morning paper letter boat "
    "seven many children and but"
).split()


def random_model(shape, folder=None, **config):
    """The toy's tokenizer, and a Llama with random weights of one of SHAPES; folder gets both."""
    tokenizer = toy.new_model(0)[0]
    special = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    settings = SHAPES[shape] | special | {"tie_word_embeddings": True} | config
    torch.manual_seed(0)
    with torch.device(policy.device() if folder is None else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    if folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return tokenizer, model


def sentences(count, words=22, seed=0) -> list[str]:
    """Made-up sentences of so many words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)).capitalize() + "." for _ in range(count)]


def train_flags(*words):
    """The arguments of train_ppo.py with these flags; the rule is the critic."""
    command = ["train_ppo.py", "--task", "summarize", "--critic", "rule", *map(str, words)]
    with mock.patch.object(sys, "argv", command):
        return train_ppo.parse_args()[1]


def made_up(rows, prompt, new, vocabulary, uneven=False) -> Rollout:
    """A rollout of random tokens; uneven prompts are padded on the left, responses on the right."""
    rng = torch.Generator().manual_seed(5)
    ids = torch.randint(5, vocabulary, (rows, prompt + new), generator=rng)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if uneven:
        mask[:, :prompt] = torch.arange(prompt) >= torch.arange(rows)[:, None] % prompt
        mask[:, prompt:] = torch.arange(new) < new - torch.arange(rows)[:, None] % new
    ids, mask = (tensor.to(policy.device()) for tensor in (ids * mask, mask))
    finished = mask[:, 0] | True
    parts = ids[:, :prompt], mask[:, :prompt], ids[:, prompt:], mask[:, prompt:]
    return Rollout(*parts, finished, [""] * rows)


class Learner:
    """A policy, its reference and its optimiser, as train_ppo.py makes them.

    force_fsdp shards the models even in one process, where nothing has to be shared.
    """

    def __init__(self, model, args, force_fsdp=False):
        self.args = args
        with mock.patch.object(dist, "size", lambda: 2) if force_fsdp else nullcontext():
            self.reference = None if args.lora_r else dist.frozen(copy.deepcopy(model), args)
            torch.manual_seed(3)  # for the first weights of LoRA
            self.actor = Policy(adapters.added(model, args).eval())
            checkpointing = args.gradient_checkpointing
            dist.shard(self.actor.model, args.bf16, args.cpu_offload, checkpointing)
            dist.shard(self.actor.value_head, cpu_offload=args.cpu_offload)
        trained = [weights for weights in self.actor.parameters() if weights.requires_grad]
        rate = args.learning_rate
        self.optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)

    def learn(self, rollout) -> dict[str, float]:
        """Scores the rollout and updates on random rewards. Returns the seconds of each part."""
        torch.manual_seed(4)  # for the order of minibatches
        delta = torch.randint(-1, 2, rollout.mask.shape).float().to(rollout.mask.device)
        start, mask = now(), rollout.mask
        scored = train_ppo.score(self.actor, self.reference, rollout, self.args)
        old_logprobs, _, old_values, kl = scored
        advantages, returns = gae(delta - 0.1 * kl, old_values, mask, 1.0, 0.95)
        batch = dict(old_logprobs=old_logprobs, old_values=old_values, returns=returns)
        batch |= dict(advantages=whiten(advantages, mask), mask=mask)
        scored = now()
        train_ppo.update(self.actor, self.optimizer, rollout, batch, self.args)
        updated = now()
        train_ppo.response_logprobs(self.actor, rollout, self.args)
        return {"score": scored - start, "update": updated - scored, "shift": now() - updated}


@torch.no_grad()
def generate_seconds(model, tokenizer, prompts, new, bf16=False) -> float:
    """Seconds of transformers' generate for `new` tokens to each prompt; bf16 means autocast."""
    ids, mask = encode_prompts(tokenizer, prompts, model.device)
    length = dict(min_new_tokens=new, max_new_tokens=new, pad_token_id=tokenizer.pad_token_id)
    start = now()
    with policy.autocast(bf16):
        sampling = dict(do_sample=True, top_k=0, top_p=1.0, **length)
        model.generate(input_ids=ids, attention_mask=mask.long(), **sampling)
    return now() - start


def profiled(work) -> tuple[dict[str, float], int]:
    """Seconds of each kernel (operation on a CPU), dearest first; how often the host waited."""
    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        work()
        now()
    seconds, waits = {}, 0
    for row in profiler.key_averages():
        on_device = row.device_type == (DeviceType.CUDA if gpu else DeviceType.CPU)
        if on_device and not row.is_user_annotation:
            seconds[row.key] = (row.self_device_time_total or row.self_cpu_time_total) / 1e6
        if row.key in ("cudaStreamSynchronize", "cudaEventSynchronize"):
            waits += row.count
    return dict(sorted(seconds.items(), key=lambda item: -item[1])), waits
