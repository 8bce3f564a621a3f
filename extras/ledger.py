"""What a training run cost: seconds, tokens and FLOPs of its rollouts, critiques and updates.

A model of N parameters counts as 2 N FLOPs per token read or written and 6 N per token trained on,
4 N with LoRA. Left out are attention's own products, validation and measuring. A rule or a server
costs no FLOPs here.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from t2g import adapters
from t2g.log import read_json
from t2g.policy import latest_checkpoint, pretrained

UNITS = {"seconds": ("s", 1), "tokens": ("M tokens", 1e6), "flops": ("TFLOP", 1e12)}
LEDGER = [(part, unit) for part in ("rollout", "critique", "update") for unit in UNITS]


def ledger(run, steps) -> dict[tuple[str, str], float]:
    """Returns the seconds, tokens and FLOPs of the parts of a training run."""
    config = read_json(run / "config.json")
    size, critic_size = parameters(run), parameters(critic_of(run, config))
    file = run / "sampling.json"  # of methods that sample before they train
    rollouts = read_json(file) if file.is_file() else []
    rollouts += [{"samples": config.get("batch_size"), **row} for row in steps]
    costs = dict.fromkeys(LEDGER, 0.0)

    def add(part, seconds, tokens, flops):
        for unit, value in zip(UNITS, (seconds, tokens, flops)):
            costs[part, unit] += value

    for row in rollouts:
        if "seconds_reference" in row:  # DPO: one pass of the reference over all pairs
            tokens = row["reference_tokens"]
            add("update", row["seconds_reference"], tokens, 2 * size * tokens)
        if "seconds_rollout" in row:
            samples = row["samples"]
            read = samples * (row["prompt_tokens"] + row["response_tokens"])
            add("rollout", row["seconds_rollout"], read, 2 * size * read)
            judged = samples * row["judged_tokens"] if "judged_tokens" in row else read
            judged = (judged + samples * row["critique_tokens"]) if critic_size else 0
            add("critique", row["seconds_critique"], judged, 2 * critic_size * judged)
            if "seconds_score" in row and "teacher_tokens" not in row:  # PPO: policy and reference
                add("update", row["seconds_score"], 2 * read, 4 * size * read)
        if "update_tokens" in row:
            trained, teacher = row["update_tokens"], row.get("teacher_tokens", 0)
            flops = ((4 if config.get("lora_r") else 6) * trained + 2 * teacher) * size
            add("update", row["seconds_update"], trained + teacher, flops)
    return costs


def critic_of(run, config):
    """Returns the reward model of a run, None if its critic is not one of ours."""
    names = ("critic", "dense_critic", "noisy_critic")  # the latter two wrap another critic
    used = [Path(config.get(name) or "").name for name in names]
    for critic, folder in (("rm", "rm"), ("scalar_rm.py", "rm_scalar")):
        if critic in used:
            return config["reward_model"] or run.parent / folder
    return None


def parameters(run) -> int:
    """Returns the number of weights of a run's model without adapters, 0 if run is None."""
    if not run:
        return 0
    path = str(latest_checkpoint(run) or run)
    source, gguf = pretrained(adapters.base_of(path) if adapters.is_adapter(path) else path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, **gguf))
    return sum(weights.numel() for weights in model.parameters())
