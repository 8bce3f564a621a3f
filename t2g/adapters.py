"""LoRA by the package peft: a few weights of low rank are trained beside frozen ones (Hu et al. 2022), and saved in its format."""

import warnings
from pathlib import Path

from t2g.cli import positive


def peft():
    """The package, which takes a second to load, without a warning of transformers about a name that it asks for."""
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
    import peft

    return peft


def add_flags(add):
    add(
        "--lora_r",
        type=positive(int),
        help="train LoRA adapters of this rank; all weights if not given",
    )
    add("--lora_alpha", type=positive(float), default=32.0, help="LoRA's alpha")


def added(model, args):
    """With --lora_r, LoRA on every linear layer of the blocks; the rest of the model is frozen."""
    if not args.lora_r:
        return model
    config = dict(
        r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=0.05, target_modules="all-linear"
    )
    return peft().get_peft_model(model, peft().LoraConfig(**config))


def there(path) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def base(path) -> str:
    """The model on which the adapter in a folder was trained, as its files name it."""
    return peft().PeftConfig.from_pretrained(path).base_model_name_or_path


def merged(model, path):
    """The model with the adapter of a folder merged into its weights. As the base of another adapter it goes by that folder."""
    model = peft().PeftModel.from_pretrained(model, path).merge_and_unload()
    model.name_or_path = path
    return model
