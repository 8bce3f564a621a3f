"""Prompts and completions as token ids, through the model's own chat template.

A control token that is spelt in a text, such as <|im_end|> in a user's message, stays text.
"""

import re
from functools import lru_cache

from jinja2 import TemplateError

from t2g.cli import FAILURES, fail
from t2g.log import parse_json

QUESTION, ANSWER = "What is 1 + 1?", "It is two."
EXAMPLE_KWARGS = '{"enable_thinking": false}'
TEMPLATE_ERRORS = (TemplateError, *FAILURES)  # a template may call any method of a value
template_kwargs = {}  # --chat_template_kwargs of this process


def use_kwargs(text):
    """Gives the chat templates of all models these arguments, a JSON object or None."""
    try:
        kwargs = parse_json(text or "{}", "--chat_template_kwargs")
    except ValueError:
        kwargs = None
    if not isinstance(kwargs, dict):
        fail(f"--chat_template_kwargs {text} is not a JSON object such as '{EXAMPLE_KWARGS}'")
    template_kwargs.clear()
    template_kwargs.update(kwargs)


def chat_text(tokenizer, prompt: str) -> str:
    """The text of a chat with this message of a user, up to where the model's turn begins."""
    reason = "it leaves out the text of the message"
    for content in (prompt, [{"type": "text", "text": prompt}]):  # some templates take parts alone
        try:
            chat = render(tokenizer, dict(role="user", content=content), add_generation_prompt=True)
        except TEMPLATE_ERRORS as error:
            reason = repr(error)
            continue
        if prompt.strip() in chat:
            return chat
    fail(f"the chat template of {tokenizer.name_or_path or 'a model'} cannot be used: {reason}")


def render(tokenizer, *messages, **options) -> str:
    options = template_kwargs | options | {"tokenize": False}
    return tokenizer.apply_chat_template(list(messages), **options)


def turn_edges(tokenizer) -> tuple[str, int]:
    """The space that the template puts before a response, if any, and the token that ends it."""
    messages = [dict(role="user", content=QUESTION), dict(role="assistant", content=ANSWER)]
    try:
        chat = render(tokenizer, *messages)
    except TEMPLATE_ERRORS:
        return "", tokenizer.eos_token_id
    turn = chat.removeprefix(chat_text(tokenizer, QUESTION))
    space, _, after = turn.partition(ANSWER)
    end = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"][:1]
    is_control = bool(end) and after.lstrip().startswith(tuple(control_tokens(tokenizer)))
    return "" if space.strip() else space, end[0] if is_control else tokenizer.eos_token_id


def encode_chats(tokenizer, prompts) -> list[list[int]]:
    """The token ids of chats with these messages of a user."""
    mark, prompts = marked(tokenizer, prompts)
    return encode(tokenizer, [chat_text(tokenizer, prompt) for prompt in prompts], mark)


def control_tokens(tokenizer) -> list[str]:
    return special_tokens(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)  # some tokenizers have thousands, which take longer to list than to encode
def special_tokens(tokenizer, size) -> list[str]:  # size, because a tokenizer may grow
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]


@lru_cache(maxsize=8)
def first_of_control(tokenizer, size) -> re.Pattern:
    """Matches the first character of each control token that a text spells."""
    tokens = [re.escape(token) for token in special_tokens(tokenizer, size) if len(token) > 1]
    return re.compile(f"(?=(?:{'|'.join(tokens) or '(?!)'})).", re.DOTALL)


def marked(tokenizer, texts) -> tuple[str, list[str]]:
    """A character that no text contains, and the texts with it inserted into control tokens."""
    mark = next(c for c in map(chr, range(0xE000, 0xF900)) if not any(c in text for text in texts))
    first = first_of_control(tokenizer, len(tokenizer))
    return mark, [first.sub(rf"\g<0>{mark}", text) for text in texts]


def encode(tokenizer, texts, mark) -> list[list[int]]:
    """Token ids of texts, cut at each mark, so that no token spans it; the marks are removed."""
    pieces = [text.split(mark) for text in texts]
    flat = [piece for parts in pieces for piece in parts]
    ids = iter(tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else [])
    return [[i for _ in parts for i in next(ids)] for parts in pieces]
