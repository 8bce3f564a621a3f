"""Forward passes for sampling: padded batches and a key-value cache that is allocated once."""

import inspect

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask

from t2g.cli import FAILURES, fail

RENAMED = "cache" in inspect.signature(create_causal_mask).parameters
ARGUMENT = "cache" if RENAMED else "past_key_values"  # the models' name for it, by version


def positions(attention):
    """Position ids that skip padding, so that left padding changes nothing."""
    return (attention.long().cumsum(1) - 1).clamp(min=0)


def next_logits(model, ids, attention, past):
    """Logits (B, V) of the next token; adds the ids (B, P) to the cache `past`."""
    new = slice(-ids.shape[1], None)
    has_keys = any(isinstance(layer, DynamicLayer) for layer in past.layers)
    return model(
        input_ids=ids,
        attention_mask=(attention if has_keys else attention[:, new]).long(),
        position_ids=positions(attention)[:, new],
        use_cache=True,
        logits_to_keep=1,
        **{ARGUMENT: past},
    ).logits[:, -1]


@torch.no_grad()
def check_batching(model):
    """Fails if a row of a padded batch, with a cache, gets other probabilities than alone.

    Some recurrent models read the padding, and models with an encoder are no policies.
    """
    kind = model.config.model_type
    size = len(model.get_input_embeddings().weight)
    ids = torch.arange(3, 11, device=model.device).reshape(2, 4) % size
    attention = torch.tensor([[True] * 4, [False, False, True, True]], device=model.device)
    row, more = torch.tensor([1], device=model.device), ids[:1, :1]
    try:
        alone = model(input_ids=torch.cat([ids[1:, 2:], more], 1), use_cache=False).logits[0, -2:]
        past = preallocated(model.config, 5)
        first = next_logits(model, ids, attention, past)[1]
        past.reorder_cache(row)
        second = next_logits(model, more, torch.cat([attention[row], more >= 0], 1), past)[0]
    except FAILURES as error:
        fail(f"a {kind} model cannot be sampled in batches: {error}")
    difference = torch.stack([first, second]).log_softmax(-1) - alone.log_softmax(-1)
    if difference.nan_to_num().abs().max() > 0.02:
        fail(f"a {kind} model gives padded batches other probabilities; use another architecture")


def is_plain(model) -> bool:
    """Whether padding surely changes nothing: a causal transformer that takes positions."""
    layers = DynamicCache(config=model.config).layers
    arguments = inspect.signature(model.forward).parameters.keys()
    causal = getattr(model.config, "is_decoder", True) and not model._is_stateful
    takes_positions = arguments >= {"position_ids", "use_cache"}
    return causal and takes_positions and all(isinstance(x, DynamicLayer) for x in layers)


def preallocated(config, length) -> DynamicCache:
    """The model's own cache, its plain layers with room for `length` tokens."""
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = PreallocatedLayer(length)
    return cache


class PreallocatedLayer(DynamicLayer):
    def __init__(self, length):
        super().__init__()
        self.length = length

    def update(self, key_states, value_states, *args, **kwargs):
        states = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # Keys in the values' dtype: under bf16 autocast RoPE's fp32 sine makes keys fp32.
            dtype = value_states.dtype
            shapes = [(*x.shape[:-2], self.length, x.shape[-1]) for x in states]
            self.room = [x.new_empty(shape, dtype=dtype) for x, shape in zip(states, shapes)]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for room, new in zip(self.room, states):
            room[..., start:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in self.room)
        return self.keys, self.values

    def reorder_cache(self, indices):  # keeps these rows alone
        if self.is_initialized:
            end = self.get_seq_length()
            self.room = [room[indices] for room in self.room]
            self.keys, self.values = (room[..., :end, :] for room in self.room)
