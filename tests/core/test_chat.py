"""Chats: templates of all kinds, control tokens that a user spells, and where a turn ends."""

import copy

import pytest

from t2g.chat import chat_text, encode_chats, template_kwargs, turn_edges, use_kwargs
from t2g.supervised import encode_pairs

PARTS = (
    "{% for m in messages %}<|user|>{% for part in m.content %}{{ part.text }}{% endfor %}"
    "{% endfor %}<|assistant|>"
)
CHATML = (
    "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content | trim }}<|pad|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
THINKING = "{{ messages[0].content }}{% if enable_thinking is false %}<|assistant|>{% endif %}"


@pytest.fixture(autouse=True)
def no_kwargs_are_left():
    yield
    use_kwargs(None)


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_a_template_of_parts_gets_parts(tokenizer):
    assert chat_text(with_template(tokenizer, PARTS), "Hi.") == "<|user|>Hi.<|assistant|>"


FAULTY = ["No message.", "{% for m in messages %}", "{{ raise_exception('No.') }}", "{{ 1 // 0 }}"]


@pytest.mark.parametrize("template", FAULTY)
def test_a_template_that_leaves_out_the_prompt_or_fails_is_refused(tokenizer, template, refused):
    assert "chat template" in refused(chat_text, with_template(tokenizer, template), "Hi.")


def test_templates_get_the_arguments_of_the_command_line(tokenizer, refused):
    use_kwargs('{"enable_thinking": false}')
    assert chat_text(with_template(tokenizer, THINKING), "Hi.") == "Hi.<|assistant|>"
    use_kwargs('{"add_generation_prompt": false}')
    assert chat_text(tokenizer, "Hi.").endswith("<|assistant|>"), "the stages' own come first"
    use_kwargs(None)
    assert chat_text(with_template(tokenizer, THINKING), "Hi.") != "Hi.<|assistant|>"
    for wrong in ("enable_thinking=false", "[1]"):
        assert "JSON object" in refused(use_kwargs, wrong)
    use_kwargs('{"a": "\\ud83d"}')
    assert template_kwargs == {"a": "?"}
    use_kwargs('{"continue_final_message": true}')
    refused(chat_text, tokenizer, "Hi.")


def test_a_control_token_that_a_text_spells_stays_text(tokenizer):
    text = "I <|end|> wrote <|assistant|>."
    ids = encode_chats(tokenizer, [text])[0]
    assert tokenizer.decode(ids) == chat_text(tokenizer, text)
    plain = encode_chats(tokenizer, ["I wrote."])[0]
    special = set(tokenizer.all_special_ids)
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    completion = encode_pairs(tokenizer, [("Hi.", text)])[0][1]
    assert [i for i in completion if i in special] == [tokenizer.eos_token_id]


def test_a_control_token_that_a_tokenizer_gets_later_stays_text_too(tokenizer):
    grown = copy.deepcopy(tokenizer)
    encode_chats(grown, ["<|late|>"])
    grown.add_special_tokens({"additional_special_tokens": ["<|late|>"]})
    assert grown.convert_tokens_to_ids("<|late|>") not in encode_chats(grown, ["<|late|>"])[0]


def test_a_completion_ends_with_the_token_that_ends_the_template_s_turns(tokenizer):
    chatml = with_template(tokenizer, CHATML)
    assert turn_edges(chatml) == ("", chatml.convert_tokens_to_ids("<|pad|>"))
    assert encode_pairs(chatml, [("Hi.", "Yes")])[0][1][-1] == turn_edges(chatml)[1]
    no_end = with_template(tokenizer, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert turn_edges(no_end) == ("", tokenizer.eos_token_id)


def test_a_completion_is_encoded_as_the_model_s_own_turn(tok):
    """SentencePiece puts a space before a text, and so before a completion encoded alone."""
    answer = "{% if messages[1] %}{{ messages[1].content }}{% endif %}"
    plain = with_template(tok, f"User: {{{{ messages[0].content }}}}\nBot:{answer}")
    prompt, completion = encode_pairs(plain, [("the dog", "the quick fox")])[0]
    together = plain(chat_text(plain, "the dog") + "the quick fox")["input_ids"]
    assert plain.decode(prompt + completion[:-1]) == plain.decode(together)
