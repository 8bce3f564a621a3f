"""Alignment: token offsets over four families of tokenizers, places of quotes, and the rewards where the two meet."""

import itertools
import random
import re
import time

import pytest
import torch
from conftest import CORPUS
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.testing import assert_close

from t2g.align import (
    SPAN_DECAY,
    SPAN_WEIGHTS,
    find,
    locate,
    resolve,
    response_text,
    span_rewards,
    token_offsets,
)
from t2g.feedback import Feedback, Span

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
    encoded = st.sampled_from(list(HARD_TEXTS.values())).map(lambda text: tok.encode(text, add_special_tokens=False))
    some = st.lists(st.integers(0, len(tok) - 1), max_size=12)
    ids = [i for part in data.draw(st.lists(encoded | some, max_size=3)) for i in part]
    assert_tiles(tok, ids, token_offsets(tok, ids))


@given(text=st.lists(st.sampled_from([*"abcdefgh.,:;?()", "the", "dog", "27", "thing", "quick"])).map(" ".join))
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
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's table: these stand for themselves
    hidden = [byte for byte in range(256) if byte not in visible]  # and these for the characters from 256 on
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
@given(text=st.text(max_size=20) | st.sampled_from(list(HARD_TEXTS.values())), seed=st.integers(0, 2**32))
def test_every_tokenisation_of_a_text_gives_each_token_the_characters_of_its_bytes(tokenizers, name, text, seed):
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
    expected = [{char_of_byte[b] - shift for b in range(*byte_range)} - {-1} for byte_range in byte_ranges]

    assert response_text(tok, ids) == text
    assert [set(range(start, end)) for start, end in token_offsets(tok, ids)] == expected


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_a_character_of_several_tokens_is_carried_by_all_of_them(tokenizers, name):
    tok = tokenizers[name]
    text = "see 🦜!"
    ids = tok.encode(text, add_special_tokens=False)
    bird = [n for n, (start, end) in enumerate(token_offsets(tok, ids)) if start <= text.index("🦜") < end]
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
        mixed = [i for n, token in enumerate([*ids, None]) for i in ([eos] * (n in places) + [token])][:-1]
        offsets = token_offsets(tok, mixed)
        assert all(start == end for token, (start, end) in zip(mixed, offsets) if token == eos)
        assert [pair for token, pair in zip(mixed, offsets) if token != eos] == plain


class Untidy:
    """A tokenizer whose text is not the sum of its tokens: it takes the space before a full stop away when all is joined."""

    def __init__(self, tok):
        self.tok = tok

    def decode(self, ids, skip_special_tokens):
        return self.tok.decode(ids, skip_special_tokens=skip_special_tokens).replace(" .", ".").replace(" ,", ",")


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


@given(text=st.lists(st.sampled_from(["the", "dog", "27", ",", "sleeps", "quick"]), min_size=1).map(" ".join))
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
    texts = st.sampled_from(list(HARD_TEXTS.values())).map(lambda text: tok.encode(text, add_special_tokens=False))
    some = texts | st.lists(st.integers(0, len(tok) - 1), max_size=8)
    for ids in data.draw(st.lists(some, min_size=2, max_size=4)):
        assert token_offsets(used, ids) == token_offsets(Fresh(), ids)


# ---- the meeting of tokens and spans -----------------------------------------------------------------------------------

scores = st.floats(-1, 1, width=32)


@st.composite
def offsets_and_spans(draw):
    """Ranges that tile a text with shared characters and empty ranges among them, and spans within it."""
    offsets, end = [], 0
    for size, shared in draw(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=8)):
        start = max(end - (shared and size > 0), 0)
        end = max(end, start + size)
        offsets.append((start, start + size) if size else (end, end))
    assume(end > 0)
    cuts = st.lists(st.integers(0, end), min_size=2, max_size=2, unique=True).map(sorted)
    return offsets, draw(st.lists(st.builds(lambda cut, score: (*cut, score), cuts, scores), max_size=5))


@given(offsets_and_spans())
def test_a_token_is_rewarded_if_and_only_if_it_shares_a_character_with_a_span(case):
    offsets, spans = case
    for (start, end), reward in zip(offsets, span_rewards(offsets, spans).tolist()):
        touching = [score for s, e, score in spans if set(range(start, end)) & set(range(s, e))]
        assert reward == (min(touching) if touching else 0)


@given(offsets_and_spans(), st.randoms())
def test_the_order_of_the_spans_does_not_matter(case, rng):
    offsets, spans = case
    shuffled = rng.sample(spans, len(spans))
    assert torch.equal(span_rewards(offsets, spans), span_rewards(offsets, shuffled))


@pytest.mark.parametrize("spans", [[(0, 4, 1.0), (0, 4, -1.0)], [(0, 4, -1.0), (0, 4, 1.0)], [(0, 1, -1.0), (1, 4, 1.0)]])
def test_poor_wins_over_good_in_a_token(spans):
    assert span_rewards([(0, 4)], spans).tolist() == [-1]


@given(offsets_and_spans(), st.sampled_from(list(SPAN_WEIGHTS)))
def test_weights_never_move_credit_to_other_tokens_nor_make_it_larger(case, weights):
    offsets, spans = case
    weighted, uniform = (span_rewards(offsets, spans, name) for name in (weights, "uniform"))
    marked = torch.tensor(
        [any(start < e and s < end for s, e, _ in spans) and start < end for start, end in offsets], dtype=torch.bool
    )
    assert not weighted[~marked].any()
    assert (weighted >= uniform.clamp(max=0)).all()


def one_span(data, weights):
    """The weights that the tokens of one span get, by random tokens and a random score; none of them shared or empty."""
    ends = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=12))
    cuts = [sum(ends[:n]) for n in range(len(ends) + 1)]
    first = data.draw(st.integers(0, len(ends) - 1))
    last = data.draw(st.integers(first, len(ends) - 1))
    score = data.draw(st.floats(0.1, 1)) * data.draw(st.sampled_from([1, -1]))
    start = data.draw(st.integers(cuts[first], cuts[first + 1] - 1))
    end = data.draw(st.integers(max(start, cuts[last]) + 1, cuts[last + 1]))
    delta = span_rewards(list(itertools.pairwise(cuts)), [(start, end, score)], weights)
    assert not delta[:first].any() and not delta[last + 1 :].any()
    return delta[first : last + 1] / score


@given(st.data())
def test_uniform_weights_are_all_one(data):
    assert_close(w := one_span(data, "uniform"), torch.ones_like(w))


@given(st.data())
def test_severity_shares_its_score_out_as_uniform_does(data):
    assert_close(w := one_span(data, "severity"), torch.ones_like(w))


@given(st.data())
def test_first_is_one_for_the_first_token_and_nothing_for_the_rest(data):
    w = one_span(data, "first")
    assert_close(w, (torch.arange(len(w)) == 0).float())


@given(st.data())
def test_inverse_length_gives_every_span_a_total_of_one_in_equal_parts(data):
    w = one_span(data, "inverse_length")
    assert w.sum().item() == pytest.approx(1, abs=1e-5)
    assert_close(w, torch.full_like(w, w[0].item()))


@given(st.data())
def test_decayed_falls_from_one_by_the_same_factor_at_each_token(data):
    w = one_span(data, "decayed")
    assert w[0].item() == pytest.approx(1)
    assert_close(w[1:], w[:-1] * SPAN_DECAY)
    assert 0 < SPAN_DECAY < 1


def test_where_weighted_spans_overlap_the_lowest_wins_and_a_tail_without_weight_marks_nothing():
    offsets = [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert span_rewards(offsets, [(0, 3, -1.0), (1, 4, 1.0)], "first").tolist() == [-1, 1, 0, 0]
    assert span_rewards(offsets, [(0, 2, 1.0), (1, 3, -1.0)], "inverse_length").tolist() == [0.5, -0.5, -0.5, 0]


def test_ten_thousand_spans_are_no_trouble():
    offsets = [(n, n + 1) for n in range(512)]
    spans = [(n % 500, n % 500 + 1 + n % 12, (-1.0) ** n) for n in range(10_000)]
    began = time.process_time()
    delta = span_rewards(offsets, spans)
    assert time.process_time() - began < 2
    assert delta[:500].tolist() == [min(score for s, e, score in spans[:1000] if s <= t < e) for t in range(500)]


@pytest.mark.parametrize("offsets", [[(3, 6), (0, 3)], [(0, 6), (1, 2)], [(3, 0), (3, 6)]])
def test_offsets_out_of_order_are_refused(offsets):
    with pytest.raises(ValueError) as refused:
        span_rewards(offsets, [(0, 1, 1.0)])
    assert str(refused.value) == "the offsets of the tokens are out of order"


@pytest.mark.parametrize("weights", SPAN_WEIGHTS)
def test_a_span_that_no_token_touches_marks_nothing(weights):
    """Where the offsets leave a part of the text out."""
    assert span_rewards([(0, 2), (4, 6)], [(2, 4, 1.0)], weights).tolist() == [0, 0]


def test_ranges_that_only_touch_do_not_overlap():
    assert span_rewards([(0, 2), (2, 4), (4, 6)], [(2, 4, 1.0)]).tolist() == [0, 1, 0]


BAD_RANGES = [(2, 2), (3, 2), (-1, 2), (0, 7), (6, 7)]
BAD_SCORES = [1.01, -1.01, float("inf"), -float("inf"), float("nan")]


@pytest.mark.parametrize("span", [*((*place, 1.0) for place in BAD_RANGES), *((0, 2, score) for score in BAD_SCORES)])
def test_a_bad_span_is_refused(span):
    """Empty, reversed, outside the text, or with a score that is no number in [-1, 1]."""
    start, end, score = span
    sentences = (
        f"the span ({start}, {end}) is empty, reversed or outside the text of 6 characters",
        f"the score {score} of the span ({start}, {end}) is no number in [-1, 1]",
    )
    with pytest.raises(ValueError) as refused:
        span_rewards([(0, 3), (3, 6)], [(0, 3, 1.0), span])
    assert str(refused.value) == sentences[0 if -1 <= score <= 1 else 1]


def test_without_spans_or_tokens_there_are_no_rewards():
    assert span_rewards([(0, 3), (3, 3)], []).tolist() == [0, 0]
    nothing = span_rewards([], [])
    assert nothing.shape == (0,) and nothing.dtype == torch.float32
    with pytest.raises(ValueError):
        span_rewards([], [(0, 1, 1.0)])


# ---- quotes ------------------------------------------------------------------------------------------------------------

words = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)


def slices(text):
    """Ranges (start, end) of text that are not blank."""
    cuts = st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(sorted)
    return cuts.filter(lambda cut: text[slice(*cut)].strip())


def cuts_a_word(text, start, end):
    """True if one of the two ends stands between two letters or digits, or within a number such as 1.27 or 1,927."""
    number = {i for match in re.finditer(r"(?=(\d[.,]\d))", text) for i in (match.start(1) + 1, match.start(1) + 2)}
    return any(i in number or (text[i - 1].isalnum() and text[i].isalnum()) for i in (start, end) if 0 < i < len(text))


@given(st.data(), st.text(min_size=1) | st.text("ab .'\n", min_size=1))
def test_whatever_is_taken_from_the_text_is_found_as_it_stands(data, text):
    assume(text.strip())
    start, end = data.draw(slices(text))
    kind, places = find(text, text[start:end])
    assert kind == "exact"
    assert places and all(text[s:e] == text[start:end] for s, e in places)


@given(st.data(), st.text("ab .12,", min_size=1, max_size=12))
def test_all_places_of_a_quote_are_marked_and_those_that_cut_words_only_without_others(data, text):
    assume(text.strip())
    start, end = data.draw(slices(text))
    size = end - start
    everywhere = [(i, i + size) for i in range(len(text) - size + 1) if text[i : i + size] == text[start:end]]
    best = [place for place in everywhere if not cuts_a_word(text, *place)] or everywhere
    marked = {i for place in locate(text, text[start:end]) for i in range(*place)}
    assert marked == {i for place in best for i in range(*place)}


def test_whole_words_are_preferred():
    assert locate("Born in 1927, she is 27.", "27") == [(21, 23)]
    assert locate("Born in 1927.", "27") == [(10, 12)]
    assert locate("Tall talk, TALL TALES, all", "All") == [(23, 26)]
    assert locate("xab ab ab", "ab ab") == [(4, 9)]
    assert locate("27, paid 1.27 or 27.5, 1,927. Not 27.", "27") == [(0, 2), (34, 36)]
    assert locate("1.27 or 27", "27") == [(8, 10)]
    assert locate("1.2 and 21.2", "1.2") == [(0, 3)]
    assert locate("an 1.2, b21.2", "1.2") == [(3, 6)]


@given(data=st.data(), parts=st.lists(words, min_size=2, max_size=8, unique=True))
def test_white_space_and_case_do_not_hide_a_quote(data, parts):
    text = data.draw(st.sampled_from([" ", "\n", " \t "])).join(parts)
    bounds = [match.span() for match in re.finditer(r"\S+", text)]
    first = data.draw(st.integers(0, len(parts) - 1))
    last = data.draw(st.integers(first, len(parts) - 1))
    start, end = bounds[first][0], bounds[last][1]
    space = data.draw(st.sampled_from(["  ", "\r\n", "\u00a0", "\n\n"]))
    change_case = data.draw(st.sampled_from([str.upper, str.title, str.capitalize]))
    kind, places = find(text, space + space.join(change_case(word) for word in text[start:end].split()) + space)
    assert kind == "normalised"
    assert (start, end) in places


@pytest.mark.parametrize(
    ("text", "quote", "found"),
    [
        ("She said “Yes,  please”.", '"yes, please"', "“Yes,  please”"),
        ("It‘s a ‚test‘ - fine", "IT'S A 'TEST'", "It‘s a ‚test‘"),
        ("«Oui», dit-elle", '"Oui"', "«Oui»"),
        ("pages 10–20 only", "pages 10-20", "pages 10–20"),
        ("a plain 'quote' here", "‘quote’", "'quote'"),
        ("one\r\n\r\ntwo three", "one two", "one\r\n\r\ntwo"),
        ("das ist die Straße hier", "STRASSE", "Straße"),
        ("Straße und Haus", "und haus", "und Haus"),
        ("ßßß then this Word", "WORD", "Word"),
        ("in İstanbul, in Ankara", "in i̇stanbul, in ankara", "in İstanbul, in Ankara"),
        ("İİİ and Then", "then", "Then"),
        ("a ﬁne ﬂower", "FINE FLOWER", "ﬁne ﬂower"),
        ("😀 the  Dog 🎉", "the dog 🎉", "the  Dog 🎉"),
        ("ΟΔΟΣ and more", "οδοσ AND", "ΟΔΟΣ and"),
        ("It was in Porto.", '"Porto"', "Porto"),
        ("It was in porto.", "‘ Porto ’", "porto"),
    ],
)
def test_a_normalised_quote_maps_back_to_the_right_characters(text, quote, found):
    assert text.count(found) == 1
    assert find(text, quote) == ("normalised", [(text.index(found), text.index(found) + len(found))])


@given(st.data(), st.text("aBSß İﬁ\t\nŉǰΣς😀", min_size=1, max_size=12))
def test_places_of_a_folded_quote_hold_it_when_folded(data, text):
    """Characters that become several when case is taken away shift no place."""
    assume(text.strip())
    start, end = data.draw(slices(text))
    quote = text[start:end].casefold()
    kind, places = find(text, quote)
    assert kind in ("exact", "normalised")
    assert places == sorted(set(places))
    for s, e in places:
        assert "".join(quote.split()) in "".join(text[s:e].casefold().split())


LONG = "Experienced veterinarians recommended surgery because my stubborn elephant ignored breakfast, lunch and dinner."


@given(data=st.data())
def test_a_small_typo_in_a_long_quote_is_forgiven(data):
    """A letter too few, a wrong one or one too many: the place is that of the words that were meant, and of no others."""
    bounds = [match.span() for match in re.finditer(r"\w+", LONG)]
    first = data.draw(st.integers(0, len(bounds) - 5))
    start, end = bounds[first][0], bounds[data.draw(st.integers(first + 4, len(bounds) - 1))][1]
    at = data.draw(st.integers(start + 1, end - 2).filter(lambda i: LONG[i].isalpha()))
    kind, [(s, e)] = find(LONG, LONG[start:at] + data.draw(st.sampled_from(["", "z", "zz"])) + LONG[at + 1 : end])
    assert kind == "fuzzy"
    assert LONG[s:e].strip(" ,.") == LONG[start:end]


def test_a_fuzzy_quote_needs_eight_characters():
    assert find("then he starts running", "runninng") == ("fuzzy", [(15, 22)])
    assert find("then he starts runnin", "runninn") == ("lost", [])


def test_a_fuzzy_quote_stands_wherever_its_words_do():
    text = "the experienced veterinarian came. Later the experienced veterinarian left."
    kind, places = find(text, "the experienced vetrinarian")
    assert kind == "fuzzy" and [text[slice(*place)] for place in places] == ["the experienced veterinarian"] * 2
    assert resolve(text, Feedback("", poor=["the experienced vetrinarian"]))[0][0].start == 41


def test_where_there_are_no_words_no_place_is_close():
    assert find("!?#$ %&()= +-*/ <>", "!?#$ %&()= +-*/ <") == ("exact", [(0, 17)])
    assert find("!?#$ %&()= +-*/ <>", "!?#$ %&()= +.*/ <>") == ("lost", [])


def test_a_fuzzy_place_covers_whole_words():
    text = "Before: the experienced veterinarian recommended surgery. After."
    kind, [(start, end)] = find(text, "xperienced vetrinarian recommended surg")
    assert kind == "fuzzy"
    assert text[start:end] == "experienced veterinarian recommended surgery"


@pytest.mark.parametrize(
    ("text", "quote", "meant"),
    [
        ("She is facing a fourth day of strike action now.", "the fourth day of strike action", "a fourth day of strike action"),
        (
            "Both players to be ruled out for the season",
            "players being ruled out for the season",
            "players to be ruled out for the season",
        ),
        ("A three-year contract, he said.", "three year contract", "three-year contract"),
        ("Then bird chicken farms in a village", "chicken farm in a village", "chicken farms in a village"),
    ],
)
def test_a_fuzzy_place_takes_no_words_along_that_were_not_meant(text, quote, meant):
    """Quotes as people write them, in what they say of summaries."""
    kind, [(start, end)] = find(text, quote)
    assert kind == "fuzzy"
    assert text[start:end] == meant


def test_a_fuzzy_quote_may_be_a_little_longer_than_the_text():
    text = "the experienced veterinarian recommended it"
    assert find(text, text.replace("veteri", "vetteri") + "s") == ("fuzzy", [(0, len(text))])


@given(st.text("abcdef ", max_size=40), st.text("uvwxyz ", max_size=40))
def test_an_unrelated_quote_is_lost(text, quote):
    assert find(text, quote) == ("lost", [])


RESEMBLING = ["41", "thrn", "grumpy", "runing", "runnin9", "The dog never sleeps at night.", "The cat is 72, sleeps by day"]


@pytest.mark.parametrize("quote", RESEMBLING)
def test_a_quote_that_only_resembles_something_is_lost(quote):
    """Too short to forgive a typo, or too far from anything that is there."""
    assert find("The dog is 27, sleeps by day and then starts running", quote) == ("lost", [])
    assert find("Then the dog sleeps", "sleepss") == ("lost", [])


@pytest.mark.parametrize("quote", ["", " ", "\n\t ", "\u3000", "\u00a0"])
@pytest.mark.parametrize("text", ["", "a b\n\u3000\u00a0c"])
def test_a_blank_quote_is_lost(text, quote):
    assert find(text, quote) == ("lost", [])


def test_nothing_is_found_in_an_empty_text():
    assert find("", "word") == ("lost", [])


def test_a_quote_longer_than_the_text_is_lost():
    text = "The dog sleeps."
    assert find(text, text + " And then it wakes up again.") == ("lost", [])


@pytest.mark.parametrize("quote", ["x" * 10**6, "the dog " * 125_000, "İß" * 500_000, "\\(" * 500_000])
def test_a_quote_of_a_megabyte_is_lost_quickly(quote):
    began = time.process_time()
    assert find("The dog sleeps. " * 50, quote) == ("lost", [])
    assert time.process_time() - began < 1


# ---- feedback to spans -------------------------------------------------------------------------------------------------

TWICE = "He is 27 today. Yes, 27 it is."


def test_good_quotes_give_plus_one_and_poor_ones_minus_one():
    text = "Ana is 27, lives in Porto."
    spans, counts = resolve(text, Feedback("", good=["Porto"], poor=["27"]))
    assert [(text[s.start : s.end], s.score) for s in spans] == [("Porto", 1.0), ("27", -1.0)]
    assert all(isinstance(span, Span) for span in spans)
    assert counts["exact"] == 2 and counts["ambiguous"] == 0


def test_a_poor_quote_in_several_places_marks_the_last_and_is_counted():
    spans, counts = resolve(TWICE, Feedback("", poor=["27"]))
    assert spans == [(21, 23, -1.0)]
    assert counts["ambiguous"] == 1 and counts["exact"] == 1


@pytest.mark.parametrize(
    ("times", "good", "poor"), [(1, [0], [2]), (2, [0, 1], [1, 2]), (3, [0, 1, 2], [0, 1, 2]), (4, [0, 1, 2], [0, 1, 2])]
)
def test_a_quote_given_k_times_marks_k_places(times, good, poor):
    """The first ones if it is good, the last ones if it is poor; it names them all if there are no more."""
    for feedback, score, marked in ((Feedback("", good=["so"] * times), 1, good), (Feedback("", poor=["so"] * times), -1, poor)):
        spans, counts = resolve("so, so, so.", feedback)
        assert spans == [(4 * n, 4 * n + 2, score) for n in marked]
        assert counts["exact"] == times and counts["ambiguous"] == (times if times < 3 else 0)


@given(st.data(), st.text("ab .\n", min_size=1, max_size=20))
def test_white_space_at_the_ends_of_a_quote_marks_nothing(data, text):
    assume(text.strip())
    start, end = data.draw(slices(text))
    quote = text[start:end]
    for feedback in (Feedback("", good=[quote]), Feedback("", poor=[quote])):
        [(s, e, _)] = resolve(text, feedback)[0]
        assert text[s:e] == quote.strip()


def test_a_severity_is_the_score_where_it_is_asked_for_and_only_there():
    """Whatever its sign: the list that a quote stands in says whether it is good or poor."""
    feedback = Feedback("", good=["He", {"text": "today", "severity": 0.25}], poor=[{"text": "it", "severity": -0.5}, "Yes"])
    assert [span.score for span in resolve(TWICE, feedback, severities=True)[0]] == [1, 0.25, -0.5, -1]
    assert [span.score for span in resolve(TWICE, feedback)[0]] == [1, 1, -1, -1]
    assert resolve(TWICE, feedback)[1] == resolve(TWICE, feedback.plain())[1]


def test_a_quote_given_twice_takes_its_severities_in_order():
    quotes = [{"text": "27", "severity": 0.1}, {"text": "27", "severity": 0.9}]
    assert resolve(TWICE, Feedback("", poor=quotes), severities=True)[0] == [(6, 8, -0.1), (21, 23, -0.9)]


def test_a_good_quote_in_several_places_marks_the_first_and_is_counted():
    spans, counts = resolve(TWICE, Feedback("", good=["27"]))
    assert spans == [(6, 8, 1.0)]
    assert counts["ambiguous"] == 1 and counts["exact"] == 1


@given(st.lists(st.sampled_from(["27", "TODAY", "yes,  27", "He iz 27 today", "cat", "", "He"])), st.data())
def test_every_quote_is_counted_once_by_the_way_it_was_found(quotes, data):
    cut = data.draw(st.integers(0, len(quotes)))
    spans, counts = resolve(TWICE, Feedback("", quotes[:cut], quotes[cut:]))
    kinds = [find(TWICE, quote)[0] for quote in quotes]
    for kind in ("exact", "normalised", "fuzzy", "lost"):
        assert counts[kind] == kinds.count(kind)
    once_in_its_list = sum(part.count("27") == 1 for part in (quotes[:cut], quotes[cut:]))
    assert counts["ambiguous"] == once_in_its_list
    found = [set(quote for quote in part if find(TWICE, quote)[1]) for part in (quotes[:cut], quotes[cut:])]
    assert len(spans) >= sum(map(len, found))


def test_feedback_without_quotes_marks_nothing():
    spans, counts = resolve("Some text.", Feedback("All of it is neutral."))
    assert spans == [] and counts.total() == 0


def test_a_lost_quote_rewards_nothing(tok):
    ids = tok.encode("the dog sleeps", add_special_tokens=False)
    spans, counts = resolve(response_text(tok, ids), Feedback("", poor=["a purple elephant"]))
    assert counts["lost"] == 1
    assert not span_rewards(token_offsets(tok, ids), spans).any()


def test_a_quote_becomes_the_reward_of_its_own_tokens(tok):
    """The whole way: the tokens that are rewarded write the quote, and no others."""
    ids = [*tok.encode("the fox is 27 and the dog sleeps", add_special_tokens=False), tok.eos_token_id]
    text = response_text(tok, ids)
    offsets = token_offsets(tok, ids)
    spans, _ = resolve(text, Feedback("", good=["dog"], poor=["27"]))
    delta = span_rewards(offsets, spans)
    for score, quote in ((1, "dog"), (-1, "27")):
        assert "".join(text[start:end] for (start, end), d in zip(offsets, delta) if d == score).strip() == quote
    assert delta[-1] == 0
