"""Files that appear whole or not at all, and METRICS, the glossary of metrics.jsonl.

Metrics of delta, KL, entropy, V and the losses are over responses with a readable critique, the
others over all.
"""

import functools
import gzip
import json
import os
import resource
import sys
import zlib
from pathlib import Path

import torch
from tqdm import tqdm

from t2g.cli import fail, warn_unsupported

METRICS = {
    # PPO
    "step": "optimiser steps (supervised) or rollouts (PPO) so far",
    "reward": "sum over t of delta_t, before penalties for KL and missing EOS, mean over responses",
    "kl": "sum over t of the KL against the reference in nats, mean over readable responses",
    "kl_coef": "coefficient of the KL penalty in r_t = placed delta_t - kl_coef KL_t",
    "entropy": "-sum over v of p(v) log p(v) in nats, mean over tokens",
    "shift_good": "change of log pi over the update in nats, mean over tokens with delta > 0",
    "shift_rest": "change of log pi over the update in nats, mean over tokens with delta = 0",
    "shift_poor": "change of log pi over the update in nats, mean over tokens with delta < 0",
    "shift_poor_above": "shift_poor, in nats, over responses whose reward is above the mean",
    "shift_good_below": "shift_good, in nats, over responses whose reward is not above the mean",
    "shift_rank": "Spearman's rank correlation of delta with the change of log pi, over tokens",
    "approx_kl": "k3 estimate of KL(old policy, policy) in nats, mean over tokens of the update",
    "clipfrac": "share of tokens where PPO's clip binds, mean over the update",
    "policy_loss": "-E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)], mean over the update",
    "value_loss": "half the clipped squared error of V, mean over the update",
    "value_clipfrac": "share of tokens where the value clip binds, mean over the update",
    "value_explained": "1 - Var(returns - V) / Var(returns) before the update; returns are A + V",
    "first_ratio_error": "mean |log rho| of the first minibatch before any step: 0 within rounding",
    "skipped_updates": "minibatches without a readable critique or a finite gradient: no update",
    "tokens_good": "share of tokens with delta > 0",
    "tokens_poor": "share of tokens with delta < 0",
    "prompt_tokens": "tokens of a prompt, mean",
    "response_tokens": "tokens of a response with its EOS, mean",
    "critique_tokens": "tokens of a readable critique with its quotes, mean",
    "eos_rate": "share of responses that ended with EOS",
    "unparsable": "share of responses without a readable critique; they are masked out of the loss",
    "quotes_exact": "share of quotes found verbatim",
    "quotes_normalised": "share of quotes found up to white space, case, marks and Unicode forms",
    "quotes_fuzzy": "share of quotes found by the closest match",
    "quotes_lost": "share of quotes found nowhere; they reward nothing",
    "quotes_ambiguous": "share of quotes that occur more often than they were given",
    "seconds_rollout": "seconds of sampling",
    "seconds_critique": "seconds of the critic",
    "seconds_score": "seconds of alignment, old and reference log-probabilities, values and GAE",
    "seconds_update": "seconds of the optimiser steps",
    "seconds_shift": "seconds of the forward pass that measures the change of log pi",
    "seconds": "seconds of the step, the sum of these five",
    "peak_memory_gib": "highest memory of the process so far in GiB; on a GPU, highest allocation",
    "update_tokens": "tokens that the update read, prompts and repeated passes included",
    "grad_norm": "norm of the gradient before clipping, mean over optimiser steps",
    "learning_rate": "learning rate of the step",
    # supervised training
    "loss": "the mean of -log p over completion tokens, or the mean of the baseline's own loss",
    "validation_loss": "the same over held-out pairs; the model with the lowest one is saved",
    "tokens": "completion tokens of the batch",
}


def write_json(path, value):
    write_text(Path(path), json.dumps(value, indent=1, default=str, ensure_ascii=False) + "\n")


def write_text(path, text):
    """Writes a file, or the one that a symbolic link names, completely or not at all."""
    if path.exists() and not path.is_file():  # a device or a pipe, such as /dev/stdout
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    put_in_place(unfinished, path)


def put_in_place(unfinished, path):
    """Renames a file or a folder when it is on the disk, so that path is never half of it."""
    for place in [*unfinished.rglob("*"), unfinished]:
        sync(place)
    unfinished.rename(path)
    sync(path.parent)


def sync(path):
    """Flushes a file, or a folder's list of its files, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        warn_unsupported("fsync: a power failure may damage what was just written", error)
    os.close(handle)


def truncate(path, step):
    """Drops the rows after a step (all for step 0) and a truncated last line of a .jsonl file."""
    lines = path.read_bytes().split(b"\n")[:-1] if step and path.is_file() else []
    try:
        kept = [line.decode() + "\n" for line in lines if json.loads(line)["step"] <= step]
    except (ValueError, KeyError) as error:
        fail(f"{path} is damaged ({error}); repair it or move its folder away")
    write_text(path, "".join(kept))


def read_json(path, remedy="repair it or move its folder away") -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{path} is damaged ({error}); {remedy}")


def read_text(path) -> str:
    """Returns the text of a UTF-8 file, perhaps with a BOM or gzipped (.gz)."""
    path = Path(path)
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read: {error}")


def read_jsonl(path) -> list[dict]:
    """Returns the objects of a .jsonl or .jsonl.gz file. Fails at a line that is not one."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(parse_json(line, path))
        except ValueError as error:
            fail(f"line {number} of {path} is not a JSON object: {error}")
        if not isinstance(rows[-1], dict):
            fail(f"line {number} of {path} is not a JSON object")
    return rows


def parse_json(text: str, source):
    """Parses JSON from a source, with valid_text()."""
    value = json.loads(text)
    if "\\ud" in text.lower():
        value = json.loads(valid_text(json.dumps(value, ensure_ascii=False), source))
    return value


def valid_text(text: str, source) -> str:
    """Replaces half a surrogate pair, such as half an emoji, which no tokenizer or file accepts."""
    valid = text.encode(errors="replace").decode()
    if valid != text:
        print_once(f"{source} contains half a surrogate pair, which becomes a ?")
    return valid


@functools.cache
def print_once(sentence):
    tqdm.write(sentence)


def peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
