"""A key-value cache for sampling that is allocated once, so that no token copies the others."""

import inspect

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask

RENAMED = "cache" in inspect.signature(create_causal_mask).parameters
ARGUMENT = "cache" if RENAMED else "past_key_values"  # the models' name for it, by version


def preallocated(config, length) -> DynamicCache:
    """The model's own cache, its plain layers with room for `length` tokens."""
    cache = DynamicCache(config=config)
    cache.layers = [
        PreallocatedLayer(length) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
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

    def reorder_cache(self, indices):
        """Keeps these rows alone."""
        end = self.get_seq_length()
        self.room = [room[indices] for room in self.room]
        self.keys, self.values = (room[..., :end, :] for room in self.room)
