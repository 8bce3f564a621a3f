"""Feedback: what is rendered can be parsed again, and what is no feedback is refused by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2g.feedback import Feedback, FeedbackError, quoted, reward_prompt

SPAN_MAP = '{"good": ["a"], "poor": []}'
nasty = st.text(
    st.sampled_from('ab{}[]()"\\/:, \t\r\n\v\f\x00\x1c\x85\u2028\u2029\ufeffé😀👩‍👩‍👧'), max_size=30
)
texts = st.one_of(st.text(max_size=30), nasty)
critiques = st.one_of(
    texts,
    st.builds(
        "{}{}{}".format, texts, st.sampled_from([SPAN_MAP, "\n" + SPAN_MAP, SPAN_MAP + "\n"]), texts
    ),
)
feedbacks = st.builds(Feedback, critiques, st.lists(texts, max_size=4), st.lists(texts, max_size=4))
severities = st.floats(-1, 1) | st.integers(-1, 1)
quotes = texts | st.fixed_dictionaries({"text": texts, "severity": severities})
with_severities = st.builds(
    Feedback, critiques, st.lists(quotes, max_size=4), st.lists(quotes, max_size=4)
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
near_maps = st.fixed_dictionaries(
    {"good": json_values | st.lists(st.text()), "poor": json_values | st.lists(st.text())}
)


def parsed(z):
    """The feedback in z, None if parse refuses it; any other exception goes through and fails the test."""
    try:
        return Feedback.parse(z)
    except FeedbackError as error:
        assert str(error)
        return None


# ---- there and back --------------------------------------------------------------------------------------------------


@given(feedbacks)
def test_parse_is_the_inverse_of_render(feedback):
    assert Feedback.parse(feedback.render()) == feedback


@given(with_severities)
def test_severities_come_back_too_and_plain_feedback_has_none(feedback):
    assert Feedback.parse(feedback.render()) == feedback
    plain = feedback.plain()
    assert plain.plain() == plain == Feedback.parse(plain.render())
    for before, after in ((feedback.good, plain.good), (feedback.poor, plain.poor)):
        assert after == [quote if isinstance(quote, str) else quote["text"] for quote in before]


@given(texts, severities)
def test_a_quote_weighs_its_severity_whatever_the_sign_and_a_plain_one_weighs_one(text, severity):
    assert quoted(text) == (text, 1)
    assert quoted({"text": text, "severity": severity}) == quoted(
        {"text": text, "severity": -severity}
    )
    assert quoted({"text": text, "severity": severity})[1] == max(severity, -severity)


@given(feedbacks, st.text(" \t\r\n", max_size=5))
def test_white_space_after_the_span_map_counts_for_nothing(feedback, space):
    assert Feedback.parse(feedback.render() + space) == feedback


@given(feedbacks)
def test_the_critique_comes_first_and_the_span_map_is_one_line_of_json(feedback):
    critique, _, last_line = feedback.render().rpartition("\n")
    assert critique == feedback.critique
    assert json.loads(last_line) == {"good": feedback.good, "poor": feedback.poor}


def test_quotes_stand_in_the_span_map_as_they_are_written():
    """A model should not have to learn \\u escapes for letters that it can write."""
    assert "東京 é 😀" in Feedback("c", ["東京 é 😀"]).render()


def test_the_keys_may_come_in_either_order():
    assert Feedback.parse('c\n{"poor": ["b"], "good": ["a"]}') == Feedback("c", ["a"], ["b"])


# ---- what is no feedback -----------------------------------------------------------------------------------------------


@given(st.one_of(texts, st.builds("{}\n{}".format, texts, texts)))
def test_random_text_is_refused_or_is_feedback_that_comes_back(z):
    feedback = parsed(z)
    assert feedback is None or Feedback.parse(feedback.render()) == feedback


@given(feedbacks, st.data())
def test_a_span_map_cut_short_is_refused(feedback, data):
    z = feedback.render()
    last_line = z.rpartition("\n")[2]
    lost = data.draw(st.integers(1, len(last_line) - 1))
    with pytest.raises(FeedbackError):
        Feedback.parse(z[:-lost])


@given(feedbacks, st.text(min_size=1).filter(str.strip))
def test_a_span_map_with_words_behind_it_is_refused(feedback, words):
    z = feedback.render() + " " + words.replace("\n", " ")
    with pytest.raises(FeedbackError):
        Feedback.parse(z)


@given(feedbacks, st.data())
def test_a_changed_character_gives_feedback_error_or_feedback(feedback, data):
    z = feedback.render()
    i = data.draw(st.integers(0, len(z) - 1))
    mangled = (
        z[:i]
        + data.draw(
            st.sampled_from(["", "{", "}", "[", "]", '"', "\\", ",", ":", "\n", "0", "x", "\ufffd"])
        )
        + z[i + 1 :]
    )
    result = parsed(mangled)
    if result is not None:
        assert isinstance(result.critique, str)
        assert all(isinstance(quote, str) for quote in [*result.good, *result.poor])


@given(json_values | near_maps)
def test_any_json_is_accepted_exactly_if_it_is_a_span_map(value):
    span_map = (
        isinstance(value, dict)
        and value.keys() == {"good", "poor"}
        and all(
            isinstance(quotes, list) and all(isinstance(quote, str) for quote in quotes)
            for quotes in value.values()
        )
    )
    assert parsed("A critique.\n" + json.dumps(value)) == (
        Feedback("A critique.", **value) if span_map else None
    )


NO_SPAN_MAP = {
    "nothing": "",
    "a word": "fine",
    "null": "null",
    "a list": "[]",
    "a list of two lists": '[["good", []], ["poor", []]]',
    "a text": '"good poor"',
    "a number": "1",
    "no keys": "{}",
    "a missing key": '{"good": []}',
    "an extra key": '{"good": [], "poor": [], "fair": []}',
    "a key twice": '{"good": [], "poor": [], "poor": []}',
    "a key twice and one missing": '{"good": [], "good": []}',
    "another case": '{"Good": [], "Poor": []}',
    "a text for a list": '{"good": "a", "poor": []}',
    "an object for a list": '{"good": {"a": "b"}, "poor": []}',
    "an empty object for a list": '{"good": {}, "poor": []}',
    "null for a list": '{"good": null, "poor": []}',
    "a number for a quote": '{"good": [1], "poor": []}',
    "null for a quote": '{"good": [null], "poor": []}',
    "a truth value for a quote": '{"good": [true], "poor": []}',
    "a list for a quote": '{"good": [["a"]], "poor": []}',
    "an object for a quote": '{"good": [{}], "poor": []}',
    "a severity without text": '{"good": [{"severity": 1}], "poor": []}',
    "a text without severity": '{"good": [{"text": "a"}], "poor": []}',
    "an extra key in a quote": '{"good": [{"text": "a", "severity": 1, "why": ""}], "poor": []}',
    "a number for a text": '{"good": [{"text": 1, "severity": 1}], "poor": []}',
    "a severity above 1": '{"good": [{"text": "a", "severity": 1.01}], "poor": []}',
    "a severity below -1": '{"good": [{"text": "a", "severity": -1.01}], "poor": []}',
    "a severity of NaN": '{"good": [{"text": "a", "severity": NaN}], "poor": []}',
    "a severity of infinity": '{"good": [{"text": "a", "severity": -Infinity}], "poor": []}',
    "a severity that is a text": '{"good": [{"text": "a", "severity": "1"}], "poor": []}',
    "a severity that is true": '{"good": [{"text": "a", "severity": true}], "poor": []}',
    "a severity that is null": '{"good": [{"text": "a", "severity": null}], "poor": []}',
    "a severity twice": '{"good": [{"text": "a", "severity": 1, "severity": 1}], "poor": []}',
    "NaN for a quote": '{"good": [NaN], "poor": []}',
    "NaN for a list": '{"good": NaN, "poor": []}',
    "infinity": '{"good": [-Infinity], "poor": []}',
    "a huge integer": '{"good": [' + "9" * 100_000 + '], "poor": []}',
    "a huge exponent": '{"good": [1e999999], "poor": []}',
    "single quotation marks": "{'good': [], 'poor': []}",
    "a trailing comma": '{"good": ["a",], "poor": []}',
    "a comment": '{"good": [], "poor": []} // done',
    "a code fence": "```json {} ```",
    "two maps": SPAN_MAP + SPAN_MAP,
    "an unfinished escape": '{"good": ["\\u12"], "poor": []}',
    "a raw control character": '{"good": ["a\tb"], "poor": []}',
    "deep lists": "[" * 100_000,
    "deep lists, closed": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "deep quotes": '{"good": ' + "[" * 100_000 + "]" * 100_000 + ', "poor": []}',
    "a mark of byte order": "\ufeff" + SPAN_MAP,
}


@pytest.mark.parametrize("last_line", NO_SPAN_MAP.values(), ids=NO_SPAN_MAP.keys())
def test_a_last_line_that_is_no_span_map_is_refused(last_line):
    with pytest.raises(FeedbackError):
        Feedback.parse("A critique.\n" + last_line)


@pytest.mark.parametrize("z", ["", " \n\t\n ", "only a critique", SPAN_MAP, " " + SPAN_MAP + "\n"])
def test_a_text_without_critique_or_span_map_is_refused(z):
    with pytest.raises(FeedbackError):
        Feedback.parse(z)


def test_what_is_accepted_can_be_written_to_a_file():
    """Half of a surrogate pair is good JSON, but no text that UTF-8 can hold."""
    for quote in ('"\\ud83d"', '{"text": "\\ud83d", "severity": 1}'):
        feedback = parsed('A critique.\n{"good": [%s], "poor": []}' % quote)  # noqa: UP031
        assert feedback is None or feedback.render().encode()


def test_a_span_map_before_the_last_line_does_not_count():
    with pytest.raises(FeedbackError):
        Feedback.parse("A critique.\n" + SPAN_MAP + "\nAnd one more remark.")


@pytest.mark.parametrize(
    ("z", "named"),
    [
        ("only a critique", "a span map"),
        ("c\n{", "not JSON"),
        ('c\n{"good": [], "good": []}', "a key appears twice"),
        ("c\n[]", '"good", "poor"'),
        ('c\n{"good": []}', '"good", "poor"'),
        ('c\n{"good": [1], "poor": []}', '"good" must be a list'),
        ('c\n{"good": [], "poor": [1]}', '"poor" must be a list'),
        ('c\n{"good": [], "poor": ["\\ud83d"]}', "surrogate"),
    ],
)
def test_each_refusal_names_the_fault(z, named):
    with pytest.raises(FeedbackError, match=named):
        Feedback.parse(z)


@pytest.mark.parametrize(
    "quotes", ["Porto", None, [None], [{"text": "x"}], [{"text": "x", "severity": 5}], {"a": "b"}]
)
def test_feedback_that_is_made_by_hand_is_checked_too(quotes):
    for wrong in ({"good": quotes}, {"poor": quotes}):
        with pytest.raises(FeedbackError):
            Feedback("c", **wrong)


def test_feedback_error_is_a_value_error():
    assert issubclass(FeedbackError, ValueError)


# ---- the prompt of the reward model --------------------------------------------------------------------------------------


@given(texts, texts)
def test_the_reward_prompt_holds_prompt_and_response_as_they_are(prompt, response):
    whole = reward_prompt(prompt, response)
    assert whole.startswith(prompt)
    assert response in whole[len(prompt) :]
