"""Compares responses to held-out prompts with human references: ROUGE, BLEU and BERTScore.

    python -m extras.benchmarks.text MODEL ... --task summarize --data posts.jsonl \\
        --bert_model roberta-large
    python -m extras.benchmarks.text A.jsonl B.jsonl     # lines of {"response", "reference"}

    rouge_1, rouge_2, rouge_l    F1 of stemmed words, by rouge-score; mean over examples
    bleu          of the whole corpus, by sacrebleu, divided by 100
    bert_score    F1 without idf or rescaling, by bert-score; only with --bert_model
    words         words of a response, mean

"differences" holds the mean difference of each further model to the first, example by example;
for BLEU use `sacrebleu --paired-bs`.
"""

import numpy as np
from transformers import AutoTokenizer

from extras import benchmarks
from extras.benchmarks import interval
from t2g import cli, policy, tasks
from t2g.data import needed
from t2g.metrics import DRAWS, rouge

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


@cli.friendly_errors()
def main():
    parser, add = benchmarks.parser(__doc__, task=True)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a model or a .jsonl file")
    add("--bert_model", None, "BERTScore's encoder, such as roberta-large or a folder")
    add(
        "--bert_layers",
        None,
        "layer of the encoder; bert-score's choice if not given",
        cli.positive(int),
    )
    _, args = tasks.parse(parser, "benchmark")
    scorer = bert_scorer(args.bert_model, args.bert_layers) if args.bert_model else None
    scores, columns, expected = {}, {}, None
    for name in args.models:
        references, texts = responses(name, args)
        expected = expected or references
        if references != expected:
            cli.fail(f"{name} has not the references of {args.models[0]}; score it by itself")
        columns[name] = score_texts(references, texts, scorer)
        scores[name] = {metric: interval(column) for metric, column in columns[name].items()}
        scores[name]["bleu"], signature = corpus_bleu(references, texts)
    first, differences = columns.pop(args.models[0]), {}
    for name, own in columns.items():
        differences[name] = {metric: interval(own[metric] - first[metric]) for metric in first}
    result = {"scores": scores, "differences": differences, "examples": len(expected)}
    how = {"bleu": signature, "bert_score": scorer.hash if scorer else None}
    benchmarks.report(result | how)


def responses(name, args) -> tuple[list[str], list[str]]:
    """Returns the references, and the responses of a model or a file."""
    if not name.endswith(".jsonl"):
        examples, texts = benchmarks.respond_to_heldout(name, args)
        return [example.reference for example in examples], texts
    rows = benchmarks.read_texts(name, "response", "reference")
    return [row["reference"] for row in rows], [row["response"] for row in rows]


def score_texts(references, texts, scorer=None) -> dict[str, np.ndarray]:
    """Returns each metric, one number per text.

    >>> score_texts(["The cat sat."], ["The cat sat."])["rouge_l"]
    array([1.])
    """
    pairs = zip(references, texts)
    rows = [rouge(reference, text, *ROUGE.values()) for reference, text in pairs]
    columns = {name: [row[kind] for row in rows] for name, kind in ROUGE.items()}
    if scorer:
        columns["bert_score"] = bert_scores(references, texts, scorer)
    columns["words"] = [len(text.split()) for text in texts]
    return {name: np.array(column, dtype=float) for name, column in columns.items()}


def corpus_bleu(references, texts) -> tuple[dict, str]:
    """Returns BLEU of all texts together with its bootstrap interval, and sacrebleu's signature."""
    metric = needed("sacrebleu", "BLEU").BLEU()
    found = metric.corpus_score(texts, [references], n_bootstrap=DRAWS)
    value, half = found.score / 100, found._ci / 100
    figure = {"value": value, "low": max(value - half, 0.0), "high": min(value + half, 1.0)}
    return figure, str(metric.get_signature())


def bert_scorer(name, layers=None):
    """Returns bert-score's scorer for an encoder, mended for the tokenizers of transformers 5."""
    library = needed("bert_score", "BERTScore")
    if not layers and name not in library.utils.model2layers:
        cli.fail(f"bert-score knows no best layer of {name}; choose one with --bert_layers")
    try:
        scorer = library.BERTScorer(
            name, num_layers=layers, device=policy.device(), use_fast_tokenizer=True
        )
        # Published scores of RoBERTa are with a space before the first word.
        scorer._tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True)
    except (OSError, ValueError, AssertionError) as error:
        cli.fail(f"--bert_model {name} cannot be loaded: {str(error).splitlines()[0]}")
    if scorer._tokenizer.model_max_length > 10**6:  # RoBERTa's positions begin at 2.
        scorer._tokenizer.model_max_length = policy.context_length(scorer._model) - 2
    return scorer


def bert_scores(references, texts, scorer) -> list[float]:
    """Returns BERTScore's F1 of each text; an empty text, which bert-score rejects, has 0."""
    pairs = [(r, t) for r, t in zip(references, texts) if r.strip() and t.strip()]
    f1 = {}
    if pairs:
        left, right = map(list, zip(*pairs))
        f1 = dict(zip(pairs, scorer.score(right, left)[2].tolist()))
    return [f1.get(pair, 0.0) for pair in zip(references, texts)]


if __name__ == "__main__":
    main()
