"""examples/be_the_critic.py: the tokens that a person marks move, and move the right way."""

import re
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def play(folder, posts, monkeypatch, capsys):
    """play(*flags) runs the example on the tiny model; returns what it prints."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import be_the_critic

    def run(*flags):
        policy = ["--policy", str(folder / "model"), "--response_length", "12"]
        policy += ["--learning_rate", "0.01"]  # large weights need a small step
        monkeypatch.setattr(sys, "argv", ["be_the_critic.py", *policy, *flags])
        be_the_critic.main()
        return capsys.readouterr().out

    with monkeypatch.context() as patch:
        patch.setattr("builtins.input", lambda question: "")
        with pytest.raises(SystemExit):  # nothing is marked
            run()
    response = capsys.readouterr().out.partition("response: ")[2]
    return run, response.split()


def rows(printed):
    """Delta, advantage, and probability before and after, of each token."""
    lines = printed.partition("after\n")[2].partition("\n\n")[0].splitlines()
    return [[float(word) for word in line.split()[-4:]] for line in lines]


def test_marked_tokens_move_and_lambda_spreads_the_credit(play, monkeypatch):
    run, words = play
    answers = iter([words[0], words[-1]])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    asked = run()
    assert asked == run("--good", words[0], "--poor", words[-1]), "flags or answers"
    good, poor = (float(x) for x in re.search(r"good (\S+), poor (\S+),", asked).groups())
    assert good > 0 > poor
    assert all(delta == advantage for delta, advantage, *_ in rows(asked))
    spread = rows(run("--good", words[0], "--poor", words[-1], "--lam", "0.95"))
    assert any(delta == 0 > advantage for delta, advantage, *_ in spread)


def test_words_that_the_response_lacks_are_refused(play, capsys):
    run, words = play
    with pytest.raises(SystemExit):
        run("--good", f"{words[0]}; xylophone")
    assert "'xylophone' does not occur in the response" in capsys.readouterr().err
