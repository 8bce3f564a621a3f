"""Feedback that is readable by construction: a grammar restricts the tokens of a critic.

    start -> critique "\\n" {"good": [quotes], "poor": [quotes]} EOS

It permits what Feedback.render() writes. Any chat model that ends its critiques is thus a readable
critic. A quote may be any string: a critic that is held to words of the response quotes others than
it means (docs/RESULTS.md). A critique must not contain HEAD.
"""

from functools import lru_cache

import numpy as np
import torch

from t2g.cli import fail
from t2g.feedback import Feedback, FeedbackError
from t2g.policy import eos_ids

HEAD = '\n{"good": ['
QUOTES = r"""
start: head quotes "], \"poor\": [" quotes "]}"
quotes: (quote (", " quote)*)?
quote: STRING | "{\"text\": " STRING ", \"severity\": " SEVERITY "}"
STRING: /"([^"\\\x00-\x1f]|\\["\\bfnrt]|\\u00[01][0-9a-f])*"/
SEVERITY: /-?(0(\.[0-9]+)?|1(\.0+)?|[1-9](\.[0-9]+)?e-0*[1-9][0-9]*)/
"""
# In llguidance's dialect of Lark. The space of QUOTES_ALONE ends a character that lacks some bytes.
GRAMMAR = r'head[capture, lazy]: /(?s:.*)\n\{"good": \[/' + QUOTES
QUOTES_ALONE = r'head: " \n{\"good\": ["' + QUOTES


def parse_cut(z: str) -> Feedback | None:
    """Parses feedback that may end anywhere behind HEAD; an unfinished quote is dropped.

    Returns None if z is not the beginning of feedback.

    >>> parse_cut('Not 27.\\n{"good": [" Porto"], "poor": [" 2').good
    [' Porto']
    """
    critique, head, quotes = z.partition(HEAD)
    for end in range(len(quotes), -1, -1):
        for ending in ("", "}", "]}", '], "poor": []}'):
            try:
                return Feedback.parse(critique + head + quotes[:end] + ending)
            except FeedbackError:
                continue
    return None


class FeedbackGrammar:
    """Keeps greedy samples, one in each row, in the grammar.

    Where a model would end its critique with EOS, its quotes begin. parse_cut() reads quotes that
    the length limit cuts off. A critique that the limit cuts off stays unreadable: a model that
    repeats itself without end would also quote what it repeats.
    """

    def __init__(self, tokenizer, model, rows):
        from llguidance import LLMatcher  # a machine without a learned critic needs no llguidance

        size = max(len(tokenizer), model.config.get_text_config().vocab_size)
        self.eos = eos_ids(tokenizer, model)
        self.vocabulary = read_vocabulary(tokenizer, size, tuple(self.eos))
        whole = LLMatcher(self.vocabulary, GRAMMAR)  # to read a grammar takes longer than a copy
        self.matchers = [whole.deep_copy() for _ in range(rows)]
        self.quotes_alone = LLMatcher(self.vocabulary, QUOTES_ALONE)
        self.ended = set()  # the rows whose critique EOS has ended

    def choose(self, logits, rows):
        """Returns the likeliest permitted next token of these B rows, given logits (B, V)."""
        token = logits.argmax(-1)
        for i, (row, likeliest) in enumerate(zip(rows, token.tolist())):
            matcher, ends = self.matchers[row], likeliest in self.eos
            if ends and row not in self.ended and matcher.get_capture("head") is None:
                self.ended.add(row)
                matcher = self.matchers[row] = self.quotes_alone.deep_copy()
            if not matcher.try_consume_tokens([likeliest]):
                bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
                permitted = np.unpackbits(bits, bitorder="little")[: logits.shape[1]]
                permitted = torch.from_numpy(permitted).bool().to(logits.device)
                token[i] = logits[i].masked_fill(~permitted, -torch.inf).argmax()
                matcher.consume_token(int(token[i]))
        return token


@lru_cache(maxsize=2)
def read_vocabulary(tokenizer, size, eos):
    """Returns the bytes of a tokenizer's tokens, as llguidance wants them."""
    from llguidance import hf

    try:
        return hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=list(eos))
    except ValueError as error:
        fail(f"no grammar can be used with the critic's tokenizer ({error}); add --free_critiques")
