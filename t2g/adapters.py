"""LoRA (Hu et al. 2022) by the package peft: small trained matrices beside frozen weights."""

import warnings
from pathlib import Path

from t2g.cli import positive


def peft():
    """The package, imported when needed because that takes a second."""
    # peft asks transformers for a deprecated name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
    import peft

    return peft


def add_flags(add):
    add("--lora_r", None, "rank of LoRA adapters; if not given, all weights learn", positive(int))
    add("--lora_alpha", 32.0, "alpha of LoRA")


def added(model, args):
    """With --lora_r, the frozen model with adapters on every linear layer of its blocks."""
    if not args.lora_r:
        return model
    config = dict(lora_alpha=args.lora_alpha, lora_dropout=0.05, target_modules="all-linear")
    return peft().get_peft_model(model, peft().LoraConfig(r=args.lora_r, **config))


def is_adapter(path) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def base_of(path) -> str:
    """The model that an adapter was trained on."""
    return peft().PeftConfig.from_pretrained(path).base_model_name_or_path


def merge(model, path):
    """The model with an adapter merged into its weights; it is named by the adapter's folder."""
    model = peft().PeftModel.from_pretrained(model, path).merge_and_unload()
    model.name_or_path = path
    return model
