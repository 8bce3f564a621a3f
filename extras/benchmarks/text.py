"""Scores responses to held-out prompts: ROUGE, BLEU and BERTScore, fluency, the task's own scores.

    python -m extras.benchmarks.text MODEL ... --task summarize --data posts.jsonl \\
        --bert_model roberta-large
    python -m extras.benchmarks.text A.jsonl B.jsonl     # lines of {"response", "reference"}

    rouge_1, rouge_2, rouge_l    F1 of stemmed words, by rouge-score; mean over examples
    bleu          of the whole corpus, by sacrebleu, divided by 100
    bert_score    F1 without idf or rescaling, by bert-score; only with --bert_model
    perplexity    of the responses alone under another model; only with --perplexity_model
    reward_NAME   sum of the token rewards of the reward model in a folder NAME (--reward_model),
                  such as one that the policy was not trained with; 0 if its critique is unreadable
    words         words of a response, mean
    and of MODELs, the scores of the task, such as the share of invented names

"differences" holds the mean difference of each further model to the first, example by example.
BLEU is not per example; compare it with `sacrebleu --paired-bs`.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from extras import benchmarks
from extras.baselines.common import text_reward
from t2g import cli, critics, policy, tasks
from t2g.data import needed
from t2g.metrics import task_scores
from t2g.ppo import sampled_logprobs, vocabulary_logprobs
from t2g.statistics import DRAWS, bootstrapped, resamples, rouge

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


@cli.friendly_errors()
def main():
    parser, add = benchmarks.parser(__doc__, task=True)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a model or a .jsonl file")
    add("--bert_model", None, "BERTScore's encoder, such as roberta-large or a folder")
    layer = "layer of the encoder; bert-score's choice if not given"
    add("--bert_layers", None, layer, cli.positive(int))
    add("--perplexity_model", None, "a causal model, such as the one before training")
    folder = "folder of a reward model that judges the responses of MODELs; may be given repeatedly"
    parser.add_argument("--reward_model", action="append", default=[], help=folder)
    task, args = tasks.parse(parser, "benchmark")
    check_reward_models(args)
    scorer = bert_scorer(args.bert_model, args.bert_layers) if args.bert_model else None
    judge = args.perplexity_model and policy.load(args.perplexity_model, policy.device())
    first, scores, differences, expected = None, {}, {}, None
    for name in args.models:
        references, texts, own_scores = read_or_respond(task, name, args)
        expected = expected or references
        if references != expected:
            remedy = "score it in a command of its own"
            cli.fail(f"{name} has other references than {args.models[0]}; {remedy}")
        columns = own_scores | score_texts(references, texts, scorer)
        scores[name] = {metric: benchmarks.bootstrap(column) for metric, column in columns.items()}
        scores[name]["bleu"], signature = corpus_bleu(references, texts)
        if judge and any(texts):
            scores[name]["perplexity"] = perplexity(texts, *judge, args.bf16)
        if first:
            change = {name: columns[name] - first[name] for name in first if name in columns}
            differences[name] = {metric: benchmarks.bootstrap(x) for metric, x in change.items()}
        first = first or columns
    versions = {"bleu": signature, "bert_score": scorer.hash if scorer else None}
    benchmarks.report(scores, differences=differences, examples=len(expected), **versions)


def read_or_respond(task, name, args) -> tuple[list[str], list[str], dict]:
    """Returns the references, the responses of a model or a file, and of a model its scores."""
    if name.endswith(".jsonl"):
        rows = benchmarks.read_texts(name, "response", "reference")
        return [row["reference"] for row in rows], [row["response"] for row in rows], {}
    examples, texts = benchmarks.respond_to_heldout(name, args)
    rows = task_scores(task, examples, texts)
    columns = {metric: np.array([row[metric] for row in rows], dtype=float) for metric in rows[0]}
    for folder in args.reward_model:
        columns[f"reward_{Path(folder).name}"] = rewards(folder, examples, texts, args.bf16)
    return [example.reference for example in examples], texts, columns


def check_reward_models(args):
    names = [Path(folder).name for folder in args.reward_model]
    if len(set(names)) < len(names):
        cli.fail(f"reward models of one name cannot be told apart: {', '.join(args.reward_model)}")
    if names and any(name.endswith(".jsonl") for name in args.models):
        cli.fail("--reward_model judges the responses of models; a .jsonl file has no prompts")


def rewards(folder, examples, texts, bf16) -> np.ndarray:
    """Returns the sum of delta over the tokens of each text, by a reward model's critiques."""
    tokenizer, model = policy.load(folder, policy.device())
    critic = critics.reward_model_critic(model, tokenizer, bf16=bf16, desc=f"{folder} criticises")
    pairs = zip(texts, critic(examples, texts))
    return np.array([text_reward(tokenizer, *pair) for pair in pairs])


def score_texts(references, texts, scorer=None) -> dict[str, np.ndarray]:
    """Returns each metric, one number per text.

    >>> score_texts(["The cat sat."], ["The cat sat."])["rouge_l"]
    array([1.])
    """
    rows = [rouge(*pair, *ROUGE.values()) for pair in zip(references, texts)]
    columns = {name: [row[kind] for row in rows] for name, kind in ROUGE.items()}
    if scorer:
        columns["bert_score"] = bert_scores(references, texts, scorer)
    columns["words"] = [len(text.split()) for text in texts]
    return {name: np.array(column, dtype=float) for name, column in columns.items()}


def corpus_bleu(references, texts) -> tuple[dict, str]:
    """Returns BLEU of all texts together with its bootstrap interval, and sacrebleu's signature."""
    metric = needed("sacrebleu", "BLEU").BLEU()
    score = metric.corpus_score(texts, [references], n_bootstrap=DRAWS)
    figure = benchmarks.normal_interval(score.score / 100, score._ci / 100)
    return figure, str(metric.get_signature())


@torch.no_grad()
def perplexity(texts, tokenizer, model, bf16) -> dict:
    """Returns exp of the mean negative log-probability of the texts' tokens under a model.

    The texts stand alone, after the model's BOS or EOS. The interval resamples texts.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    sums, counts = [], []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        row = torch.tensor([[start, *ids]], device=model.device)
        with policy.autocast(bf16):
            log_p = vocabulary_logprobs(model(row).logits[0, :-1])
        sums.append(-sampled_logprobs(log_p, row[0, 1:]).sum().item())
        counts.append(len(ids))
    draws = resamples(len(texts), seed=0)
    return bootstrapped(np.exp(draws @ np.array(sums) / (draws @ np.array(counts))))


def bert_scorer(name, layers=None):
    """Returns bert-score's scorer for an encoder, adapted to the tokenizers of transformers 5."""
    library = needed("bert_score", "BERTScore")
    if not layers and name not in library.utils.model2layers:
        cli.fail(f"bert-score knows no best layer of {name}; choose one with --bert_layers")
    options = dict(num_layers=layers, device=policy.device(), use_fast_tokenizer=True)
    try:
        scorer = library.BERTScorer(name, **options)
        # Published scores of RoBERTa are with a space before the first word.
        scorer._tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True)
    except (OSError, ValueError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        cli.fail(f"--bert_model {name} cannot be loaded: {reason}")
    if scorer._tokenizer.model_max_length > 10**6:  # RoBERTa's positions begin at 2.
        scorer._tokenizer.model_max_length = policy.context_length(scorer._model) - 2
    return scorer


def bert_scores(references, texts, scorer) -> list[float]:
    """Returns BERTScore's F1 of each text; an empty text, which bert-score rejects, has 0."""
    pairs = [pair for pair in zip(references, texts) if pair[0].strip() and pair[1].strip()]
    f1 = {}
    if pairs:
        left, right = map(list, zip(*pairs))
        f1 = dict(zip(pairs, scorer.score(right, left)[2].tolist()))
    return [f1.get(pair, 0.0) for pair in zip(references, texts)]


if __name__ == "__main__":
    main()
