"""Feedback: parse inverts render, and a text that is not feedback is refused by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2g.feedback import Feedback, FeedbackError, reward_prompt

SPAN_MAP = '{"good": ["a"], "poor": []}'
NASTY = 'ab{}[]()"\\/:, \t\r\n\v\f\x00\x1c\x85\u2028\u2029\ufeffé😀👩‍👩‍👧'
texts = st.text(max_size=30) | st.text(st.sampled_from(NASTY), max_size=30)
near_span_maps = st.sampled_from([SPAN_MAP, "\n" + SPAN_MAP, SPAN_MAP + "\n"])
critiques = texts | st.builds("{}{}{}".format, texts, near_span_maps, texts)
severities = st.floats(-1, 1) | st.integers(-1, 1)
quotes = texts | st.fixed_dictionaries({"text": texts, "severity": severities})


def feedback_of(quotes):
    lists = st.lists(quotes, max_size=4)
    return st.builds(Feedback, critiques, lists, lists)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


def nested(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)


json_values = st.recursive(scalars, nested, max_leaves=6)
list_or_not = json_values | st.lists(st.text())
near_maps = st.fixed_dictionaries({"good": list_or_not, "poor": list_or_not})


def parsed(z):
    """The feedback in z, or None if parse refuses it; any other exception fails the test."""
    try:
        return Feedback.parse(z)
    except FeedbackError as error:
        assert str(error) and isinstance(error, ValueError)
        return None


@given(feedback_of(quotes), st.text(" \t\r\n", max_size=5))
def test_parse_inverts_render_and_plain_feedback_has_no_severities(feedback, space):
    critique, _, last_line = feedback.render().rpartition("\n")
    assert critique == feedback.critique
    assert json.loads(last_line) == {"good": feedback.good, "poor": feedback.poor}
    assert Feedback.parse(feedback.render() + space) == feedback
    plain = feedback.plain()
    assert plain.plain() == plain == Feedback.parse(plain.render())
    for before, after in ((feedback.good, plain.good), (feedback.poor, plain.poor)):
        assert after == [quote if isinstance(quote, str) else quote["text"] for quote in before]


def test_quotes_are_written_without_escapes_and_keys_come_in_either_order():
    assert "東京 é 😀" in Feedback("c", ["東京 é 😀"]).render()
    assert Feedback.parse('c\n{"poor": ["b"], "good": ["a"]}') == Feedback("c", ["a"], ["b"])


@given(texts, texts)
def test_the_reward_prompt_contains_prompt_and_response_verbatim(prompt, response):
    whole = reward_prompt(prompt, response)
    assert whole.startswith(prompt) and response in whole[len(prompt) :]


@given(feedback_of(texts), st.data())
def test_damaged_feedback_is_refused_or_is_feedback_that_renders_to_itself(feedback, data):
    z = feedback.render()
    i = data.draw(st.integers(0, len(z) - 1))
    changed = data.draw(texts | st.sampled_from(["", *'{}[]"\\,:\n0x\ufffd']))
    result = parsed(z[:i] + changed + z[i + 1 :])
    assert result is None or Feedback.parse(result.render()) == result
    lost = data.draw(st.integers(1, len(z.rpartition("\n")[2]) - 1))
    words = data.draw(st.text(min_size=1).filter(str.strip)).replace("\n", " ")
    for damaged in (z[:-lost], f"{z} {words}", f"{z}\n{words}"):
        assert parsed(damaged) is None


@given(json_values | near_maps)
def test_json_is_accepted_if_and_only_if_it_is_a_span_map(value):
    expected = None
    if isinstance(value, dict) and value.keys() == {"good", "poor"}:
        lists = all(isinstance(quotes, list) for quotes in value.values())
        if lists and all(isinstance(quote, str) for quote in value["good"] + value["poor"]):
            expected = Feedback("A critique.", **value)
    assert parsed("A critique.\n" + json.dumps(value)) == expected


NO_SPAN_MAPS = [
    # no object, or one with other keys
    "", "fine", "[]", '[["good", []], ["poor", []]]', '"good poor"', '{"good": []}',
    '{"good": [], "poor": [], "fair": []}', '{"good": [], "poor": [], "poor": []}',
    # no lists, or lists of other things than strings
    '{"good": "a", "poor": []}', '{"good": {"a": "b"}, "poor": []}', '{"good": NaN, "poor": []}',
    '{"good": [1], "poor": []}', '{"good": [["a"]], "poor": []}', '{"good": [{}], "poor": []}',
    # damaged severities
    '{"good": [{"severity": 1}], "poor": []}', '{"good": [{"text": "a"}], "poor": []}',
    '{"good": [{"text": "a", "severity": 1, "why": ""}], "poor": []}',
    '{"good": [{"text": 1, "severity": 1}], "poor": []}',
    '{"good": [{"text": "\\ud83d", "severity": 1}], "poor": []}',
    '{"good": [{"text": "a", "severity": 1, "severity": 1}], "poor": []}',
    # no JSON
    "{'good': [], 'poor': []}", '{"good": ["a",], "poor": []}', '{"good": [], "poor": []} // done',
    "```json {} ```", SPAN_MAP + SPAN_MAP, '{"good": ["a\tb"], "poor": []}', "\ufeff" + SPAN_MAP,
    # numbers and nesting that overflow
    '{"good": [' + "9" * 100_000 + '], "poor": []}', '{"good": [1e999999], "poor": []}',
    "[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000,
    '{"good": ' + "[" * 100_000 + "]" * 100_000 + ', "poor": []}',
]  # fmt: skip
SEVERITIES = ("1.01", "-1.01", "NaN", "-Infinity", '"1"', "true", "null")
NO_SPAN_MAPS += [f'{{"good": [{{"text": "a", "severity": {x}}}], "poor": []}}' for x in SEVERITIES]


def test_what_is_not_a_critique_and_a_span_map_is_refused():
    for last_line in NO_SPAN_MAPS:
        assert parsed("A critique.\n" + last_line) is None, last_line[:100]
    for z in ("", " \n\t\n ", "only a critique", SPAN_MAP, " " + SPAN_MAP + "\n"):
        assert parsed(z) is None


def test_feedback_that_is_made_by_hand_is_checked_too():
    for quotes in ("Porto", None, [None], [{"text": "x", "severity": 5}], {"a": "b"}):
        for wrong in ({"good": quotes}, {"poor": quotes}):
            with pytest.raises(FeedbackError):
                Feedback("c", **wrong)
