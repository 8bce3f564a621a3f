"""Token offsets: which characters each sampled token writes, for any tokenizer."""

import random
import re

import pytest
import torch
from conftest import CORPUS
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer

from t2g.align import response_text, token_offsets

HARD_TEXTS = {
    "ascii": "She is 27, not 41; the thing that the dog thinks.",
    "emoji": "Yes 😀🎉 and 👩‍👩‍👧🏽 too 🇵🇹!",
    "cjk": "東京は大阪より大きい。 the 猫 sleeps",
    "line breaks": "\r\nline one\r\nline two\n\n\tline three\n",
    "combining marks": "cafe\u0301 nai\u0308ve Z\u0351\u036b\u0343 a\u0323\u0302",
    "other scripts": "привет мир, שלום, नमस्ते, ไทย",
    "spaces": "  two  before and three   after   ",
    "replacement characters": "\ufffd東 a\ufffd😀 b \ufffd",
    "marks of the tokenizers": "Ġ ▁ ## <eos <0x41> \ufffd",
}
hard_texts = st.sampled_from(list(HARD_TEXTS.values()))
any_texts = st.text(max_size=20) | hard_texts
on_bytes = pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def sampled_ids(tok):
    """Ids as a model may sample them: not canonical, with special tokens and bytes of no UTF-8."""
    random_ids = st.lists(st.integers(0, len(tok) - 1), max_size=12)
    parts = st.lists(hard_texts.map(lambda text: encode(tok, text)) | random_ids, max_size=3)
    return parts.map(lambda parts: [i for part in parts for i in part])


def words(*vocabulary):
    return st.lists(st.sampled_from(vocabulary), min_size=1).map(" ".join)


def token_text(tokenizer, token):
    """What a token of whole characters writes, from the vocabulary rather than from decode()."""
    name = tokenizer.convert_ids_to_tokens(token)
    return name.replace("Ġ", " ").replace("Ċ", "\n").replace("▁", " ").removeprefix("##")


def assert_tiles(tokenizer, ids, offsets, text):
    """The ranges cover the text in order; neighbours share at most one character."""
    assert len(offsets) == len(ids)
    reached = 0
    for token, (start, end) in zip(ids, offsets):
        assert 0 <= start <= end
        if token in tokenizer.all_special_ids:
            assert start == end == reached
        elif start < end:
            assert start in (reached, reached - 1) and end >= reached
            reached = end
    assert reached == len(text)


@given(data=st.data())
def test_offsets_of_any_ids_tile_their_text_and_special_tokens_move_none(tok, data):
    ids, eos = data.draw(sampled_ids(tok)), tok.eos_token_id
    offsets = token_offsets(tok, ids)
    assert_tiles(tok, ids, offsets, response_text(tok, ids))
    assert token_offsets(tok.backend_tokenizer, ids) == offsets
    assert token_offsets(tok, torch.tensor(ids, dtype=torch.long)) == offsets
    place = data.draw(st.integers(0, len(ids)))
    mixed = token_offsets(tok, [*ids[:place], eos, *ids[place:]])
    assert mixed[:place] + mixed[place + 1 :] == offsets


@given(text=words(*"abcdefgh.,:;?()", "the", "dog", "27", "thing", "quick"))
def test_in_ascii_text_each_token_covers_its_own_letters(tok, text):
    ids = encode(tok, text)
    decoded, seen = response_text(tok, ids), ""
    for token, (start, end) in zip(ids, token_offsets(tok, ids)):
        # WordPiece moves spaces; the other families lose no more than the very first one.
        assert decoded[start:end].strip(" ") == token_text(tok, token).strip(" ")
        seen += decoded[start:end]
    assert seen == decoded


def bytes_of_tokens(name, tok):
    """The bytes of each token, from the definition of its family."""
    # GPT-2's table: visible bytes stand for themselves, hidden ones for the characters from 256 on.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}
    table = {}
    for token, number in tok.get_vocab().items():
        if number in tok.all_special_ids:
            continue
        if name == "byte_level":
            table[number] = bytes(byte_of[char] for char in token)
        elif match := re.fullmatch("<0x(..)>", token):
            table[number] = bytes.fromhex(match[1])
        else:
            table[number] = token.replace("▁", " ").encode()
    return table


@on_bytes
@given(text=any_texts, seed=st.integers(0, 2**32))
def test_any_tokenisation_gives_tokens_the_characters_of_their_bytes(tokenizers, name, text, seed):
    """Cuts a text into tokens at random, also inside characters, and counts its bytes."""
    tok, rng = tokenizers[name], random.Random(seed)
    written = ("" if name == "byte_level" else " ") + text
    raw = written.encode()
    token_of = {data: number for number, data in bytes_of_tokens(name, tok).items()}
    ids, byte_ranges, at = [], [], 0
    while at < len(raw):
        if rng.random() < 0.1:
            ids.append(tok.eos_token_id)
            byte_ranges.append((at, at))
        size = rng.choice([n for n in range(1, 8) if raw[at : at + n] in token_of])
        ids.append(token_of[raw[at : at + size]])
        byte_ranges.append((at, min(at + size, len(raw))))
        at = byte_ranges[-1][1]
    char_of_byte = [n for n, char in enumerate(written) for _ in char.encode()]
    lead = len(written) - len(text)
    expected = [{char_of_byte[b] - lead for b in range(*place)} - {-1} for place in byte_ranges]

    assert response_text(tok, ids) == text
    assert [set(range(start, end)) for start, end in token_offsets(tok, ids)] == expected


# ---- other tokenizers --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def word_end_bpe():
    """GPT-1 style: a mark at the end of each word, which is a space unless the word is the last."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=300, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@given(text=words("the", "dog", "27", ",", "sleeps", "quick"))
def test_with_spaces_after_words_no_token_gets_the_letters_of_its_neighbour(word_end_bpe, text):
    encoding = word_end_bpe.encode(text, add_special_tokens=False)
    written = word_end_bpe.decode(encoding.ids)
    offsets = token_offsets(word_end_bpe, encoding.ids)
    assert "".join(written[start:end] for start, end in offsets) == written
    for token, (start, end) in zip(encoding.tokens, offsets):
        assert written[start:end].strip() == token.removesuffix("</w>")


class OnlyDecodes:
    """A minimal tokenizer: no hash, no weak reference, an error for ids beyond its vocabulary."""

    __slots__ = ("beyond",)
    __hash__ = None

    def __init__(self, beyond):
        self.beyond = beyond

    def decode(self, ids, skip_special_tokens):
        if max(ids, default=0) > 255:
            raise self.beyond
        return bytes(ids).decode("utf-8", "replace")


def test_any_object_that_decodes_is_a_tokenizer():
    text = "see 東京, 27"
    expected = [(n, n + 1) for n, char in enumerate(text) for _ in char.encode()]
    for beyond in (KeyError, IndexError, ValueError, TypeError):
        assert token_offsets(OnlyDecodes(beyond()), list(text.encode())) == expected


# ---- cost --------------------------------------------------------------------------------------
class Counting:
    """A tokenizer that has not been seen before, and counts the lengths of what it decodes."""

    def __init__(self, tok):
        self.tok, self.lengths = tok, []

    def decode(self, ids, skip_special_tokens):
        self.lengths.append(len(ids))
        return self.tok.decode(ids, skip_special_tokens=skip_special_tokens)


def test_a_long_text_costs_two_short_decodes_per_new_token_and_one_of_the_whole(tok):
    ids, counting = encode(tok, HARD_TEXTS["ascii"] * 40), Counting(tok)
    assert token_offsets(counting, []) == []  # finds the anchor once
    counting.lengths.clear()
    assert token_offsets(counting, ids) == token_offsets(tok, ids)
    assert len([n for n in counting.lengths if n > 2]) == 1
    assert len(counting.lengths) <= 2 * len(set(ids)) + 3
    counting.lengths.clear()
    token_offsets(counting, ids[::-1])
    assert counting.lengths == [len(ids)], "each token is decoded once"


@on_bytes
def test_broken_characters_are_read_in_their_own_short_runs(tokenizers, name):
    counting = Counting(tokenizers[name])
    token_offsets(counting, encode(counting.tok, "The dog 🦜 sleeps. " * 40))
    assert len([n for n in counting.lengths if n > 10]) == 1


@given(data=st.data())
def test_earlier_calls_change_no_offsets(tok, data):
    used = Counting(tok)
    for ids in data.draw(st.lists(sampled_ids(tok), min_size=2, max_size=4)):
        assert token_offsets(used, ids) == token_offsets(Counting(tok), ids)


def test_a_space_between_broken_bytes_is_a_broken_character_too(tokenizers):
    tok = tokenizers["byte_fallback"]
    ids = tok.convert_tokens_to_ids(["<0x80>", "<0x20>", "<0x80>"])
    assert response_text(tok, ids) == "\ufffd" * 3
    assert token_offsets(tok, ids) == [(0, 1), (1, 2), (2, 3)]


def test_ids_beyond_the_vocabulary_of_a_python_tokenizer_have_no_text():
    tokenizer = ByT5Tokenizer()
    ids = [*tokenizer("ab", add_special_tokens=False)["input_ids"], 9999, tokenizer.eos_token_id]
    assert response_text(tokenizer, ids) == "ab"
    assert token_offsets(tokenizer, ids)[:2] == [(0, 1), (1, 2)]
