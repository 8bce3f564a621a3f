"""Responses to many prompts, in batches of like length: for critics, for annotating and for measuring."""

from tqdm import tqdm

from t2g import dist
from t2g.rollout import sample


def respond(
    model, tokenizer, prompts, response_length, batch_size=64, desc=None, **sampling
) -> tuple[list[str], list[bool]]:
    """The responses' texts, and whether each one ended by itself: for critics and for measuring.

    Prompts go through in order of their length, so that batches hold little padding. desc shows a progress line.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts, finished = [""] * len(prompts), [False] * len(prompts)
    with (
        dist.whole(model),
        tqdm(
            total=len(prompts), desc=desc, disable=desc is None or dist.rank() > 0, unit="sample"
        ) as bar,
    ):
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            rollout = sample(
                model, tokenizer, [prompts[i] for i in index], response_length, **sampling
            )
            for i, text, ended in zip(index, rollout.texts, rollout.finished.tolist()):
                texts[i], finished[i] = text, ended
            bar.update(len(index))
    return texts, finished
