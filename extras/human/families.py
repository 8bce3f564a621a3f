"""Tokenizers of the four families that language models use, trained on a few texts in a second: for tests and measurements
where no model is at hand.
"""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from t2g.cli import fail
from t2g.policy import pretrained

SPECIAL = ["<unk>", "<eos>"]


def byte_level(texts, size=380):
    """GPT-2 style: tokens are strings of bytes, some of which end in the middle of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrapped(tokenizer)


def unigram(texts, size=260):
    """SentencePiece style: a mark for each space, and one put before the text that decoding takes away again."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrapped(tokenizer)


def byte_fallback(texts, size=220):
    """Llama-2 style: marks for spaces, and one token a byte for each character that is not in the vocabulary."""
    marks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner = Tokenizer(models.BPE())
    learner.normalizer = marks
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    ascii_texts = [text for text in texts if text.isascii()]
    learner.train_from_iterator(
        ascii_texts, trainers.BpeTrainer(vocab_size=size, show_progress=False)
    )
    learnt = json.loads(learner.to_str())["model"]
    tokens = [
        *SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *sorted(learnt["vocab"], key=learnt["vocab"].get),
    ]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = marks
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return wrapped(tokenizer)


def wordpiece(texts, size=330):
    """BERT style: words and their ##continuations; decoding puts the spaces in again and never has them all right."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrapped(tokenizer)


def wrapped(tokenizer):
    """As a model's tokenizer comes."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


FAMILIES = {build.__name__: build for build in (byte_level, unigram, byte_fallback, wordpiece)}


def load(source: str):
    """A real tokenizer: a folder, a hub id or a .gguf file."""
    place, gguf = pretrained(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **gguf)
    except (OSError, ValueError, ImportError) as error:
        fail(
            f"no tokenizer could be loaded from {source!r} (folder, hub id or .gguf file): {str(error).splitlines()[0]}"
        )
    if not tokenizer.is_fast:
        fail(
            f"the tokenizer {source!r} gives no offsets of its own to compare with; use a fast one"
        )
    return tokenizer
