"""What each thing in t2g/cpu.py gives, one by one: seconds of a forward pass, of forward and backward, and of a step of AdamW.

python -m bench.passes MODEL                      # MODEL: a folder, a hub id or a .gguf file; a minute on 2 cores
MALLOC_ARENA_MAX=8 python -m bench.passes MODEL   # the same while glibc gives freed memory back

4 rows of 60 + 48 tokens. "torch" is the model as transformers loads it, "ours" as policy.load does; all in turns, medians. Faults
are pages that the system had to find meanwhile.
"""

import argparse
import json
import resource
from functools import partial
from statistics import median

import torch
from torch import nn

from t2g import policy
from t2g.cpu import Linear
from t2g.policy import autocast, now

ROWS, PROMPT, NEW, TURNS = 4, 60, 48, 5


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id or a .gguf file")
    model = policy.load(parser.parse_args().model)[1]
    linears = [module for module in model.modules() if type(module) is Linear]
    ids = torch.randint(model.config.vocab_size, (ROWS, PROMPT + NEW))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def forward(bf16):
        with autocast(bf16):
            return model(
                input_ids=ids, attention_mask=mask, logits_to_keep=NEW + 1, use_cache=False
            ).logits

    def both(bf16):
        forward(bf16).float().log_softmax(-1)[..., 5].sum().backward()
        model.zero_grad(set_to_none=True)

    found = {}
    for turn in range(TURNS + 1):
        for dtype in ("fp32", "bf16"):
            for whose in ("torch", "ours"):
                for module in linears:
                    module.__class__ = nn.Linear if whose == "torch" else Linear
                model.set_attn_implementation("sdpa" if whose == "torch" else "sdpa_fp32")
                with torch.no_grad():
                    note(
                        found, f"forward, {dtype}, {whose}", partial(forward, dtype == "bf16"), turn
                    )
                note(
                    found,
                    f"forward and backward, {dtype}, {whose}",
                    partial(both, dtype == "bf16"),
                    turn,
                )
    forward(False).sum().backward()
    for fused in (False, True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=fused)
        for turn in range(TURNS + 1):
            note(found, f"AdamW{', fused' if fused else ''}", optimizer.step, turn)
        del optimizer
    result = {
        name: {"seconds": median(s for s, _ in seen), "faults": median(f for _, f in seen)}
        for name, seen in found.items()
    }
    for name, row in result.items():
        print(f"{name:36}{row['seconds']:8.3f} s{row['faults']:10.0f} faults")
    print(json.dumps(result))


def note(found, name, work, turn):
    """Seconds and page faults of some work; the first turn only makes it warm."""
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, now()
    work()
    if turn:
        found.setdefault(name, []).append(
            (now() - start, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
        )


if __name__ == "__main__":
    main()
