"""Models with random weights, random rollouts, and the timing of a PPO step on them, in-process.

It calls the functions of train_ppo.py that the loop calls. Left out: critics, alignment, logging.
"""

import random
import sys
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import train_ppo
from extras.scale.passes import SMOLLM2
from t2g import policy
from t2g.checkpoint import trainable
from t2g.policy import now
from t2g.ppo import gae, whiten
from t2g.rollout import Rollout, encode_prompts, sample
from t2g.score import response_logprobs, score
from t2g.tasks import toy

SHAPES = {
    "SmolLM2-135M": SMOLLM2,
    "Llama-1B": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192,
                     num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8),
    "tiny": dict(vocab_size=2048, hidden_size=32, intermediate_size=64,
                 num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
}  # fmt: skip
WORDS = """the a river house bread old green walks sings under over town morning paper letter boat
seven many children and but""".split()


def random_model(shape, folder=None, **config):
    """The toy's tokenizer and a random Llama of one of SHAPES; a folder saves both."""
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


def sentences(count, words=22) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=words)).capitalize() + "." for _ in range(count)]


def train_args(*flags):
    """The arguments of train_ppo.py with these flags and the rule as its critic."""
    command = ["train_ppo.py", "--task", "summarize", "--critic", "rule", *map(str, flags)]
    with mock.patch.object(sys, "argv", command):
        return train_ppo.parse_args()[1]


def random_rollout(rows, prompt, new, vocabulary) -> Rollout:
    """Random tokens of uneven lengths: prompts padded on the left, responses on the right."""
    rng = torch.Generator().manual_seed(5)
    ids = torch.randint(5, vocabulary, (rows, prompt + new), generator=rng)
    row = torch.arange(rows)[:, None]
    prompt_mask, mask = torch.arange(prompt) >= row % prompt, torch.arange(new) < new - row % new
    tensors = ids[:, :prompt] * prompt_mask, prompt_mask, ids[:, prompt:] * mask, mask, mask[:, 0]
    return Rollout(*(tensor.to(policy.device()) for tensor in tensors), [""] * rows)


class Learner:
    """The policy and its reference as train_ppo.py makes them; one AdamW, one learning rate."""

    def __init__(self, model, args):
        self.args = args
        self.actor, self.reference = train_ppo.make_models(model, args, args.policy)
        weights, rate = trainable(self.actor).values(), args.learning_rate
        self.optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0, fused=True)

    def step(self, tokenizer, prompts) -> tuple[Rollout, dict[str, float]]:
        """One step from prompts. Returns its rollout and the seconds of each phase."""
        shape = self.args.response_length, self.args.temperature
        model, bf16 = self.actor.model, self.args.bf16
        rollout, seconds = timed(sample, model, tokenizer, prompts, *shape, bf16=bf16)
        return rollout, {"rollout": seconds} | self.learn(rollout)

    def learn(self, rollout) -> dict[str, float]:
        """Scores a rollout and updates on random rewards. Returns the seconds of each phase."""
        args, mask, seconds = self.args, rollout.mask, {}
        torch.manual_seed(4)  # for the order of minibatches
        delta = torch.randint(-1, 2, mask.shape).float().to(mask.device)
        old, seconds["score"] = timed(score, self.actor, self.reference, rollout, args)
        advantages, returns = gae(delta - 0.1 * old.kl, old.values, mask, 1.0, 0.95)
        batch = dict(old_logprobs=old.logprobs, old_values=old.values, returns=returns, mask=mask)
        batch["advantages"] = whiten(advantages, mask)
        work = self.actor, self.optimizer, rollout, batch, args
        _, seconds["update"] = timed(train_ppo.update, *work)
        _, seconds["shift"] = timed(response_logprobs, self.actor, rollout, args)
        return seconds


def timed(work, *args, **options):
    """The result of a function, and the seconds that it took."""
    start = now()
    result = work(*args, **options)
    return result, now() - start


@torch.no_grad()
def generate(model, tokenizer, prompts, new, bf16=False):
    """`new` tokens to each prompt by transformers' generate; bf16 means autocast."""
    ids, mask = encode_prompts(tokenizer, prompts, model.device)
    length = dict(min_new_tokens=new, max_new_tokens=new, pad_token_id=tokenizer.pad_token_id)
    with policy.autocast(bf16):
        sampling = dict(do_sample=True, top_k=0, top_p=1.0, **length)
        model.generate(input_ids=ids, attention_mask=mask.long(), **sampling)
