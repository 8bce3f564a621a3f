"""Alignment: where quotes occur in a text, and which spans feedback marks."""

import re
import time
import unicodedata
from functools import partial

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from t2g.align import find, locate, resolve
from t2g.feedback import Feedback

NFD = partial(unicodedata.normalize, "NFD")
words = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)
LOST = ("lost", [])


def slices(text):
    """Ranges (start, end) of a text that are not blank."""
    cuts = st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(sorted)
    return cuts.filter(lambda cut: text[slice(*cut)].strip())


def cuts_a_word(text, start, end):
    """True if an end is between two letters or digits, or in a number such as 1.27 or 1,927."""
    numbers = [match.start(1) for match in re.finditer(r"(?=(\d[.,]\d))", text)]
    inside = {i + 1 for i in numbers} | {i + 2 for i in numbers}
    for i in (start, end):
        if 0 < i < len(text):
            inside |= {i} if text[i - 1].isalnum() and text[i].isalnum() else set()
    return bool(inside & {start, end} - {0, len(text)})


# ---- quotes ------------------------------------------------------------------------------------
@given(st.data(), st.text("ab .12,\né", min_size=1, max_size=12))
def test_all_occurrences_are_found_and_those_that_cut_words_only_without_others(data, text):
    assume(text.strip())
    start, end = data.draw(slices(text))
    quote, size = text[start:end], end - start
    starts = [i for i in range(len(text) - size + 1) if text[i : i + size] == quote]
    everywhere = [(i, i + size) for i in starts]
    best = [place for place in everywhere if not cuts_a_word(text, *place)] or everywhere
    assert find(text, quote) == ("exact", best)


def test_whole_words_are_preferred():
    assert locate("Born in 1927, she is 27.", "27") == [(21, 23)]
    assert locate("Born in 1927.", "27") == [(10, 12)]
    assert locate("Tall talk, TALL TALES, all", "All") == [(23, 26)]
    assert find("The other day", "the") == ("normalised", [(0, 3)])
    assert locate("x_max, max(x)", "max") == [(7, 10)]
    assert locate("xab ab ab", "ab ab") == [(4, 9)]
    assert locate("27, paid 1.27 or 27.5, 1,927. Not 27.", "27") == [(0, 2), (34, 36)]
    assert locate("1.27 or 27", "27") == [(8, 10)]
    assert locate("1.2 and 21.2", "1.2") == [(0, 3)]
    assert locate("an 1.2, b21.2", "1.2") == [(3, 6)]


def test_where_words_have_no_spaces_each_character_is_a_word():
    places = locate("他说价格很高。价格！我问了，他说价格不变。", "价格")
    assert places == [(2, 4), (7, 9), (16, 18)]
    assert locate("第127章，第27章", "27") == [(7, 9)]
    assert locate("用Python写Pythonic的", "Python") == [(1, 7)]
    assert find("建议使用CT检查肺部", "使用 CT 检查") == ("normalised", [(2, 8)])
    assert locate(NFD("cafés, cafe"), "cafe") == [(8, 12)]


FUZZY = [
    ("患者被给予二百五十毫克静脉注射头孢每日三次持续一周之后体温恢复正常。", "静脉注射头孢每日二次持续一周"),
    ("ผู้ป่วยได้รับยาสามครั้งต่อวันเป็นเวลาหนึ่งสัปดาห์แล้วกลับบ้าน", "ได้รับยาสองครั้งต่อวันเป็นเวลาหนึ่งสัปดาห์"),
    ("see https://example.org/a/very_long_path_without_any_break_in_it", "very_lang_path_without"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "quote"), FUZZY)
def test_a_fuzzy_match_marks_about_its_own_length_in_any_script(text, quote):
    kind, [(start, end)] = find(text, quote)
    assert kind == "fuzzy" and abs(end - start - len(quote)) <= 3


@given(data=st.data(), parts=st.lists(words, min_size=2, max_size=8, unique=True))
def test_white_space_and_case_do_not_hide_a_quote(data, parts):
    text = data.draw(st.sampled_from([" ", "\n", " \t "])).join(parts)
    bounds = [match.span() for match in re.finditer(r"\S+", text)]
    first = data.draw(st.integers(0, len(parts) - 1))
    last = data.draw(st.integers(first, len(parts) - 1))
    start, end = bounds[first][0], bounds[last][1]
    space = data.draw(st.sampled_from(["  ", "\r\n", "\u00a0", "\n\n"]))
    change_case = data.draw(st.sampled_from([str.upper, str.title, str.capitalize]))
    quote = space.join(change_case(word) for word in text[start:end].split())
    kind, places = find(text, space + quote + space)
    assert kind == "normalised" and (start, end) in places


@pytest.mark.parametrize(
    ("text", "quote", "found"),
    [
        ("She said “Yes,  please”.", '"yes, please"', "“Yes,  please”"),
        ("It‘s a ‚test‘ - fine", "IT'S A 'TEST'", "It‘s a ‚test‘"),
        ("«Oui», dit-elle", '"Oui"', "«Oui»"),
        ("pages 10–20 only", "pages 10-20", "pages 10–20"),
        ("one\r\n\r\ntwo three", "one two", "one\r\n\r\ntwo"),
        ("das ist die Straße hier", "STRASSE", "Straße"),
        ("Straße und Haus", "und haus", "und Haus"),
        ("in İstanbul, in Ankara", "in i̇stanbul, in ankara", "in İstanbul, in Ankara"),
        ("a ﬁne ﬂower", "FINE FLOWER", "ﬁne ﬂower"),
        ("😀 the  Dog 🎉", "the dog 🎉", "the  Dog 🎉"),
        ("ΟΔΟΣ and more", "οδοσ AND", "ΟΔΟΣ and"),
        ("It was in Porto.", '"Porto"', "Porto"),
        ("It was in porto.", "‘ Porto ’", "porto"),
        # Unicode's forms of the same words
        (NFD("Người tên là Hạnh ở Đà Nẵng."), "tên là Hạnh", NFD("tên là Hạnh")),
        ("Tên là Hạnh ở đây.", NFD("là Hạnh"), "là Hạnh"),
        (NFD("나는 서울에 산다"), "서울에", NFD("서울에")),
        ("e\u0302\u0323 is one letter", NFD("ệ is"), "e\u0302\u0323 is"),
        ("A long\u2011term plan", "long-term", "long\u2011term"),
        ("He left… and came", "left... and", "left… and"),
        ("The har\u200bbour is old", "harbour", "har\u200bbour"),
        ("a so\u00adlu\u00adtion", "solution", "so\u00adlu\u00adtion"),
        ("It cost 27\u00a0euros.", "27 euros", "27\u00a0euros"),
        ("价格是ＡＢＣ１２３元", "ABC123", "ＡＢＣ１２３"),
        ("他说“好”。", "「好」", "“好”"),
        ("彼はｺﾝﾋﾟｭｰﾀを買う。", "コンピュータ", "ｺﾝﾋﾟｭｰﾀ"),
        ("الـــكتاب ذَهَب إلى", "الكتاب ذهب", "الـــكتاب ذَهَب"),
        # emphasis
        ("The **old** harbour is fine.", "The old harbour", "The **old** harbour"),
        ("The old harbour is fine.", "the _old_ `harbour`", "The old harbour"),
        ("这是**重要**的事", "重要的事", "重要**的事"),
    ],
)
def test_a_normalised_quote_maps_back_to_the_right_characters(text, quote, found):
    assert text.count(found) == 1
    start = text.index(found)
    assert find(text, quote) == ("normalised", [(start, start + len(found))])


@given(st.data(), st.text("aBSß İﬁ\t\nŉǰΣς😀", min_size=1, max_size=12))
def test_the_places_of_a_folded_quote_contain_it_when_folded(data, text):
    """Characters that become several by case folding shift no place."""
    assume(text.strip())
    start, end = data.draw(slices(text))
    quote = text[start:end].casefold()
    kind, places = find(text, quote)
    assert kind in ("exact", "normalised")
    assert places == sorted(set(places))
    for s, e in places:
        assert "".join(quote.split()) in "".join(text[s:e].casefold().split())


LONG = (
    "Experienced veterinarians recommended surgery because my stubborn elephant ignored "
    "breakfast, lunch and dinner."
)


@given(data=st.data())
def test_a_small_typo_in_a_long_quote_is_forgiven(data):
    """One letter is missing, wrong or extra: the place covers the intended words and no others."""
    bounds = [match.span() for match in re.finditer(r"\w+", LONG)]
    first = data.draw(st.integers(0, len(bounds) - 5))
    start, end = bounds[first][0], bounds[data.draw(st.integers(first + 4, len(bounds) - 1))][1]
    at = data.draw(st.integers(start + 1, end - 2).filter(lambda i: LONG[i].isalpha()))
    typo = data.draw(st.sampled_from(["", "z", "zz"]))
    kind, [(s, e)] = find(LONG, LONG[start:at] + typo + LONG[at + 1 : end])
    assert kind == "fuzzy"
    assert LONG[s:e].strip(" ,.") == LONG[start:end]


@pytest.mark.parametrize(
    ("text", "quote"),
    [
        # quotes as people write them in what they say about summaries
        ("[A fourth day of strike] now.", "the fourth day of strike"),
        ("Both [players to be ruled out for the season]", "players being ruled out for the season"),
        ("A [three-year contract], he said.", "three year contract"),
        ("Bird [chicken farms in a village]", "chicken farm in a village"),
        # whole words; eight characters are enough; a quote may be a little longer than the text
        ("An [experienced veterinarian came]. She left.", "xperienced vetrinarian cam"),
        ("then he starts [running]", "runninng"),
        ("[the experienced veterinarian]", "the experienced vetterinarians"),
    ],
)
def test_a_fuzzy_place_covers_the_words_in_brackets(text, quote):
    place, text = (text.index("["), text.index("]") - 1), re.sub(r"[][]", "", text)
    assert find(text, quote) == ("fuzzy", [place])
    again = tuple(len(text) + 2 + i for i in place)
    assert find(f"{text}; {text}", quote) == ("fuzzy", [place, again]), "wherever it occurs"


@given(st.text("abcdef ", max_size=40), st.text("uvwxyz ", max_size=40))
def test_an_unrelated_quote_is_lost(text, quote):
    assert find(text, quote) == LOST


def test_a_quote_that_is_short_blank_or_different_is_lost():
    text = "The dog is 27, sleeps by day and then starts running"
    for short in ("41", "thrn", "grumpy", "runing", "runnin9", "sleepss"):
        assert find(text, short) == LOST
    for other in ("The dog never sleeps at night.", "The cat is 72, sleeps by day", text + text):
        assert find(text, other) == LOST
    assert find("!?#$ %&()= +-*/ <>", "!?#$ %&()= +.*/ <>") == LOST, "no words, no place is close"
    for blank in ("", "\n\t ", "\u3000", "\u200b \ufeff"):
        assert find("", blank) == find("a b\n\u3000\u00a0c", blank) == find("", "word") == LOST


@pytest.mark.parametrize("unit", ["x", "the dog ", "İß", "\\("])
def test_a_quote_of_a_megabyte_is_lost_quickly(unit):
    quote = unit * (10**6 // len(unit))
    start = time.process_time()
    assert find("The dog sleeps. " * 50, quote) == LOST
    assert time.process_time() - start < 1


# ---- feedback to spans -------------------------------------------------------------------------
TWICE = "He is 27 today. Yes, 27 it is."


@pytest.mark.parametrize(
    ("times", "good", "poor"),
    [(1, [0], [2]), (2, [0, 1], [1, 2]), (4, [0, 1, 2], [0, 1, 2])],
)
def test_a_quote_given_k_times_marks_k_places(times, good, poor):
    """Good quotes mark the first places and poor ones the last; more places make them ambiguous."""
    for kind, score, marked in (("good", 1, good), ("poor", -1, poor)):
        spans, counts = resolve("so, so, so.", Feedback("", **{kind: ["so"] * times}))
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


def test_a_severity_is_the_score_if_and_only_if_severities_are_asked_for():
    """The sign of a severity is ignored: the list of a quote says whether it is good or poor."""
    good = ["He", {"text": "today", "severity": 0.25}]
    feedback = Feedback("", good, poor=[{"text": "it", "severity": -0.5}, "Yes"])
    scores = [span.score for span in resolve(TWICE, feedback, severities=True)[0]]
    assert scores == [1, 0.25, -0.5, -1]
    assert resolve(TWICE, feedback) == resolve(TWICE, feedback.plain())
    twice = [{"text": "27", "severity": 0.1}, {"text": "27", "severity": 0.9}]
    spans, _ = resolve(TWICE, Feedback("", poor=twice), severities=True)
    assert spans == [(6, 8, -0.1), (21, 23, -0.9)], "in the order in which they are given"


QUOTES = ["27", "TODAY", "yes,  27", "He iz 27 today", "cat", "", "He"]


@given(st.lists(st.sampled_from(QUOTES)), st.integers(0, 6))
def test_every_quote_is_counted_once_under_its_kind(quotes, cut):
    good, poor = quotes[:cut], quotes[cut:]
    spans, counts = resolve(TWICE, Feedback("", good, poor))
    kinds = [find(TWICE, quote)[0] for quote in quotes]
    for kind in ("exact", "normalised", "fuzzy", "lost"):
        assert counts[kind] == kinds.count(kind)
    assert counts["ambiguous"] == sum(part.count("27") == 1 for part in (good, poor))
    located = [{quote for quote in part if find(TWICE, quote)[1]} for part in (good, poor)]
    assert len(spans) >= sum(map(len, located)) and bool(spans) == any(located)
