"""Quotes made by programs: each is found in the place that was meant."""

import re
from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from t2g import critics
from t2g.align import locate
from t2g.critics import checked, quote_of, rule_critic
from t2g.feedback import Feedback

PARTS = st.lists(st.sampled_from(["a", "b", "ab", "27"]), min_size=1, max_size=8)


@given(st.data(), PARTS, st.sampled_from([" ", ", ", ","]))
def test_a_quote_of_words_is_found_once_and_ends_where_they_end(data, parts, glue):
    """This holds where it is possible: the text up to there must be unique."""
    text = glue.join(parts)
    bounds = [match.span() for match in re.finditer(r"\w+", text)]
    first = data.draw(st.integers(0, len(parts) - 1))
    start, end = bounds[first][0], bounds[data.draw(st.integers(first, len(parts) - 1))][1]
    assume(text.count(text[:end]) == 1 and locate(text, text[:end]) == [(0, end)])
    quote = quote_of(text, start, end)
    assert quote.endswith(text[start:end])
    assert locate(text, quote) == [(end - len(quote), end)]


@pytest.mark.parametrize(
    ("text", "place", "quote"),
    [
        ("Ana is 27, lives in Porto", (7, 9), "27"),
        ("27,b,27,27", (8, 10), ",27,27"),
        ("27 27", (0, 2), "27"),
        (" so, so", (1, 3), " so"),
        ("it is 27, and it is not 27", (24, 26), " not 27"),
        ("In 1927 27", (5, 7), " 1927"),
    ],
)
def test_a_quote_grows_word_by_word_to_the_left_until_it_is_unique(text, place, quote):
    assert quote_of(text, *place) == quote


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("def critic(task, args:", "cannot be imported: '(' was never closed"),
        ("import no_such_module", "cannot be imported: No module"),
        ("x = 1", "must define critic(task, args)"),
        ("critic = lambda task: None", "must define critic(task, args)"),
        ("critic = lambda *_: None", "must return a function, not None"),
        ("critic = lambda *_: lambda *_: None", "no list of values for 2 responses"),
        ("critic = lambda *_: lambda *_: (0.0 for _ in 'ab')", "no list of values"),
        ("critic = lambda *_: lambda *_: Feedback('')", "no list of values"),
        ("critic = lambda *_: lambda *_: ['a', 'b']", "returned 'a', not"),
        ("critic = lambda *_: lambda *_: [Feedback(None)] * 2", "critique=None"),
        ("critic = lambda *_: lambda *_: [Feedback('', ('a',))] * 2", '"good" must be a list'),
        ("critic = lambda *_: lambda *_: [1, 1]", "returned 1, not"),
        ("critic = lambda *_: lambda *_: [1.0, float('nan')]", "returned nan"),
        ("critic = lambda *_: lambda *_: [None]", "1 values for 2 responses"),
    ],
)
def test_a_faulty_critic_file_ends_with_one_sentence(source, named, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("from t2g.feedback import Feedback\n" + source)
    with pytest.raises(SystemExit):
        args = SimpleNamespace(critic=str(tmp_path / "mine.py"))
        critics.load_critic(None, args, tmp_path, "cpu")([None] * 2, ["a", "b"])
    assert named in capsys.readouterr().err


def test_half_a_surrogate_pair_in_feedback_becomes_a_question_mark(capsys):
    half = Feedback("Lyon \ud83d", [], ["a", {"text": "\ud83d", "severity": 0.5}])
    whole = Feedback("Lyon ?", [], ["a", {"text": "?", "severity": 0.5}])
    assert checked(lambda *_: [half, None])([None] * 2, ["a", "b"]) == [whole, None]
    assert "half a surrogate pair" in capsys.readouterr().out


def test_a_rule_must_return_feedback(refused):
    for one in (None, 1.0, "poor"):
        critic = rule_critic(SimpleNamespace(critique=lambda *_, one=one: one))
        assert f"returned {one!r}" in refused(critic, [None], ["a"])
