"""Token offsets, over four families of tokenizers and stranger ones: which characters each sampled token writes."""

import random
import re

import pytest
import torch
from conftest import CORPUS
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from t2g.align import (
    response_text,
    span_rewards,
    token_offsets,
)

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


def token_text(tokenizer, token):
    """What one token writes, read off the vocabulary and not off decode(), for tokens that write whole characters."""
    name = tokenizer.convert_ids_to_tokens(token)
    return name.replace("Ġ", " ").replace("Ċ", "\n").replace("▁", " ").removeprefix("##")


def assert_tiles(tokenizer, ids, offsets, text=None):
    """The ranges cover the text in order; two neighbours overlap by one character at most, and specials have none."""
    assert len(offsets) == len(ids)
    reached = 0
    for token, (start, end) in zip(ids, offsets):
        if token in tokenizer.all_special_ids:
            assert start == end
        if start < end:
            assert start in (reached, reached - 1) and start >= 0 and end >= reached
            reached = end
        assert 0 <= start <= end
    assert reached == len(response_text(tokenizer, ids) if text is None else text)


# ---- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS.keys())
def test_offsets_of_an_encoded_text_tile_it(tok, text):
    ids = tok.encode(text, add_special_tokens=False)
    assert_tiles(tok, ids, token_offsets(tok, ids))


@given(data=st.data())
def test_offsets_of_any_ids_tile_their_text(tok, data):
    """Ids as a model may sample them: not canonical, special tokens anywhere, bytes that are no UTF-8."""
    encoded = st.sampled_from(list(HARD_TEXTS.values())).map(
        lambda text: tok.encode(text, add_special_tokens=False)
    )
    some = st.lists(st.integers(0, len(tok) - 1), max_size=12)
    ids = [i for part in data.draw(st.lists(encoded | some, max_size=3)) for i in part]
    assert_tiles(tok, ids, token_offsets(tok, ids))


@given(
    text=st.lists(st.sampled_from([*"abcdefgh.,:;?()", "the", "dog", "27", "thing", "quick"])).map(
        " ".join
    )
)
def test_in_ascii_text_each_token_stands_where_its_own_letters_are(tok, text):
    ids = tok.encode(text, add_special_tokens=False)
    decoded, seen = response_text(tok, ids), ""
    for token, (start, end) in zip(ids, token_offsets(tok, ids)):
        # WordPiece writes a space before words and not before marks; the others lose no more than the very first space.
        assert decoded[start:end].strip(" ") == token_text(tok, token).strip(" ")
        seen += decoded[start:end]
    assert seen == decoded


@pytest.mark.parametrize("name", ["byte_level", "unigram", "byte_fallback"])
def test_a_word_s_token_carries_the_space_before_it(tokenizers, name):
    tok = tokenizers[name]
    ids = tok.encode("see the fox", add_special_tokens=False)
    words = ["see the fox"[start:end] for start, end in token_offsets(tok, ids)]
    assert " the" in words and "the" not in words


def bytes_of_tokens(name, tok):
    """The bytes that each token stands for, from the definition of its family."""
    visible = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # GPT-2's table: these stand for themselves
    hidden = [
        byte for byte in range(256) if byte not in visible
    ]  # and these for the characters from 256 on
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


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@given(
    text=st.text(max_size=20) | st.sampled_from(list(HARD_TEXTS.values())),
    seed=st.integers(0, 2**32),
)
def test_every_tokenisation_of_a_text_gives_each_token_the_characters_of_its_bytes(
    tokenizers, name, text, seed
):
    """Text cut into tokens at random, characters cut into bytes and EOS among them, against the bytes counted one by one."""
    tok, rng = tokenizers[name], random.Random(seed)
    written = ("" if name == "byte_level" else " ") + text
    raw, table = written.encode(), bytes_of_tokens(name, tok)
    token_of = {data: number for number, data in table.items()}
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
    shift = len(written) - len(text)
    expected = [
        {char_of_byte[b] - shift for b in range(*byte_range)} - {-1} for byte_range in byte_ranges
    ]

    assert response_text(tok, ids) == text
    assert [set(range(start, end)) for start, end in token_offsets(tok, ids)] == expected


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_a_character_of_several_tokens_is_carried_by_all_of_them(tokenizers, name):
    tok = tokenizers[name]
    text = "see 🦜!"
    ids = tok.encode(text, add_special_tokens=False)
    bird = [
        n
        for n, (start, end) in enumerate(token_offsets(tok, ids))
        if start <= text.index("🦜") < end
    ]
    assert len(bird) >= 3
    delta = span_rewards(token_offsets(tok, ids), [(text.index("🦜"), text.index("🦜") + 1, -1.0)])
    assert delta.nonzero().flatten().tolist() == bird


@given(text=st.text(max_size=20) | st.sampled_from(list(HARD_TEXTS.values())))
def test_for_canonical_ids_the_offsets_are_the_tokenizer_s_own(tokenizers, text):
    encoding = tokenizers["byte_level"].backend_tokenizer.encode(text, add_special_tokens=False)
    assume(not set(encoding.ids) & set(tokenizers["byte_level"].all_special_ids))
    assert token_offsets(tokenizers["byte_level"], encoding.ids) == encoding.offsets


@pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS.keys())
def test_special_tokens_take_no_characters_and_move_no_others(tok, text):
    ids, eos = tok.encode(text, add_special_tokens=False), tok.eos_token_id
    plain = token_offsets(tok, ids)
    for places in ([len(ids)], [0], [len(ids) // 2], range(len(ids) + 1)):
        mixed = [
            i for n, token in enumerate([*ids, None]) for i in ([eos] * (n in places) + [token])
        ][:-1]
        offsets = token_offsets(tok, mixed)
        assert all(start == end for token, (start, end) in zip(mixed, offsets) if token == eos)
        assert [pair for token, pair in zip(mixed, offsets) if token != eos] == plain


class Untidy:
    """A tokenizer whose text is not the sum of its tokens: it takes the space before a full stop away when all is joined."""

    def __init__(self, tok):
        self.tok = tok

    def decode(self, ids, skip_special_tokens):
        return (
            self.tok.decode(ids, skip_special_tokens=skip_special_tokens)
            .replace(" .", ".")
            .replace(" ,", ",")
        )


@given(text=st.lists(st.sampled_from(["the", "dog", ".", ",", "sleeps", "27"])).map(" ".join))
def test_a_text_that_is_not_the_sum_of_its_tokens_is_tiled_all_the_same(tok, text):
    untidy = Untidy(tok)
    ids = tok.encode(text, add_special_tokens=False)
    written, offsets = response_text(untidy, ids), token_offsets(untidy, ids)
    assert_tiles(tok, ids, offsets, written)
    for token, (start, end) in zip(ids, offsets):
        letters = re.sub(r"\W", "", token_text(tok, token))
        assert letters in written[start:end]


def word_end_bpe():
    """GPT-1 style: a mark at the end of each word, which is a space unless it is the last."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=300, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@given(
    text=st.lists(st.sampled_from(["the", "dog", "27", ",", "sleeps", "quick"]), min_size=1).map(
        " ".join
    )
)
def test_a_decoder_that_puts_spaces_behind_words_gives_no_token_its_neighbour_s_letters(text):
    tok = word_end_bpe()
    encoding = tok.encode(text, add_special_tokens=False)
    written, offsets = tok.decode(encoding.ids), token_offsets(tok, encoding.ids)
    assert "".join(written[start:end] for start, end in offsets) == written
    for token, (start, end) in zip(encoding.tokens, offsets):
        assert written[start:end].strip() == token.removesuffix("</w>")


class OnlyDecodes:
    """As little of a tokenizer as there can be: no hash, no weak reference, and no id beyond its vocabulary."""

    __slots__ = ("beyond",)
    __hash__ = None

    def __init__(self, beyond):
        self.beyond = beyond

    def decode(self, ids, skip_special_tokens):
        if max(ids, default=0) > 255:
            raise self.beyond
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("beyond", [KeyError, IndexError, ValueError, TypeError])
def test_any_object_that_decodes_is_a_tokenizer(beyond):
    text = "see 東京, 27"
    ids = list(text.encode())
    expected = [(n, n + 1) for n, char in enumerate(text) for _ in char.encode()]
    assert token_offsets(OnlyDecodes(beyond()), ids) == expected


def test_only_special_tokens(tok):
    assert token_offsets(tok, [tok.eos_token_id] * 3) == [(0, 0)] * 3
    assert token_offsets(tok, []) == []


@given(data=st.data())
def test_a_raw_tokenizer_and_a_tensor_of_ids_give_the_same(tok, data):
    ids = data.draw(st.lists(st.integers(0, len(tok) - 1), max_size=10))
    offsets = token_offsets(tok, ids)
    assert token_offsets(tok.backend_tokenizer, ids) == offsets
    assert token_offsets(tok, torch.tensor(ids, dtype=torch.long)) == offsets


def test_a_long_text_costs_one_short_decode_or_two_for_each_new_token_and_then_one_in_all(tok):
    """And not one for each place in it, which would make the cost grow with the square of the length."""
    ids = tok.encode(HARD_TEXTS["ascii"] * 40, add_special_tokens=False)
    lengths = []

    class Counting:
        def decode(self, ids, skip_special_tokens):
            lengths.append(len(ids))
            return tok.decode(ids, skip_special_tokens=skip_special_tokens)

    counting = Counting()
    assert token_offsets(counting, []) == []  # finds, once, a word to read the others behind
    lengths.clear()
    assert token_offsets(counting, ids) == token_offsets(tok, ids)
    assert len([n for n in lengths if n > 2]) == 1
    assert len(lengths) <= 2 * len(set(ids)) + 3
    lengths.clear()
    assert token_offsets(counting, ids[::-1]) == token_offsets(tok, ids[::-1])
    assert lengths == [len(ids)]


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_broken_characters_are_read_in_their_own_short_runs(tokenizers, name):
    """And not by cutting the whole text at each place."""
    tok, lengths = tokenizers[name], []
    ids = tok.encode("The dog 🦜 sleeps. " * 40, add_special_tokens=False)

    class Counting:
        def decode(self, ids, skip_special_tokens):
            lengths.append(len(ids))
            return tok.decode(ids, skip_special_tokens=skip_special_tokens)

    token_offsets(Counting(), ids)
    assert len([n for n in lengths if n > 10]) == 1


@given(data=st.data())
def test_what_was_asked_before_changes_no_offsets(tok, data):
    """A tokenizer that has been read before, in whatever order, against one that is met for the first time."""

    class Fresh:
        decode = staticmethod(tok.decode)

    used = Fresh()
    texts = st.sampled_from(list(HARD_TEXTS.values())).map(
        lambda text: tok.encode(text, add_special_tokens=False)
    )
    some = texts | st.lists(st.integers(0, len(tok) - 1), max_size=8)
    for ids in data.draw(st.lists(some, min_size=2, max_size=4)):
        assert token_offsets(used, ids) == token_offsets(Fresh(), ids)
