"""The passes of a model on fake tensors, which have shapes but no values: their memory and FLOP.

No weights are loaded and nothing is computed: the bytes that are alive at once are counted.
"""

import copy
import math
import os
import weakref
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

import train_ppo
from extras.baselines import dpo, scalar_rm, sdpo
from t2g import adapters, cpu, dist, policy, supervised
from t2g.cache import positions
from t2g.cli import fail
from t2g.policy import response_logits
from t2g.rollout import Rollout
from t2g.score import score_microbatch

LLAMA_8B = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
LLAMA_8B |= dict(num_attention_heads=32, num_key_value_heads=8)
SMOLLM2 = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
SMOLLM2 |= dict(num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
KNOWN = {  # models that recipes name: some need a licence on the hub, and plans need no network
    "Llama-3.1-8B": LLAMA_8B | {"max_position_embeddings": 131072},
    "Llama-3-8B": LLAMA_8B | {"max_position_embeddings": 8192},
    "SmolLM2-135M": SMOLLM2 | {"max_position_embeddings": 8192},
}
# The flags that change what a microbatch computes.
FLAGS = ("bf16", "lora_r", "lora_alpha", "gradient_checkpointing", "temperature", "kl_estimator")
FLAGS += ("entropy_coef", "cliprange", "cliprange_value", "vf_coef", "beta")
measured = {}  # rows of a recipe share passes


def load_config(source, flag: str) -> PreTrainedConfig:
    """The configuration of a model, without its weights; source may be a configuration itself."""
    if isinstance(source, PreTrainedConfig):
        return source
    if not source:
        fail(f"a plan needs {flag}: a hub id or a folder, of which only config.json is read")
    path = str(policy.latest_checkpoint(source) or source)
    for name, sizes in KNOWN.items():
        if name in path and not os.path.exists(path):
            return LlamaConfig(**sizes)
    source, gguf = policy.pretrained(path)
    try:
        return AutoConfig.from_pretrained(source, **gguf)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        fail(f"no model configuration could be read from {path!r}: {reason}")


def measure(config, args, update, shape, sharded=False, keep_gradients=False, on_cpu=False):
    """A model's sizes, the bytes that passes over a microbatch add, and the FLOP of one text.

    Args: update, the name of one of UPDATES, or None for a model that is not trained; shape,
    (texts of a microbatch, prompt tokens, new tokens).
    """
    flags = [getattr(args, name, None) for name in FLAGS]
    options = (update, shape, sharded, keep_gradients, on_cpu)
    key = (config.to_json_string(), *options, *flags)
    if key not in measured:
        args = SimpleNamespace(**dict(zip(FLAGS, flags)))
        layers = config.get_text_config().num_hidden_layers
        alike = len(set(getattr(config.get_text_config(), "layer_types", None) or [0])) == 1
        # An embedding's gradient outweighs the activations of few layers, not those of many.
        linear = alike and (not update or args.lora_r)
        measure_some = measure_few_layers if layers > 8 and linear else run
        with (
            mock.patch.object(policy, "device", return_value="cpu"),  # where fake tensors are
            mock.patch.object(cpu, "emulates_bf16", return_value=False),
        ):
            sizes = measured[key] = measure_some(config, args, *options)
        sizes.update = max(sizes.forward, sizes.backward)
    return measured[key]


def measure_few_layers(config, args, *options):
    """Extrapolates from 2 and 4 layers, because all sizes are linear in their number."""
    sizes = []
    for layers in (2, 4):
        part = copy.deepcopy(config)
        part.get_text_config().num_hidden_layers = layers
        sizes.append(vars(run(part, args, *options)))
    few, more = sizes
    slopes = {name: (more[name] - few[name]) / 2 for name in few}
    beyond = config.get_text_config().num_hidden_layers - 2
    return SimpleNamespace(**{name: few[name] + slopes[name] * beyond for name in few})


def run(config, args, update, shape, sharded, keep_gradients, on_cpu):
    """What measure() returns, with all layers of the configuration."""
    dtype = torch.bfloat16 if sharded and args.bf16 else torch.float32  # the copies that FSDP makes
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        other = AutoModelForCausalLM.from_config(config, dtype=dtype)  # a reference or a teacher
        if not dist.blocks(model):
            fail(f"there is no plan for {type(model).__name__}: it does not name its blocks")
        parameters, block = count(model.parameters()), count(dist.blocks(model)[0].parameters())
        for one in (model, other) if on_cpu else ():
            cpu.use(one)
        model = adapters.added(model, args) if update else model
        actor = policy.Policy(model).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        nn.ModuleList([actor, other]).to_empty(device="cpu")
        model.tie_weights()
        other.tie_weights()
        if args.gradient_checkpointing:
            dist.recompute_blocks(model)
        trainable = [weights for weights in actor.parameters() if weights.requires_grad]
        for weights in () if keep_gradients else trainable:
            weights.register_post_accumulate_grad_hook(lambda w: setattr(w, "grad", None))
        passes = measure_passes(args, actor, other, update, fake_rollout(*shape))
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sizes = dict(parameters=parameters, block=block, trainable=count(trainable))
    sizes["rest"] = parameters - text.num_hidden_layers * block
    sizes["cache"] = 2 * text.num_hidden_layers * heads * head  # numbers of a token
    return SimpleNamespace(**sizes, **passes, prompt=shape[1], length=sum(shape[1:]))


def count(weights) -> int:
    return sum(tensor.numel() for tensor in weights)


def fake_rollout(rows, prompt, new) -> Rollout:
    prompt, response = (torch.zeros(rows, width, dtype=torch.long) for width in (prompt, new))
    return Rollout(prompt, prompt == 0, response, response == 0, None, [""] * rows)


def measure_passes(args, actor, other, update, rollout) -> dict:
    """The highest bytes alive in each pass, and the FLOP of a text forward and in an update."""
    rows, model = len(rollout), actor.model

    def prefill(rows):  # without a cache, which is arithmetic
        mask = rollout.prompt_mask[:1].expand(rows, -1)
        inputs = dict(attention_mask=mask.long(), position_ids=positions(mask))
        with torch.autocast("cpu", torch.bfloat16, bool(args.bf16), cache_enabled=False):
            model(mask.long(), use_cache=False, logits_to_keep=1, **inputs)

    def loss():
        return UPDATES[update](actor, other, rollout, args)

    passes = {"score": 0, "forward": 0, "backward": 0, "update_flops": 0}
    with torch.no_grad():
        few, more = (peak_of(partial(prefill, number)) for number in (1, 3))
        passes["prefill"] = (more - few) / 2  # of a text; copies of weights do not grow with them
        passes["flops"] = flops_of(partial(response_logits, model, rollout)) / rows
        if update == "ppo":
            reference = None if args.lora_r else other
            passes["score"] = peak_of(partial(score_microbatch, actor, reference, rollout, args))
    if update:  # each half of an update is linear in the number of layers, their maximum is not
        with Alive() as alive:
            value = loss()
            passes["forward"], alive.peak = alive.peak, alive.now
            value.backward()
        passes["backward"] = alive.peak
        actor.zero_grad()
        passes["update_flops"] = flops_of(lambda: loss().backward()) / rows
    return passes


def peak_of(work) -> int:
    with Alive() as alive:
        work()
    return alive.peak


def flops_of(work) -> int:
    """FLOP, in a pass of its own, because the counter keeps what checkpointing frees."""
    linear = {torch.ops.mkldnn._linear_pointwise: linear_flops}  # of t2g/cpu.py
    with FlopCounterMode(display=False, custom_mapping=linear) as counter:
        work()
    return counter.get_total_flops()


def linear_flops(x, weight, *_, **__) -> int:
    return 2 * math.prod(x) * weight[0]


# ---- what is trained -----------------------------------------------------------------------------


class Every(tuple):
    """An index of all tokens in place of a mask, whose number of tokens fake tensors do not know.

    >>> x = torch.arange(4).reshape(2, 2)
    >>> x[Every.of(x)]
    tensor([0, 1, 2, 3])
    """

    @classmethod
    def of(cls, x):
        rows, columns = x.shape
        row = torch.arange(rows).repeat_interleave(columns)
        return cls((row, torch.arange(columns).repeat(rows)))

    def nonzero(self):
        return torch.stack(self, 1)


def ppo_loss(actor, other, rollout, args):
    names = ("old_logprobs", "advantages", "old_values", "returns")
    batch = {name: torch.zeros(rollout.response.shape) for name in names} | {"mask": rollout.mask}
    return train_ppo.microbatch_loss(actor, rollout, batch, torch.tensor(1), args)[0]


def token_loss(actor, other, rollout, args):
    return supervised.token_loss(actor.model, rollout, Every.of(rollout.response), args)


def pair_loss(actor, other, rollout, args):
    every, half = Every.of(rollout.response), len(rollout) // 2
    logprobs = dpo.sequence_logprobs(actor.model, rollout, every, args.bf16)
    return dpo.F.logsigmoid(args.beta * (logprobs[:half] - logprobs[half:])).sum()


def value_loss(actor, other, rollout, args):
    return scalar_rm.scores(actor, rollout, args.bf16).square().sum()


def distillation_loss(actor, other, rollout, args):
    return sdpo.token_divergence(actor.model, other, rollout, rollout, args).sum()


UPDATES = {
    "ppo": ppo_loss, "tokens": token_loss, "pairs": pair_loss, "value": value_loss,
    "distillation": distillation_loss,
}  # fmt: skip


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are created within it: those alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.known.update(storages_of((args, kwargs)))  # created before, such as weights
        out = function(*args, **(kwargs or {}))
        for storage in storages_of(out):
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, size):
        self.now -= size


def storages_of(tree) -> set:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return {tensor.untyped_storage() for tensor in tensors}
