"""What the tests share: small real tokenizers of four families, and a hypothesis profile that gives the same answer every day."""

import json

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

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
SPECIAL = ["<unk>", "<eos>"]


def byte_level():
    """GPT-2 style: tokens are strings of bytes, some of which end in the middle of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def unigram():
    """SentencePiece style: a mark for each space, and one put before the text that decoding takes away again."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=260, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback():
    """Llama-2 style: marks for spaces, and one token a byte for each character that is not in the vocabulary."""
    marks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner = Tokenizer(models.BPE())
    learner.normalizer = marks
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    ascii_corpus = [line for line in CORPUS if line.isascii()]
    learner.train_from_iterator(ascii_corpus, trainers.BpeTrainer(vocab_size=220, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(learnt["vocab"], key=learnt["vocab"].get)]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = marks
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def wordpiece():
    """BERT style: words and their ##continuations; decoding puts the spaces in again and never has them all right."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(vocab_size=330, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


BUILDERS = {build.__name__: build for build in (byte_level, unigram, byte_fallback, wordpiece)}


@pytest.fixture(scope="session")
def tokenizers():
    """The four families by name, as a model's tokenizer comes: special tokens <unk> and <eos>."""
    return {
        name: PreTrainedTokenizerFast(tokenizer_object=build(), unk_token="<unk>", eos_token="<eos>")
        for name, build in BUILDERS.items()
    }


@pytest.fixture(scope="session", params=list(BUILDERS))
def tok(request, tokenizers):
    """Each of the four families in turn."""
    return tokenizers[request.param]
