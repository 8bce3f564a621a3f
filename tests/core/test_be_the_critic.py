"""examples/be_the_critic.py: the tokens that a person marks move, and move the right way."""

import re
from pathlib import Path

import pytest
from forking import output, refusal, run

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def play(folder, posts, monkeypatch):
    """The example on the tiny model as a command, and the words of its response."""
    monkeypatch.syspath_prepend(EXAMPLES)
    command = f"be_the_critic --policy {folder}/model --response_length 12"
    command += " --learning_rate 0.01"  # large weights need a small step
    with monkeypatch.context() as patch:
        patch.setattr("builtins.input", lambda question: "")
        code, printed = run(command)
    assert code == 2 and "nothing is marked" in printed
    response = re.search("response: (.*)", printed)[1]
    return command, response.split()


def rows(printed):
    """Delta, advantage, and probability before and after, of each token."""
    lines = printed.partition("after\n")[2].partition("\n\n")[0].splitlines()
    return [[float(word) for word in line.split()[-4:]] for line in lines]


def test_marked_tokens_move_and_lambda_spreads_the_credit(play, monkeypatch):
    command, words = play
    answers, marks = iter([words[0], words[-1]]), ("--good", words[0], "--poor", words[-1])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    asked = output(command)
    assert asked == output(command, *marks), "flags or answers"
    good, poor = (float(x) for x in re.search(r"good (\S+), poor (\S+),", asked).groups())
    assert good > 0 > poor
    assert all(delta == advantage for delta, advantage, *_ in rows(asked))
    spread = rows(output(f"{command} --lam 0.95", *marks))
    assert any(delta == 0 > advantage for delta, advantage, *_ in spread)


def test_words_that_the_response_lacks_are_refused(play):
    command, words = play
    sentence = refusal(command, "--good", f"{words[0]}; xylophone")
    assert "'xylophone' does not occur in the response" in sentence
