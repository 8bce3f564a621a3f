"""A second try: what a policy is asked when it shall write its response anew, with the critique before its eyes."""

from t2g.feedback import Feedback
from t2g.rollout import respond

REVISION_PROMPT = "{prompt}\n\n### Response\n{response}\n\n### Critique\n{critique}\n\n### Better response"


def revision_prompt(prompt: str, response: str, feedback: Feedback) -> str:
    return REVISION_PROMPT.format(prompt=prompt, response=response, critique=feedback.critique)


def second_try(model, tokenizer, examples, texts, critic, response_length, **sampling) -> tuple[list[str], list[bool]]:
    """The responses as the model writes them anew after the critic's critiques, and whether each one ended by itself.

    Where the critique is unreadable the first response stays and counts as ended.
    """
    feedback = critic(examples, texts)
    asked = [revision_prompt(e.prompt, text, said) for e, text, said in zip(examples, texts, feedback) if said]
    written = zip(*respond(model, tokenizer, asked, response_length, **sampling))
    revised = [next(written) if said else (text, True) for text, said in zip(texts, feedback)]
    return [text for text, _ in revised], [ended for _, ended in revised]
