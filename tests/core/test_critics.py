"""Quotes that programs make: each one stands in the place that was meant."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from t2g.align import locate
from t2g.critics import quote_of


@given(
    st.data(),
    st.lists(st.sampled_from(["a", "b", "ab", "27"]), min_size=1, max_size=8),
    st.sampled_from([" ", ", ", ","]),
)
def test_a_quote_made_for_words_stands_in_one_place_that_ends_where_asked(data, parts, glue):
    """Wherever that can be: the text up to there must not itself come again."""
    text = glue.join(parts)
    bounds = [match.span() for match in re.finditer(r"\w+", text)]
    first = data.draw(st.integers(0, len(parts) - 1))
    start, end = bounds[first][0], bounds[data.draw(st.integers(first, len(parts) - 1))][1]
    assume(text.count(text[:end]) == 1 and locate(text, text[:end]) == [(0, end)])
    quote = quote_of(text, start, end)
    assert quote.endswith(text[start:end])
    assert locate(text, quote) == [(end - len(quote), end)]


def test_a_quote_made_for_part_of_a_word_stands_where_asked():
    """The "27" of 1927 cannot be quoted alone where 27 is a word of its own."""
    assert locate("In 1927 27", quote_of("In 1927 27", 5, 7))[0][1] == 7


def test_a_quote_that_stands_alone_is_not_lengthened():
    assert quote_of("Ana is 27, lives in Porto", 7, 9) == "27"


@pytest.mark.parametrize(
    ("text", "place", "quote"),
    [
        ("is 27,27", (6, 8), ",27"),
        ("27,b,27,27", (8, 10), ",27,27"),
        ("a 27 b 27", (7, 9), " b 27"),
        ("27 27", (0, 2), "27"),
        (" so, so", (1, 3), " so"),
    ],
)
def test_a_quote_grows_to_the_last_space_or_comma_before_it_and_no_further_than_the_text(
    text, place, quote
):
    assert quote_of(text, *place) == quote


def test_a_quote_is_lengthened_no_further_than_needed():
    assert quote_of("it is 27, and it is not 27", 24, 26).strip() == "not 27"
