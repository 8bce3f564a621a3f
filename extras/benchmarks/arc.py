"""Multiple choice by the likelihood of the options: ARC-Challenge, or other questions in its forms.

    python benchmark.py arc MODEL ... --data arc_challenge.jsonl
    python benchmark.py arc MODEL ... --data arc_challenge.jsonl --letters

    accuracy    share of questions whose option with the highest   sum over its tokens of log p(token | question, tokens before)
                is right
    acc_norm    the same with that sum divided by the number of the option's characters, so that short ones have no advantage

The model reads "Question: ...\\nAnswer:", without a chat template or solved examples, and each option stands behind a space: what
lm-evaluation-harness reports under these names at 0 shots, where leaderboards mostly show 25. With --letters the question lists the
options and the answers are " A", " B" and so on, as in the reports of the Llama 3 models: another and mostly an easier test,
in which both figures are one. Intervals are Wilson's, 95%.

Rows are {"query", "choices": [text], "gold": index}, or as the hub's ai2_arc has them, {"question", "choices": {"text", "label"},
"answerKey"}.
"""

import os.path
from time import perf_counter

import torch
from torch.nn import functional as F
from tqdm import tqdm

from extras.benchmarks import print_table
from t2g import cli, data, policy
from t2g.policy import autocast, context_length, response_logits
from t2g.supervised import as_rollout


def add_flags(add):
    add("--data", required=True, help="questions: a .jsonl, .json or .parquet file, or a hub id")
    add(
        "--letters",
        action="store_true",
        help="list the options in the question and compare their letters",
    )
    add("--num_problems", type=cli.positive(int), help="only the first questions")
    add(
        "--batch_size",
        type=cli.positive(int),
        default=16,
        help="options that go through the model together",
    )


def run(args) -> dict:
    """{model: {"accuracy", "acc_norm": {"value", "low", "high"}, "problems", "seconds"}}."""
    if not args.models:
        cli.fail("arc needs a model")
    questions, rows = read(args.data)[: args.num_problems], {}
    if args.letters:
        questions = list(map(with_letters, questions))
    for name in dict.fromkeys(args.models):
        tokenizer, model = policy.load(name, policy.device())
        start = perf_counter()
        found = loglikelihoods(
            model, tokenizer, questions, args.batch_size, args.bf16, desc=f"{name} reads"
        )
        rows[name] = {
            **figures(questions, found),
            "problems": len(questions),
            "seconds": perf_counter() - start,
        }
    print_table(rows)
    return rows


def figures(questions, found) -> dict:
    """Both accuracies with their intervals, from the log-likelihood of each option of each question."""
    right = {"accuracy": 0, "acc_norm": 0}
    for (_, options, gold), sums in zip(questions, found):
        per_character = [value / len(option) for value, option in zip(sums, options)]
        for name, values in (("accuracy", sums), ("acc_norm", per_character)):
            right[name] += values.index(max(values)) == gold
    return {name: proportion(count, len(questions)) for name, count in right.items()}


def proportion(count, total) -> dict:
    """
    >>> {name: round(number, 3) for name, number in proportion(5, 10).items()}
    {'value': 0.5, 'low': 0.237, 'high': 0.763}
    """
    from scipy.stats import binomtest

    interval = binomtest(count, total).proportion_ci(method="wilson")
    return {"value": count / total, "low": float(interval.low), "high": float(interval.high)}


# ---- questions -----------------------------------------------------------------------------------------------------------


def read(path) -> list[tuple[str, list[str], int]]:
    """(question, options, index of the right one) of each row."""
    rows = data.read_rows(path, "test")
    if not isinstance(rows, list) or not rows:
        cli.fail(f"{path} must hold a list of questions")
    return [question(row, f"question {number} of {path}") for number, row in enumerate(rows, 1)]


def question(row, name):
    try:
        if "query" in row:
            text, options, gold = row["query"], row["choices"], row["gold"]
        else:
            text, options = row["question"], row["choices"]["text"]
            gold = row["choices"]["label"].index(row["answerKey"])
        options = [option.strip() for option in options]
        if not (0 <= gold < len(options) and all(options)):
            raise ValueError("its right answer is none of its options, or an option is empty")
        return "Question: " + text.removeprefix("Question:").strip(), options, gold
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        cli.fail(
            f"{name} is of neither form that the head of t2g/benchmarks/arc.py shows: {error!r}"
        )


def with_letters(asked):
    """The same question with its options in its text, and letters in their place.

    >>> with_letters(("Question: 2 + 2?", ["3", "4"], 1))
    ('Question: 2 + 2?\\nA. 3\\nB. 4', ['A', 'B'], 1)
    """
    text, options, gold = asked
    letters = [chr(ord("A") + i) for i in range(len(options))]
    return (
        "\n".join([text, *(f"{letter}. {option}" for letter, option in zip(letters, options))]),
        letters,
        gold,
    )


# ---- likelihoods ---------------------------------------------------------------------------------------------------------


def encode(tokenizer, text, option) -> tuple[list[int], list[int]]:
    """Token ids of a question and of what an option adds to it; a token that spans both counts as the option's."""
    asked = tokenizer(f"{text}\nAnswer:")["input_ids"]
    whole = tokenizer(f"{text}\nAnswer: {option}")["input_ids"]
    shared = len(os.path.commonprefix([asked, whole]))  # noqa: RUF071
    return whole[:shared], whole[shared:]


@torch.no_grad()
def loglikelihoods(
    model, tokenizer, questions, batch_size, bf16=False, desc=None
) -> list[list[float]]:
    """log p(option | question), in nats, of each option of each question."""
    rows = [encode(tokenizer, text, option) for text, options, _ in questions for option in options]
    longest = max(len(asked) + len(added) for asked, added in rows)
    if longest > context_length(model):
        cli.fail(
            f"a question of {longest} tokens does not fit the model's context of {context_length(model)}"
        )
    order, sums = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i]))), [0.0] * len(rows)
    with (
        autocast(bf16),
        tqdm(
            total=len(rows), desc=desc, disable=desc is None, unit="option", mininterval=0.5
        ) as bar,
    ):
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            batch, added = as_rollout(
                [rows[i] for i in index], tokenizer.pad_token_id, model.device
            )
            logits, _ = response_logits(model, batch)
            nats = F.cross_entropy(logits[added].float(), batch.response[added], reduction="none")
            totals = torch.zeros(len(index), device=nats.device).index_add(
                0, added.nonzero()[:, 0], -nats
            )
            for i, total in zip(index, totals.tolist()):
                sums[i] = total
            bar.update(len(index))
    each = iter(sums)
    return [[next(each) for _ in options] for _, options, _ in questions]
