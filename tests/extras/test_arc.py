"""Multiple choice by likelihood: against a model whose probabilities are known, and against the plain sum written out."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import extras.benchmarks.__main__ as benchmark
from extras import benchmarks
from extras.benchmarks import arc
from t2g import policy

QUESTIONS = [
    ("Question: What barks?", ["the dog", "a quick brown fox", "naïve café", "wait"], 0),
    ("Question: 27 or 41?", ["27", "41", "27 and 41"], 2),
    (
        "Question: Which is the thing that the other thinks is there, then and there?",
        ["hide!", "привет мир"],
        1,
    ),
]


@pytest.fixture(scope="module")
def model(tokenizers):
    """A small random model for the byte-level tokenizer."""
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizers["byte_level"]), **sizes)).eval()


@pytest.fixture
def tokenizer(tokenizers):
    tokenizer = tokenizers["byte_level"]
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class Likes(torch.nn.Module):
    """A language model that gives each token a score of its own, whatever stands before it."""

    def __init__(self, scores):
        super().__init__()
        self.scores, self.device = scores, "cpu"
        self.config = SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(max_position_embeddings=512)
        )

    def forward(self, input_ids, logits_to_keep, **_):
        logits = self.scores.expand(*input_ids.shape, -1)
        return SimpleNamespace(logits=logits[:, -logits_to_keep:], hidden_states=[logits])


def test_the_likeliest_option_is_the_one_whose_tokens_the_model_likes(tokenizer):
    scores = torch.zeros(len(tokenizer))
    (liked,) = tokenizer(" dog")["input_ids"][:1]
    scores[liked] = 5.0
    options = ["fox", "dog"]
    asked, added = arc.encode(tokenizer, "Question: What barks?", "dog")
    assert (
        tokenizer.decode(asked + added) == "Question: What barks?\nAnswer: dog"
        and added[0] == liked
    )
    (found,) = arc.loglikelihoods(
        Likes(scores), tokenizer, [("Question: What barks?", options, 1)], 2
    )
    logp = scores.log_softmax(0)
    assert (
        found[1] == pytest.approx(sum(logp[i].item() for i in added), abs=1e-4)
        and found[1] > found[0]
    )


def test_length_decides_between_the_two_accuracies():
    question = ("Question: ?", ["four", "fourteen characters"], 1)
    figures = arc.figures([question], [[-4.0, -10.0]])
    assert figures["accuracy"]["value"] == 0 and figures["acc_norm"]["value"] == 1


def test_likelihoods_are_the_sums_over_the_option_s_tokens_alone(model, tokenizer):
    found = arc.loglikelihoods(model, tokenizer, QUESTIONS, 4)
    for (text, options, _), sums in zip(QUESTIONS, found):
        for option, total in zip(options, sums):
            ids = tokenizer(f"{text}\nAnswer: {option}", return_tensors="pt")["input_ids"]
            start = len(tokenizer(f"{text}\nAnswer:")["input_ids"])
            with torch.no_grad():
                logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
            assert total == pytest.approx(logp[start - 1 :].sum().item(), abs=1e-3)


def test_the_size_of_batches_changes_nothing(model, tokenizer):
    one = arc.loglikelihoods(model, tokenizer, QUESTIONS, 1)
    for size in (2, 5, 16):
        for a, b in zip(one, arc.loglikelihoods(model, tokenizer, QUESTIONS, size)):
            assert a == pytest.approx(b, abs=1e-4)


def test_a_random_model_is_right_as_often_as_chance(model, tokenizer):
    torch.manual_seed(1)
    words = ["dog", "fox", "lazy", "brown", "quick", "wait", "run", "hide", "thing", "other"]
    questions = []
    for _ in range(300):
        options = [words[i] for i in torch.randperm(len(words))[:4]]
        questions.append(
            (f"Question: {words[int(torch.randint(10, ()))]}?", options, int(torch.randint(4, ())))
        )
    figures = arc.figures(questions, arc.loglikelihoods(model, tokenizer, questions, 64))
    assert figures["accuracy"]["low"] < 0.25 < figures["accuracy"]["high"]


def test_both_forms_of_rows_give_the_same_question(tmp_path):
    plain = {"query": "Question: 2 + 2?", "choices": ["3", "4"], "gold": 1}
    for labels, key in ((["A", "B"], "B"), (["1", "2"], "2")):
        hub = {
            "id": "x",
            "question": "2 + 2?",
            "choices": {"text": ["3", "4"], "label": labels},
            "answerKey": key,
        }
        (tmp_path / "a.jsonl").write_text(json.dumps(plain) + "\n" + json.dumps(hub) + "\n")
        assert arc.read(str(tmp_path / "a.jsonl")) == 2 * [("Question: 2 + 2?", ["3", "4"], 1)]


@pytest.mark.parametrize(
    "row",
    [
        {"query": "?", "choices": ["a"], "gold": 1},
        {"question": "?"},
        {"query": "?", "choices": 3, "gold": 0},
    ],
)
def test_rows_of_neither_form_are_refused(tmp_path, capsys, row):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit):
        arc.read(str(tmp_path / "a.jsonl"))
    assert "question 1 of" in capsys.readouterr().err


def test_the_benchmark_prints_a_table_and_its_json_last(
    tmp_path, monkeypatch, capsys, model, tokenizer
):
    rows = [{"query": text, "choices": options, "gold": gold} for text, options, gold in QUESTIONS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(policy, "load", lambda *_: (tokenizer, model))
    for flags in ([], ["--letters"]):
        command = [
            "benchmark.py",
            "arc",
            "A",
            "--data",
            str(tmp_path / "a.jsonl"),
            *flags,
            "B",
            "--out",
            str(tmp_path / "out.json"),
        ]
        monkeypatch.setattr(sys, "argv", command)
        benchmark.main()
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (
            set(said) == {"A", "B"}
            and said["A"]["problems"] == 3
            and said == json.loads((tmp_path / "out.json").read_text())
        )


def test_every_benchmark_has_a_line_in_the_list_and_its_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py"])
    benchmark.main()
    listed = capsys.readouterr().out
    for name in benchmarks.names():
        assert benchmarks.get(name).__doc__.strip().splitlines()[0] in listed
        monkeypatch.setattr(sys, "argv", ["benchmark.py", name, "--help"])
        with pytest.raises(SystemExit) as stopped:
            benchmark.main()
        assert stopped.value.code == 0 and "--out" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "chess"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "there is no benchmark 'chess'" in capsys.readouterr().err
