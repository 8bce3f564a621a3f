"""Dense labels, an ablation of the paper: labels spread until 70% of the words have one.

It wraps another critic; the default, rm, must be trained first.

python train_ppo.py --critic extras/studies/dense.py --output_dir runs/toy/ppo_dense
"""

import re

from extras.studies.noisy import wrapped
from t2g.align import resolve
from t2g.critics import quote_of
from t2g.feedback import Feedback, Span

SHARE = 0.7  # of the words (Text2Grad, table of ablations: about 70%)


def add_flags(add):
    add("--dense_critic", "rm", "the critic whose labels are spread")


def critic(task, args):
    def with_dense_labels(example, response, feedback):
        return dense_feedback(response, feedback)

    return wrapped(task, args, args.dense_critic, with_dense_labels)


def dense(spans, text: str) -> list[Span]:
    """Returns a span per labelled word; labels spread until SHARE of the words have one."""
    words = [word.span() for word in re.finditer(r"\S+", text)]
    labels = []
    for start, end in words:
        touching = [score for s, e, score in spans if s < end and start < e]
        labels.append(min(touching, default=0))
    missing = SHARE * len(words) - sum(map(bool, labels))
    while missing > 0 and any(labels):
        before = labels.copy()
        for i, label in enumerate(before):
            nearby = [other for other in before[max(i - 1, 0) : i + 2] if other]
            if not label and nearby and missing > 0:
                labels[i] = nearby[0]
                missing -= 1
    return [Span(*word, label) for word, label in zip(words, labels) if label]


def dense_feedback(text: str, feedback: Feedback) -> Feedback:
    """Returns the critique with dense labels; neighbouring words of one label are one quote."""
    places, last = {1.0: [], -1.0: []}, None
    for start, end, score in dense(resolve(text, feedback)[0], text):
        if last and last[2] == score and not text[last[1] : start].strip():
            places[score].pop()
            start = last[0]
        places[score].append((start, end))
        last = start, end, score
    good, poor = ([quote_of(text, *place) for place in places[score]] for score in (1.0, -1.0))
    return Feedback(feedback.critique, good, poor)
