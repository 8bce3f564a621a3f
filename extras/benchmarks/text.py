"""Responses to held-out prompts against human references: ROUGE, BLEU, BERTScore, perplexity of the references, length.

    python benchmark.py text MODEL ... --task summarize --data posts.jsonl --bert_model roberta-large
    python benchmark.py text --responses A.jsonl B.jsonl      # no model: lines of {"response", "reference"}

    rouge_1, rouge_2, rouge_l   F1 of stemmed words, by rouge-score, mean over examples
    bleu          of the whole corpus, by sacrebleu (13a tokens, exponential smoothing), in [0, 1] and not in percent
    bert_score    F1 of greedily matched embeddings (Zhang et al. 2020), neither idf nor rescaled, mean; only with --bert_model
    perplexity    exp(sum of -log p / number of tokens) of the references under the model, their EOS included; tokens are the
                  model's own, so that models of another tokenizer are not to be compared by it
    words         of a response, mean

Responses are greedy; --temperature samples them. Every figure has a 95% interval, a bootstrap over examples, and from the second
model on so has its difference to the first one, on the same draws. The paper does not say which BLEU it reports, nor which encoder.
"""

import numpy as np
import torch
import transformers

from t2g import cli, policy, tasks
from t2g.data import needed
from t2g.log import read_jsonl
from t2g.metrics import bootstrapped, mean_bootstrap, resamples, rouge
from t2g.respond import respond
from t2g.supervised import as_rollout, encode_pairs, token_loss

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


def add_flags(add):
    tasks.add_flags(add)
    add(
        "--responses",
        nargs="+",
        help='score these files instead of models: lines of {"response", "reference"}',
    )
    add(
        "--response_length",
        type=cli.positive(int),
        help="most tokens of a response; the task's own if not given",
    )
    add("--eval_samples", type=cli.positive(int), default=500, help="held-out prompts")
    add(
        "--temperature",
        type=cli.between(0, 2),
        default=0.0,
        help="sampling temperature; 0 takes the likeliest token",
    )
    add(
        "--bert_model",
        help="BERTScore's encoder, a hub id such as roberta-large or a folder; no BERTScore if not given",
    )
    add(
        "--bert_layers",
        type=cli.positive(int),
        help="how many of its layers to use; bert-score's own choice if it knows the encoder",
    )


def run(args) -> dict:
    """{"scores": {model: {metric: {"value", "low", "high"}}}, "differences": the same less the first model's, "examples", "bleu",
    "bert_score"}, the last two saying how they were computed."""
    if bool(args.responses) == bool(args.models):
        cli.fail("name either models or, with --responses, files of responses")
    how = {
        "bleu": bleu_signature(),
        "bert_score": bert_signature(args.bert_model, args.bert_layers),
    }  # first, for it may fail
    answered = of_files(args.responses) if args.responses else of_models(args)
    draws, name = {}, None
    for name, (references, texts, nats) in answered.items():
        draws[name] = figures(
            references,
            texts,
            resamples(len(texts), args.seed),
            args.bert_model,
            args.bert_layers,
            nats,
        )
    scores = {name: each(found) for name, found in draws.items()}
    first, *others = draws
    differences = {
        other: each({k: draws[other][k] - draws[first][k] for k in draws[first]})
        for other in others
    }
    for title, rows in [("", scores), (f"less {first}", differences)]:
        print_rows(title, rows)
    if not args.bert_model:
        print(
            "BERTScore is left out: --bert_model names the encoder to compute it with, roberta-large for English as a rule"
        )
    return {"scores": scores, "differences": differences, "examples": len(answered[name][1]), **how}


def text_scores(references, texts, bert_model=None, bert_layers=None, seed=0) -> dict[str, dict]:
    """{metric: {"value", "low", "high"}} of texts against references, one each.

    >>> text_scores(["The cat sat."], ["The cat sat."])["rouge_l"]
    {'value': 1.0, 'low': 1.0, 'high': 1.0}
    """
    return each(figures(references, texts, resamples(len(texts), seed), bert_model, bert_layers))


def each(draws) -> dict[str, dict]:
    return {name: bootstrapped(values) for name, values in draws.items()}


def figures(
    references, texts, weights, bert_model=None, bert_layers=None, nats=None
) -> dict[str, np.ndarray]:
    """Each metric on each row of weights, (1 + DRAWS,). nats (n, 2): -log p of each reference and its tokens, for perplexity."""
    rouges = [
        rouge(reference, text, *ROUGE.values())
        for reference, text in zip(references, texts, strict=True)
    ]
    columns = {name: [row[kind] for row in rouges] for name, kind in ROUGE.items()}
    if bert_model:
        columns["bert_score"] = bert_scores(references, texts, bert_model, bert_layers)
    columns["words"] = [len(text.split()) for text in texts]
    found = {
        name: mean_bootstrap(np.array(column, dtype=float), weights)
        for name, column in columns.items()
    }
    found["bleu"] = np.array([bleu(row) for row in weights @ bleu_counts(references, texts)])
    if nats is not None:
        loss, tokens = (weights @ nats).T
        found["perplexity"] = np.exp(
            np.divide(loss, tokens, out=np.full(len(tokens), np.nan), where=tokens > 0)
        )
    return found


# ---- BLEU and BERTScore --------------------------------------------------------------------------------------------------


def bleu_counts(references, texts) -> np.ndarray:
    """What BLEU sums over the texts, (n, 10): length, reference's length, matching n-grams and n-grams for n = 1 ... 4.

    A reference is a text, or a list of texts.
    """
    metric, rows = needed("sacrebleu", "BLEU").BLEU(effective_order=True), []
    for reference, text in zip(references, texts, strict=True):
        one = metric.sentence_score(text, [reference] if isinstance(reference, str) else reference)
        rows.append([one.sys_len, one.ref_len, *one.counts, *one.totals])
    return np.array(rows, dtype=float)


def bleu(sums) -> float:
    """Corpus BLEU in [0, 1] from sums of bleu_counts(), with sacrebleu's own smoothing."""
    length, reference_length, *counts = np.rint(sums).astype(int).tolist()
    metric = needed("sacrebleu", "BLEU").BLEU
    return (
        metric.compute_bleu(
            counts[:4], counts[4:], length, reference_length, smooth_method="exp"
        ).score
        / 100
    )


def bleu_signature() -> str:
    metric = needed("sacrebleu", "BLEU").BLEU()
    metric.corpus_score(["a"], [["a"]])  # it knows the number of references only then
    return str(metric.get_signature())


def bert_scores(references, texts, name, layers=None) -> list[float]:
    """F1 of BERTScore of each text, by the package bert-score; 0 for an empty text.

    Three things that the package cannot do with the transformers of today are done here: an empty text, an encoder whose tokenizer
    names no longest text, and the leading space that RoBERTa and GPT-2 are to see, without which their published scores shift.
    """
    utils, layers = needed("bert_score.utils", "BERTScore"), bert_layers(name, layers)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, add_prefix_space=True)
        model = utils.get_model(name, layers).to(policy.device())
    except (OSError, ValueError) as error:
        cli.fail(
            f"--bert_model {name} is no encoder that could be loaded: {str(error).splitlines()[0]}"
        )
    if tokenizer.model_max_length > 10**6:
        tokenizer.model_max_length = (
            policy.context_length(model) - 2
        )  # RoBERTa's positions begin at 2
    weight = dict.fromkeys(range(len(tokenizer)), 1.0) | {
        tokenizer.sep_token_id: 0.0,
        tokenizer.cls_token_id: 0.0,
    }
    pairs = [
        pair for pair in zip(references, texts, strict=True) if pair[0].strip() and pair[1].strip()
    ]
    scores = (
        utils.bert_cos_score_idf(
            model, *map(list, zip(*pairs)), tokenizer, weight, device=policy.device()
        )
        if pairs
        else []
    )
    f1 = {pair: score[2].item() for pair, score in zip(pairs, scores)}
    return [f1.get(pair, 0.0) for pair in zip(references, texts)]


def bert_layers(name, layers) -> int:
    """How many of the encoder's layers are used: as asked for, or as bert-score found best for an encoder that it knows."""
    known = needed("bert_score.utils", "BERTScore").model2layers
    if not layers and name not in known:
        cli.fail(f"bert-score knows no best layer of {name}; choose one with --bert_layers")
    try:
        most = transformers.AutoConfig.from_pretrained(name).num_hidden_layers
    except (OSError, ValueError) as error:
        cli.fail(
            f"--bert_model {name} is no encoder that could be loaded: {str(error).splitlines()[0]}"
        )
    if layers and layers > most:
        cli.fail(f"--bert_layers {layers} is more than the {most} layers of {name}")
    return layers or known[name]


def bert_signature(name, layers) -> str | None:
    """How BERTScore was computed, in bert-score's own form; None if it was not."""
    if not name:
        return None
    how = dict(
        idf=False, rescale_with_baseline=False, use_custom_baseline=False, use_fast_tokenizer=True
    )
    return needed("bert_score.utils", "BERTScore").get_hash(name, bert_layers(name, layers), **how)


# ---- what is scored ------------------------------------------------------------------------------------------------------


def of_files(paths) -> dict:
    """{file: (references, texts, None)}; all files must hold the same references, for they are compared line by line."""
    answered = {}
    for path in paths:
        rows = read_jsonl(path)
        for number, row in enumerate(rows, 1):
            if not all(isinstance(row.get(name), str) for name in ("response", "reference")):
                cli.fail(f"line {number} of {path} needs the texts response and reference")
        if not rows:
            cli.fail(f"{path} holds no response")
        answered[path] = [row["reference"] for row in rows], [row["response"] for row in rows], None
        if answered[path][0] != answered[paths[0]][0]:
            cli.fail(
                f"{path} has not the references of {paths[0]}, in their order; score it by itself"
            )
    return answered


def of_models(args) -> dict:
    """{model: (references, texts, nats)} of the models' responses to the same held-out prompts."""
    task, answered, examples = tasks.load_task(args.task), {}, None
    length = args.response_length or getattr(task, "DEFAULTS", {}).get("eval", {}).get(
        "response_length", 64
    )
    for name in dict.fromkeys(args.models):
        tokenizer, model = policy.load(name, policy.device())
        if (
            examples is None
        ):  # the first model's tokenizer says which prompts are short enough, for all models
            examples = tasks.short_enough(task.load(args)[1], tokenizer, args.max_prompt_length)[
                : args.eval_samples
            ]
        generator = torch.Generator(model.device).manual_seed(args.seed)
        sampling = dict(temperature=args.temperature, bf16=args.bf16, generator=generator)
        texts, _ = respond(
            model,
            tokenizer,
            [e.prompt for e in examples],
            length,
            desc=f"{name} answers",
            **sampling,
        )
        answered[name] = (
            [e.reference for e in examples],
            texts,
            reference_nats(model, tokenizer, examples, args),
        )
    return answered


@torch.no_grad()
def reference_nats(model, tokenizer, examples, args) -> np.ndarray:
    """-log p of each reference given its prompt and the number of its tokens, EOS included, (n, 2); zeros where it is too long."""
    rows = encode_pairs(tokenizer, [(example.prompt, example.reference) for example in examples])
    nats, context = np.zeros((len(rows), 2)), policy.context_length(model)
    for i, row in enumerate(rows):
        if sum(map(len, row)) <= context:
            nats[i] = (
                token_loss(
                    model, *as_rollout([row], tokenizer.pad_token_id, model.device), args
                ).item(),
                len(row[1]),
            )
    if too_long := int((nats[:, 1] == 0).sum()):
        print(
            f"{too_long} of {len(rows)} references do not fit the context of {context} tokens and do not count in perplexity"
        )
    return nats


def print_rows(title, rows):
    """A line for each metric of each row: its value and its interval."""
    for name, found in rows.items():
        print(f"\n{name} {title}".rstrip())
        for metric, figure in found.items():
            print(f"  {metric:12}{in_words(figure)}")


def in_words(figure) -> str:
    return (
        "        -"
        if figure["value"] is None
        else "{value:9.4f}  [{low:.4f}, {high:.4f}]".format(**figure)
    )
