"""Alignment: where quotes stand in a text, and what feedback marks in it."""

import re
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from t2g.align import (
    find,
    locate,
    resolve,
    response_text,
    span_rewards,
    token_offsets,
)
from t2g.feedback import Feedback, Span

# ---- quotes ------------------------------------------------------------------------------------------------------------

words = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)


def slices(text):
    """Ranges (start, end) of text that are not blank."""
    cuts = st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(sorted)
    return cuts.filter(lambda cut: text[slice(*cut)].strip())


def cuts_a_word(text, start, end):
    """True if one of the two ends stands between two letters or digits, or within a number such as 1.27 or 1,927."""
    number = {
        i
        for match in re.finditer(r"(?=(\d[.,]\d))", text)
        for i in (match.start(1) + 1, match.start(1) + 2)
    }
    return any(
        i in number or (text[i - 1].isalnum() and text[i].isalnum())
        for i in (start, end)
        if 0 < i < len(text)
    )


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
    everywhere = [
        (i, i + size) for i in range(len(text) - size + 1) if text[i : i + size] == text[start:end]
    ]
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
    kind, places = find(
        text, space + space.join(change_case(word) for word in text[start:end].split()) + space
    )
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
    assert find(text, quote) == (
        "normalised",
        [(text.index(found), text.index(found) + len(found))],
    )


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
    kind, [(s, e)] = find(
        LONG, LONG[start:at] + data.draw(st.sampled_from(["", "z", "zz"])) + LONG[at + 1 : end]
    )
    assert kind == "fuzzy"
    assert LONG[s:e].strip(" ,.") == LONG[start:end]


def test_a_fuzzy_quote_needs_eight_characters():
    assert find("then he starts running", "runninng") == ("fuzzy", [(15, 22)])
    assert find("then he starts runnin", "runninn") == ("lost", [])


def test_a_fuzzy_quote_stands_wherever_its_words_do():
    text = "the experienced veterinarian came. Later the experienced veterinarian left."
    kind, places = find(text, "the experienced vetrinarian")
    assert (
        kind == "fuzzy"
        and [text[slice(*place)] for place in places] == ["the experienced veterinarian"] * 2
    )
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
        (
            "She is facing a fourth day of strike action now.",
            "the fourth day of strike action",
            "a fourth day of strike action",
        ),
        (
            "Both players to be ruled out for the season",
            "players being ruled out for the season",
            "players to be ruled out for the season",
        ),
        ("A three-year contract, he said.", "three year contract", "three-year contract"),
        (
            "Then bird chicken farms in a village",
            "chicken farm in a village",
            "chicken farms in a village",
        ),
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


RESEMBLING = [
    "41",
    "thrn",
    "grumpy",
    "runing",
    "runnin9",
    "The dog never sleeps at night.",
    "The cat is 72, sleeps by day",
]


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


@pytest.mark.parametrize(
    "quote", ["x" * 10**6, "the dog " * 125_000, "İß" * 500_000, "\\(" * 500_000]
)
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
    ("times", "good", "poor"),
    [(1, [0], [2]), (2, [0, 1], [1, 2]), (3, [0, 1, 2], [0, 1, 2]), (4, [0, 1, 2], [0, 1, 2])],
)
def test_a_quote_given_k_times_marks_k_places(times, good, poor):
    """The first ones if it is good, the last ones if it is poor; it names them all if there are no more."""
    for feedback, score, marked in (
        (Feedback("", good=["so"] * times), 1, good),
        (Feedback("", poor=["so"] * times), -1, poor),
    ):
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
    feedback = Feedback(
        "",
        good=["He", {"text": "today", "severity": 0.25}],
        poor=[{"text": "it", "severity": -0.5}, "Yes"],
    )
    assert [span.score for span in resolve(TWICE, feedback, severities=True)[0]] == [
        1,
        0.25,
        -0.5,
        -1,
    ]
    assert [span.score for span in resolve(TWICE, feedback)[0]] == [1, 1, -1, -1]
    assert resolve(TWICE, feedback)[1] == resolve(TWICE, feedback.plain())[1]


def test_a_quote_given_twice_takes_its_severities_in_order():
    quotes = [{"text": "27", "severity": 0.1}, {"text": "27", "severity": 0.9}]
    assert resolve(TWICE, Feedback("", poor=quotes), severities=True)[0] == [
        (6, 8, -0.1),
        (21, 23, -0.9),
    ]


def test_a_good_quote_in_several_places_marks_the_first_and_is_counted():
    spans, counts = resolve(TWICE, Feedback("", good=["27"]))
    assert spans == [(6, 8, 1.0)]
    assert counts["ambiguous"] == 1 and counts["exact"] == 1


@given(
    st.lists(st.sampled_from(["27", "TODAY", "yes,  27", "He iz 27 today", "cat", "", "He"])),
    st.data(),
)
def test_every_quote_is_counted_once_by_the_way_it_was_found(quotes, data):
    cut = data.draw(st.integers(0, len(quotes)))
    spans, counts = resolve(TWICE, Feedback("", quotes[:cut], quotes[cut:]))
    kinds = [find(TWICE, quote)[0] for quote in quotes]
    for kind in ("exact", "normalised", "fuzzy", "lost"):
        assert counts[kind] == kinds.count(kind)
    once_in_its_list = sum(part.count("27") == 1 for part in (quotes[:cut], quotes[cut:]))
    assert counts["ambiguous"] == once_in_its_list
    found = [
        set(quote for quote in part if find(TWICE, quote)[1])
        for part in (quotes[:cut], quotes[cut:])
    ]
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
    ids = [
        *tok.encode("the fox is 27 and the dog sleeps", add_special_tokens=False),
        tok.eos_token_id,
    ]
    text = response_text(tok, ids)
    offsets = token_offsets(tok, ids)
    spans, _ = resolve(text, Feedback("", good=["dog"], poor=["27"]))
    delta = span_rewards(offsets, spans)
    for score, quote in ((1, "dog"), (-1, "27")):
        assert (
            "".join(
                text[start:end] for (start, end), d in zip(offsets, delta) if d == score
            ).strip()
            == quote
        )
    assert delta[-1] == 0
