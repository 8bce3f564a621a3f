"""LoRA (Hu et al. 2022) by the package peft: small trained matrices beside frozen weights."""

import re
import warnings
from pathlib import Path

from torch import nn
from transformers.pytorch_utils import Conv1D

from t2g import cpu
from t2g.cli import fail, positive
from t2g.loading import allocate
from t2g.log import read_json

# peft, which takes a second to import, asks transformers for a deprecated name.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")


def add_flags(add):
    add("--lora_r", None, "rank of LoRA adapters; if not given, all weights learn", positive(int))
    add("--lora_alpha", 32.0, "alpha of LoRA")


def added(model, args):
    """With --lora_r, the frozen model with adapters on the matrices of its blocks.

    Prints which matrices get none. There is no dropout, because PPO's first ratio must be 1.
    """
    if not args.lora_r:
        return model
    import peft

    allocate(model, "cpu")  # peft puts the adapters on the device of the weights
    experts, excluded, others = unusual_matrices(model)
    targets = dict(target_modules="all-linear", target_parameters=experts or None)
    config = dict(lora_alpha=args.lora_alpha, exclude_modules=excluded or None, **targets)
    if others := sorted({re.sub(r"\.\d+\.", ".*.", name) for name in others + excluded}):
        print(f"LoRA does not adapt {', '.join(others)}", flush=True)
    try:
        return peft.get_peft_model(model, peft.LoraConfig(r=args.lora_r, **config))
    except ValueError as error:
        fail(f"LoRA cannot adapt this model ({error}); leave out --lora_r")


def unusual_matrices(model):
    """Experts' parameters, layers that an adapter would break or miss, and other matrices."""
    experts, excluded, others = [], [], []
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, module in model.named_modules():
        if hasattr(module, "A_log") and hasattr(module, "D"):  # Mamba's kernels take these weights
            layers = ("out_proj", "dt_proj")
            excluded += [f"{name}.{layer}" for layer in layers if hasattr(module, layer)]
        if isinstance(module, nn.Linear) and type(module) not in (nn.Linear, cpu.Linear):
            excluded.append(name)  # a router, for example, which returns more than a product
        if module in ends or isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            continue
        for parameter, weight in module.named_parameters(name, recurse=False):
            if weight.ndim == 3 and min(weight.shape) > 1 and not isinstance(module, nn.Conv1d):
                experts.append(parameter)
            elif weight.ndim > 1:
                others.append(parameter)
    return experts, excluded, others


def is_adapter(path) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def base_of(path) -> str:
    """The model of an adapter; a relative path may count from its own folder or any parent."""
    own = Path(path).resolve()
    base = str(read_json(own / "adapter_config.json").get("base_model_name_or_path") or own)
    if Path(base).resolve() == own:
        fail(f"{path} is an adapter without a base: set base_model_name_or_path in its config")
    folders = [folder / base for folder in (Path(), own, *own.parents)]
    models = (f for f in folders if f.resolve() != own and list(f.glob("*config.json")))
    return str(next(models, base))


def merge(model, path):
    """The model with an adapter merged into its weights, and resized to embeddings of its own."""
    import peft

    if not list(Path(path).glob("adapter_model.*")):
        fail(f"the adapter {path} has no file adapter_model.safetensors")
    weights = peft.load_peft_weights(path, device="cpu")
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    sizes = [len(w) for key, w in weights.items() if f".{name}." in key and key.endswith("weight")]
    if sizes:
        model.resize_token_embeddings(sizes[0], mean_resizing=False)
    model = peft.PeftModel.from_pretrained(model, path)
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    if left := sorted(key for key in own.keys() ^ weights.keys() if ".lora_" in key):
        fail(f"the adapter {path} does not fit its base: {', '.join(left[:3])}")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight and any(".lora_embedding_" in key for key in weights):
        head.weight = nn.Parameter(head.weight.clone())  # the adapter leaves the head as it is
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    return model.merge_and_unload().requires_grad_(True)  # peft froze the base's weights
