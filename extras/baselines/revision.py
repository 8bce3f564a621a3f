"""A second try: what a policy is asked when it shall write its response anew, with the critique before its eyes."""

from functools import partial

from t2g.critics import fitting_prompt
from t2g.feedback import Feedback
from t2g.policy import context_length
from t2g.respond import respond

REVISION_PROMPT = (
    "{prompt}\n\n### Response\n{response}\n\n### Critique\n{critique}\n\n### Better response"
)


def revision_prompt(prompt: str, response: str, feedback: Feedback) -> str:
    return REVISION_PROMPT.format(prompt=prompt, response=response, critique=feedback.critique)


def fitting_revision(model, tokenizer, prompt, response, feedback, response_length) -> str:
    """revision_prompt(), with the middle of the prompt left out where the context has no room for it and the new response."""
    room = context_length(model) - response_length
    return fitting_prompt(
        tokenizer, prompt, response, room, partial(revision_prompt, feedback=feedback)
    )


def second_try(
    model, tokenizer, examples, texts, critic, response_length, **sampling
) -> tuple[list[str], list[bool]]:
    """The responses as the model writes them anew after the critic's critiques, and whether each one ended by itself.

    Where the critique is unreadable the first response stays and counts as ended.
    """
    feedback = critic(examples, texts)
    rows = [row for row in zip(examples, texts, feedback) if row[2]]
    asked = [
        fitting_revision(model, tokenizer, example.prompt, text, said, response_length)
        for example, text, said in rows
    ]
    written = zip(*respond(model, tokenizer, asked, response_length, **sampling))
    revised = [next(written) if said else (text, True) for text, said in zip(texts, feedback)]
    return [text for text, _ in revised], [ended for _, ended in revised]
