"""The rule of the task summarize: what it marks, and what a policy would earn by it."""

import pytest

from t2g.align import resolve
from t2g.tasks import summarize

SOURCE = (
    "The council of Leeds will close two libraries in March, Mr. Hughes told reporters. Residents "
    "of the city protested on Monday and asked for another vote on the plan to save 400,000 pounds."
)
REFERENCE = "Leeds council is to close two libraries despite protests, councillor Ann Moss said."
EXAMPLE = summarize.example_of(SOURCE, REFERENCE)
NONE = "It has nothing of what matters."


def reward(response) -> int:
    """Returns the sum over the characters of the response, +1 in good spans and -1 in poor ones."""
    scores = [0] * len(response)
    for start, end, score in resolve(response, summarize.critique(EXAMPLE, response))[0]:
        scores[start:end] = [score] * (end - start)
    return sum(scores)


POOR = [  # response, poor quotes
    ("The council of Leeds will close two libraries in April.", ["April"]),
    ("The council of Leeds will close three libraries in 2027.", ["2027"]),
    ('The council of Leeds called the libraries "far too old".', ["far too old"]),
    ("The council of Leeds asked the council of Leeds to vote.", ["the council of Leeds"]),
    ("The council of Leeds will close libraries. Residents protested.", ["Residents"]),
    ("The council of Leeds will close two libraries in", ["in"]),
    ("Leeds closes libraries.", ["Leeds closes libraries."]),
    ("Mr. Hughes said that Leeds will close two libraries.", []),
    ("Then Ann Moss said that Leeds will close two libraries.", ["Ann", "Moss"]),
    ("", []),
]


@pytest.mark.parametrize(("response", "poor"), POOR)
def test_each_fault_is_quoted(response, poor):
    feedback = summarize.critique(EXAMPLE, response)
    quotes = [quote if isinstance(quote, str) else quote["text"] for quote in feedback.poor]
    assert [quote.strip() for quote in quotes] == poor


def test_good_are_supported_phrases_that_speak_of_what_the_human_summary_speaks_of():
    response = "The council of Leeds will close two libraries, and residents of the city are angry."
    feedback = summarize.critique(EXAMPLE, response)
    assert feedback.good == ["council of Leeds will close two", "libraries"]
    assert feedback.critique == "It rightly says council of Leeds will close two, libraries."
    assert summarize.critique(EXAMPLE, "Residents of the city protested on Monday.").good == []
    listed = "Leeds, council, close, libraries, Leeds, council and two are named here."
    assert len(summarize.critique(EXAMPLE, listed).good) == summarize.MAX_GOOD


def test_silence_earns_nothing_and_a_few_words_less_than_a_whole_sentence():
    whole = reward("The council of Leeds will close two libraries in March.")
    assert reward("Leeds.") < reward("") == 0 < whole
    assert summarize.critique(EXAMPLE, "").critique == NONE


def test_the_share_of_sentences_counts_one_whole_sentence():
    whole = "The council of Leeds will close two libraries."
    two = "The council of Leeds will close libraries. Residents protested."
    responses = [whole, f"the{whole[3:]}", whole[:-1], "Leeds closes libraries.", two]
    scores = [summarize.score(EXAMPLE, response)["sentence"] for response in responses]
    assert scores == [1, 0, 0, 0, 0]
