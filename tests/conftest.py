"""What the tests share: small real tokenizers of four families, and a hypothesis profile that gives the same answer every day."""

import pytest
import torch
from hypothesis import settings

from t2g.families import FAMILIES

torch.set_num_threads(1)
settings.register_profile("t2g", deadline=None, derandomize=True, database=None, max_examples=100)
settings.load_profile("t2g")

# Text from which the tokenizers learn. ASCII is in it letter by letter; of the rest a part only, so that some of it is unknown.
CORPUS = [
    "The quick brown fox jumps over the lazy dog; the dog sleeps. She is 27, not 41, and he's grown up.",
    "the thing that the other thinks is there, then and there. Don't panic: (a) wait, [b] run, {c} hide!",
    "naïve café, Straße, 東京 と 大阪, привет мир, 😀😀 🎉, line\r\nline\n\nline\ttab",
    " ".join(map(chr, range(33, 127))),
] * 4


@pytest.fixture(scope="session")
def tokenizers():
    """The four families by name, as a model's tokenizer comes: special tokens <unk> and <eos>."""
    return {name: build(CORPUS) for name, build in FAMILIES.items()}


@pytest.fixture(scope="session", params=list(FAMILIES))
def tok(request, tokenizers):
    """Each of the four families in turn."""
    return tokenizers[request.param]
