"""Constrained critiques: a grammar permits all feedback, and what it permits can be read."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from t2g import critics
from t2g.align import response_text
from t2g.feedback import Feedback, reward_prompt
from t2g.grammar import HEAD, FeedbackGrammar, parse_cut
from t2g.openai_critic import openai_critic
from t2g.rollout import sample
from t2g.tasks import Example

RESPONSES = [
    "Ana is 27, a nurse.", 'She said "no\\", twice.\n\n\tThen {"good": [1]}.', "naïve 東京 😀🎉 👩‍👩‍👧🏽",
    "   \x1c\u00a0 a  ", "<|end|>", "", " \n ", "a\x00b\x7f\ufffd",
]  # fmt: skip
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(RESPONSES)
NAMES = ["toy", "byte_level", "byte_fallback"]


def grammar_of(tokenizer):
    config = SimpleNamespace(vocab_size=len(tokenizer))
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    model.generation_config = None
    return FeedbackGrammar(tokenizer, model, 1)


@pytest.fixture(params=NAMES, scope="module")
def any_tokenizer(request, tokenizers, tokenizer):
    return {**tokenizers, "toy": tokenizer}[request.param]


@st.composite
def feedback(draw):
    """Any feedback, whether its quotes stand in a response or not."""

    def quote():
        text = draw(texts)
        severity = draw(st.none() | st.floats(-1, 1) | st.integers(-1, 1))
        return text if severity is None else {"text": text, "severity": severity}

    lists = [[quote() for _ in range(draw(st.integers(0, 2)))] for _ in range(2)]
    critique = draw(texts)
    assume(HEAD not in critique + HEAD[:-1])
    return Feedback(critique, *lists)


@settings(max_examples=60)
@given(feedback())
def test_whatever_render_writes_is_permitted(any_tokenizer, one):
    z = one.render()
    grammar = grammar_of(any_tokenizer)
    [matcher] = grammar.matchers
    ids = grammar.vocabulary.greedy_tokenize(z)  # control tokens stay text
    assert grammar.vocabulary.decode_str(ids) == z
    assert matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting(), z
    end = torch.zeros(1, len(any_tokenizer))
    assert grammar.choose(end, [0]).tolist() == [any_tokenizer.eos_token_id]


@settings(max_examples=60)
@given(st.integers(0, 40), st.integers(0, 60), st.integers(0, 10**6))
def test_a_random_walk_is_readable(any_tokenizer, critique_length, quotes_length, seed):
    grammar, rng, ids = grammar_of(any_tokenizer), torch.Generator(), []
    rng.manual_seed(seed)
    end = any_tokenizer.eos_token_id
    length = critique_length + len(" " + HEAD) + quotes_length  # a token has at least one byte
    while len(ids) < length and end not in ids:
        logits = torch.randn(1, len(any_tokenizer), generator=rng)
        if len(ids) <= critique_length + 3:  # the second EOS in a row does not begin them again
            logits[0, end] = -100.0 if len(ids) < critique_length else 100.0
        ids += grammar.choose(logits, [0]).tolist()
    assert parse_cut(response_text(any_tokenizer, ids[:critique_length])) is None
    z = response_text(any_tokenizer, ids)
    one = parse_cut(z)
    assert one, z
    assert end not in ids or Feedback.parse(z) == one


def test_feedback_that_is_cut_keeps_all_finished_quotes():
    quotes = ["a", {"text": "b", "severity": 0.5}, "]", '"}']
    z = Feedback("Cut.", quotes[:2], quotes[2:]).render()
    counts = []
    for end in range(z.index(HEAD) + len(HEAD), len(z) + 1):
        one = parse_cut(z[:end])
        counts.append(len(one.good + one.poor))
        assert one.critique == "Cut." and one.good + one.poor == quotes[: counts[-1]]
    assert counts == sorted(counts) and {*counts} == {0, 1, 2, 3, 4}
    assert parse_cut("no map") is None


@pytest.fixture
def chat_model(model, tokenizer):
    """An untrained model whose only end of a response is the tokenizer's."""
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def test_an_untrained_model_is_a_readable_critic_if_it_ends_its_critiques(chat_model, tokenizer):
    examples = [Example(f"Describe {n}.", "", {}) for n in range(6)]
    responses = [*RESPONSES[:3], "The fox jumps, the dog sleeps. " * 3, "the thing", "x"]
    prompts = [reward_prompt(one.prompt, text) for one, text in zip(examples, responses)]
    assert None in critics.reward_model_critic(chat_model, tokenizer, 40)(examples, responses)
    first = sample(chat_model, tokenizer, prompts, 1, temperature=0).response[:, 0].tolist()
    chat_model.generation_config.eos_token_id = [tokenizer.eos_token_id, *first]
    one = critics.reward_model_critic(chat_model, tokenizer, 40)(examples, responses)
    assert all(one)
    alone = critics.reward_model_critic(chat_model, tokenizer, 40)
    assert alone(examples[2:3], responses[2:3]) == one[2:3], "whatever the rest of the batch"
    free = critics.reward_model_critic(chat_model, tokenizer, 40, free=True)
    assert free(examples, responses) == [None] * 6


def test_a_grammar_changes_nothing_that_it_permits(chat_model, tokenizer, monkeypatch):
    """Rows end at different steps; every likeliest token is permitted."""
    prompts = ["a", "b c", "d"]
    plain = sample(chat_model, tokenizer, prompts, 12, temperature=0)
    monkeypatch.setattr(FeedbackGrammar, "choose", lambda self, logits, *_: logits.argmax(-1))
    assert sample(chat_model, tokenizer, prompts, 12, 0, readable=True).texts == plain.texts


def test_a_tokenizer_without_bytes_is_refused(tokenizers, refused):
    assert "--free_critiques" in refused(grammar_of, tokenizers["wordpiece"])


@pytest.mark.parametrize("refuses", [[], ["structured_outputs"]])
def test_a_server_gets_the_grammar_unless_it_refuses_it(serve, capsys, refuses):
    cut = 'Well.\n{"good": ["r0"], "poor": ["r'
    url, log = serve(answer=cut, refuses=refuses)
    critic = openai_critic(url, "rm", max_retries=1)
    for _ in range(2):
        assert critic([Example("p", "", {})], ["r0"]) == [Feedback("Well.", ["r0"], [])]
    sent = ["structured_outputs" in line["asked"] for line in log() if line["what"] == "request"]
    assert sent == ([True, False, False] if refuses else [True, True])
    assert capsys.readouterr().out.count("takes no grammar") == len(refuses)
