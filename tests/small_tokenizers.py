"""Small real tokenizers of the four families that language models use, trained in a second."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<eos>"]
OPTIONS = dict(special_tokens=SPECIAL, show_progress=False)


def byte_level(texts):
    """GPT-2 style: tokens are strings of bytes, and some end inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, **OPTIONS)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def unigram(texts):
    """SentencePiece style: a mark per space, and one before the text, which decoding removes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=260, unk_token="<unk>", **OPTIONS)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_fallback(texts):
    """Llama-2 style: marks for spaces, and a token per byte of unknown characters."""
    marks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner = Tokenizer(models.BPE())
    learner.normalizer = marks
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=220, show_progress=False)
    learner.train_from_iterator([text for text in texts if text.isascii()], trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokens = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += sorted(learnt["vocab"], key=learnt["vocab"].get)
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(pair) for pair in learnt["merges"]]
    options = dict(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    tokenizer.normalizer = marks
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(content=" ", left=1, right=0)])
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def wordpiece(texts):
    """BERT style: words and ##continuations; decoding inserts some spaces at wrong places."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=330, **OPTIONS))
    return tokenizer


FAMILIES = {build.__name__: build for build in (byte_level, unigram, byte_fallback, wordpiece)}


def build(name, texts):
    """Trains a tokenizer of a family and wraps it as the tokenizer of a model."""
    raw = FAMILIES[name](texts)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>")
