"""Keys and values of the tokens so far, for sampling: written into room that is made once, so that no token copies the others."""

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def roomy(config, length) -> DynamicCache:
    """The cache that a model wants, its plain layers with room for `length` tokens a row."""
    cache = DynamicCache(config=config)
    cache.layers = [
        RoomyLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


class RoomyLayer(DynamicLayer):
    def __init__(self, length):
        super().__init__()
        self.length = length

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = [
                x.new_empty(*x.shape[:-2], self.length, x.shape[-1])
                for x in (key_states, value_states)
            ]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for room, new in zip(self.room, (key_states, value_states)):
            room[..., start:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        """Keeps these rows alone."""
        self.room = [room[indices] for room in self.room]
        self.keys, self.values = (room[..., : self.get_seq_length(), :] for room in self.room)
