"""Loading: whatever does not load exactly is refused in one sentence; adapters bring their own."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from t2g.chat import chat_text
from t2g.policy import load, save
from t2g.rollout import sample


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    """A folder with the model and its tokenizer."""
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(capsys, call, *args, **options):
    """The sentence with which a call ends the program."""
    with pytest.raises(SystemExit):
        call(*args, **options)
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda weights: {f"_orig_mod.{key}": w for key, w in weights.items()}, "_orig_mod."),
        (lambda weights: {k: w for k, w in weights.items() if ".1." not in k}, "model.layers.1."),
        (lambda weights: weights | {"lm_head.weight": weights["lm_head.weight"][:-3]}, "lm_head"),
        (lambda weights: weights | {"v_head.weight": torch.zeros(1, 16)}, "v_head.weight"),
    ],
    ids=["other names", "a block missing", "another shape", "left over"],
)
def test_weights_that_are_not_the_model_s_are_refused_by_name(folder, change, named, capsys):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    assert named in refused(capsys, load, folder)


def test_a_folder_without_a_model_and_a_tokenizer_without_a_template_are_refused(
    folder, tmp_path, capsys
):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, load, tmp_path / "empty")
    (folder / "chat_template.jinja").unlink()
    assert "chat template" in refused(capsys, load, folder)


def test_a_classifier_is_refused_as_a_policy(model, folder, capsys):
    LlamaForSequenceClassification(model.config).save_pretrained(folder)
    assert "score.weight" in refused(capsys, load, folder)


def test_tied_heads_load(model, folder):
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded = load(folder)[1]
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_weights_that_are_no_numbers_end_sampling(model, tokenizer, capsys):
    broken = copy.deepcopy(model)
    broken.model.layers[1].mlp.down_proj.weight.data[3, 3] = math.nan
    assert "NaN" in refused(capsys, sample, broken, tokenizer, ["Hi."], 4)


def save_adapter(folder, tokenizer, **config):
    """A LoRA whose folder holds a tokenizer, on embeddings of that tokenizer's size."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(len(tokenizer))
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **config))
    wrapped.peft_config["default"].base_model_name_or_path = folder.name  # a relative path
    for part in (wrapped, tokenizer):
        part.save_pretrained(folder.parent / "adapter")
    return folder.parent / "adapter", wrapped


def test_an_adapter_brings_its_template_and_new_tokens(folder, tokenizer):
    """The base is found although its relative path does not count from the working folder."""
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["<new>", "<newer>"])
    own.chat_template = "USER: {{ messages[0].content }} ASSISTANT:"
    path, trained = save_adapter(folder, own, modules_to_save=["embed_tokens", "lm_head"])
    loaded_tokenizer, loaded = load(path)
    assert chat_text(loaded_tokenizer, "Hi") == "USER: Hi ASSISTANT:"
    ids = torch.tensor([[len(own) - 1, 5, len(own) - 2]])
    assert torch.allclose(loaded(ids).logits, trained.eval()(ids).logits, atol=1e-5)
    assert all(weight.requires_grad for weight in loaded.parameters()), "it can be trained on"


def test_an_adapter_of_another_model_is_refused(folder, tokenizer, capsys):
    path = save_adapter(folder, tokenizer)[0]
    weights = load_file(path / "adapter_model.safetensors")
    dropped = sorted(weights)[0]
    save_file(
        {key: w for key, w in weights.items() if key != dropped}, path / "adapter_model.safetensors"
    )
    assert dropped in refused(capsys, load, path)


def test_weights_that_are_no_numbers_are_not_saved(model, tokenizer, tmp_path, capsys):
    spoilt = copy.deepcopy(model)
    spoilt.get_input_embeddings().weight.data[3, 1] = float("nan")
    assert "not numbers" in refused(capsys, save, spoilt, tokenizer, tmp_path, 1)
    assert not list(tmp_path.iterdir())
