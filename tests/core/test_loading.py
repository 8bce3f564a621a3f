"""Loading: whatever does not load exactly is refused in one sentence; adapters bring their own."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from t2g import cli
from t2g.chat import chat_text, template_kwargs
from t2g.policy import load, save
from t2g.rollout import sample


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    """A folder with the model and its tokenizer; loading it prints nothing of transformers' own."""
    cli.parser("")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


WRONG_WEIGHTS = {  # the name in the sentence, and what is done to the weights
    "_orig_mod.": lambda weights: {f"_orig_mod.{key}": w for key, w in weights.items()},
    "model.layers.1.": lambda weights: {k: w for k, w in weights.items() if ".1." not in k},
    "lm_head": lambda weights: weights | {"lm_head.weight": weights["lm_head.weight"][:-3]},
    "v_head.weight": lambda weights: weights | {"v_head.weight": torch.zeros(1, 16)},
}


@pytest.mark.parametrize("named", WRONG_WEIGHTS)
def test_weights_that_are_not_the_model_s_are_refused_by_name(folder, named, refused):
    file = folder / "model.safetensors"
    save_file(WRONG_WEIGHTS[named](load_file(file)), file, metadata={"format": "pt"})
    assert named in refused(load, folder)


def test_a_missing_model_or_template_is_refused(folder, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(load, tmp_path / "empty")
    (folder / "chat_template.jinja").unlink()
    assert "chat template" in refused(load, folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("config.json", {"pad_token_id": 5000}, "Padding_idx"),
        ("config.json", {"hidden_size": "big"}, "hidden_size"),
        ("config.json", {"num_attention_heads": 0}, "ZeroDivisionError"),
        ("model.safetensors", POINTER, "git-lfs"),
        ("model.safetensors", "", "damaged"),
        ("tokenizer.json", POINTER, "git-lfs"),
        ("tokenizer.json", None, "slow tokenizer"),
        ("tokenizer.json", "{}", "KeyError"),
        ("chat_template.jinja", "{{ ''.index('x') }}", "chat template"),
    ],
)
def test_a_damaged_or_missing_file_is_refused(folder, refused, name, content, problem):
    change(folder / name, content)
    assert problem in refused(load, folder)


def change(file, content):
    """Writes a text, changes fields of a JSON file, or deletes the file."""
    if content is None:
        return file.unlink()
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content)
    file.write_text(content)


def test_tokens_beyond_the_embeddings_are_refused_if_texts_can_have_them(folder, refused):
    own = load(folder)[0]
    own.add_tokens(["<image>"], special_tokens=True)  # Gemma 3 has one
    own.save_pretrained(folder)
    load(folder)
    own.add_tokens(["bakery"])
    own.save_pretrained(folder)
    assert "more tokens" in refused(load, folder)


def test_an_argument_that_a_template_does_not_have_is_reported(folder, monkeypatch, capsys):
    monkeypatch.setitem(template_kwargs, "add_generation", True)  # it has add_generation_prompt
    load(folder)
    assert "has no add_generation" in capsys.readouterr().out


def test_nan_weights_end_sampling_and_are_not_saved(model, tokenizer, tmp_path, refused):
    broken = copy.deepcopy(model)
    broken.model.layers[1].mlp.down_proj.weight.data[3, 3] = math.nan
    assert "NaN" in refused(sample, broken, tokenizer, ["Hi."], 4)
    assert "not numbers" in refused(save, broken, tokenizer, tmp_path, 1)
    assert not list(tmp_path.iterdir())


def save_adapter(folder, tokenizer, **config):
    """A LoRA whose folder holds a tokenizer, on embeddings of that tokenizer's size."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(len(tokenizer))
    wrapped = get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | config))
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


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["embed_tokens"]}, {"trainable_token_indices": {"embed_tokens": [5]}}],
)
def test_an_adapter_of_a_tied_embedding_is_merged_exactly(folder, tokenizer, config):
    change(folder / "config.json", {"tie_word_embeddings": True})
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path, wrapped = save_adapter(folder, tokenizer, **config)
    for weight in wrapped.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight)
    wrapped.save_pretrained(path)
    ids = torch.tensor([[5, 6, 7]])
    logits, again = load(path)[1](ids).logits, wrapped.eval()(ids).logits
    assert torch.allclose(logits, again, atol=1e-4)


@pytest.mark.parametrize("base", [None, "SELF", "./adapter", "/no/model"])
def test_an_adapter_without_its_base_is_refused(folder, tokenizer, refused, base):
    path = save_adapter(folder, tokenizer)[0]
    named = str(path) if base == "SELF" else base
    change(path / "adapter_config.json", {"base_model_name_or_path": named})
    problem = "without a base" if base in (None, "SELF") else base
    assert problem in refused(load, path)


def test_an_adapter_finds_its_base_and_needs_weights(folder, tokenizer, refused, monkeypatch):
    path = save_adapter(folder, tokenizer)[0]
    change(path / "adapter_config.json", {"base_model_name_or_path": f"../{folder.name}"})
    monkeypatch.chdir(folder.parent)
    assert load(path.name)[1].name_or_path == str(path), "an adapter of it is found from anywhere"
    (path / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refused(load, path)


def test_an_adapter_of_another_model_is_refused(folder, tokenizer, refused):
    path = save_adapter(folder, tokenizer)[0]
    weights = load_file(path / "adapter_model.safetensors")
    dropped = min(weights)
    del weights[dropped]
    save_file(weights, path / "adapter_model.safetensors")
    assert dropped in refused(load, path)
