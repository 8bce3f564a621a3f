"""What a run writes down: config.json, metrics.jsonl (one object a step) and, when asked, TensorBoard's files.

METRICS is the one glossary: a metric that does not stand in it cannot be logged, and README's table is made from it.
"""

import json
import os
import resource
import sys
from pathlib import Path

from t2g.cli import fail

METRICS = {
    "step": "optimiser steps (supervised) or rollouts (PPO) so far",
    "loss": "mean of -log p over the completions' tokens of the batch; DPO, scalar reward models: of their own loss",
    "pairs": "DPO: pairs of a preferred and another response of the batch",
    "texts": "scalar reward model: texts of the batch; its loss is the squared error in units of the variance of all targets",
    "pair_margin": "DPO: beta times how much more log pi than log ref prefers the chosen response, mean over the batch's pairs",
    "pair_accuracy": "DPO: share of the batch's pairs whose margin is above 0",
    "validation_r2": "scalar reward model: 1 - squared error / squared distance from the mean, over the validation targets",
    "validation_rank": "scalar reward model: Spearman's rank correlation of score and target over the same",
    "tokens": "completion tokens of the batch",
    "padding": "share of the batch's places that hold padding",
    "validation_loss": "the same mean over the pairs that are kept for validation; the best model so far is the one that is saved",
    "update_tokens": "tokens that the update read, prompts included, each pass over them counted",
    "teacher_tokens": "SDPO: tokens that the teacher read, counted in the same way",
    "grad_norm": "norm of the gradient before clipping, mean over the optimiser steps of a rollout",
    "learning_rate": "learning rate of this step",
    "reward": "sum over t of delta_t, mean over responses with a readable critique, before the penalties of KL and missing EOS",
    "kl": "sum over t of the KL estimate against the reference, in nats, mean over the same responses",
    "kl_coef": "coefficient of the KL penalty in r_t = delta_t - kl_coef KL_t",
    "entropy": "-sum over v of p(v) log p(v), in nats, mean over the tokens of the same responses",
    "approx_kl": "k3 estimate of KL(old policy, policy) over the update, in nats, mean over tokens, epochs and minibatches",
    "clipfrac": "share of tokens where PPO's clip binds, mean over epochs and minibatches",
    "policy_loss": "-E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)], mean over epochs and minibatches",
    "value_loss": "half the clipped squared error of V, mean over epochs and minibatches",
    "value_clipfrac": "share of tokens where the value clip binds, mean over epochs and minibatches",
    "value_explained": "1 - Var(returns - V) / Var(returns) over the batch's tokens, before the update; returns are A + V",
    "first_ratio_error": "mean absolute log rho at the first minibatch, before any step: 0 within rounding, checked at run time",
    "skipped_updates": "minibatches of the step whose gradient was not finite: they changed nothing",
    "divergence": "SDPO: D(policy, teacher that has read the critique), in nats, mean over tokens, passes and minibatches",
    "shift_good": "mean change of log pi over the update on the tokens with delta > 0, in nats; left out where there are none",
    "shift_rest": "the same on the tokens with delta = 0",
    "shift_poor": "the same on the tokens with delta < 0",
    "shift_poor_above": "the same on the poor tokens of responses whose reward is above the batch's mean",
    "shift_good_below": "the same on the good tokens of the other responses",
    "shift_rank": "Spearman's rank correlation, over the tokens, of delta with the change of log pi",
    "tokens_good": "share of the tokens of readable responses with delta > 0",
    "tokens_poor": "share of the tokens of readable responses with delta < 0",
    "prompt_tokens": "tokens of a prompt, mean",
    "response_tokens": "tokens of a response, EOS included, mean",
    "critique_tokens": "tokens of a readable critique with its quotes, by the policy's tokenizer, mean",
    "eos_rate": "share of responses that ended by themselves",
    "unparsable": "share of samples whose critique could not be parsed: masked out of the loss",
    "too_long": "SDPO: share of samples whose critique finds no room in the teacher's context: masked out of the loss",
    "quotes_exact": "share of quotes found as they stand",
    "quotes_normalised": "share of quotes found up to white space, quotation marks and case",
    "quotes_fuzzy": "share of quotes found by the closest match",
    "quotes_lost": "share of quotes found nowhere: they reward nothing",
    "quotes_ambiguous": "share of quotes that stand in more places than they were given times: good marks the first, poor the last",
    "seconds_rollout": "seconds of sampling",
    "seconds_critique": "seconds of the critic",
    "seconds_score": "seconds of alignment, reference and old log-probabilities, values, GAE",
    "seconds_update": "seconds of the PPO epochs",
    "seconds_shift": "seconds of the forward pass that measures the change of log pi",
    "seconds": "seconds of the five together",
    "peak_memory_gib": "highest resident memory of the process so far, GiB (Linux); on a GPU its highest allocation",
}


class Logger:
    """log(step, metrics) writes a line of metrics.jsonl; `task_metrics` are the names that the task adds to METRICS.

    A run that goes on after a stop keeps the lines up to the step from which it does.
    """

    def __init__(self, folder, args, task_metrics=(), tensorboard=False, keep_until=0):
        self.folder, self.known = Path(folder), set(METRICS) | set(task_metrics)
        cut(
            self.folder / "metrics.jsonl", keep_until
        )  # first, for by it a folder is known as a run of ours
        write_json(self.folder / "config.json", {"argv": sys.argv, **vars(args)})
        self.file = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")
        self.board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                fail("--tensorboard needs the package tensorboard: pip install tensorboard")
            self.board = SummaryWriter(str(self.folder), purge_step=keep_until + 1)

    def __call__(self, step, metrics):
        if unknown := set(metrics) - self.known:
            raise KeyError(f"metrics without a line in the glossary: {sorted(unknown)}")
        self.file.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")
        self.file.flush()
        for name, value in metrics.items() if self.board else ():
            self.board.add_scalar(name, value, step)


def write_json(path, value):
    write_text(Path(path), json.dumps(value, indent=1, default=str, ensure_ascii=False) + "\n")


def write_text(path, text):
    """A file that appears whole or not at all: it is written under another name and renamed."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    sync(unfinished)
    os.replace(unfinished, path)


def sync(path):
    """Goes on when a file, or a folder with all that is in it, is on the disk, where a machine that dies does not lose it."""
    for place in [*path.rglob("*"), path] if path.is_dir() else [path]:
        handle = os.open(place, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def cut(path, step):
    """Keeps the rows of a .jsonl file up to a step, none for 0. What a kill left behind them goes, be it half a line."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if step and path.is_file() else []
    try:
        kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step]
    except (ValueError, KeyError) as error:
        fail(f"{path} is damaged ({error}); mend that line, or begin anew with --resume none")
    write_text(path, "".join(kept))


def read_jsonl(path) -> list[dict]:
    """The objects of a .jsonl file. Fails with the number of a line that is none."""
    if not Path(path).is_file():
        fail(f"there is no file {path}")
    rows, number = [], 0
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):  # noqa: B007
            if line.strip():
                rows.append(json.loads(line))
                if not isinstance(rows[-1], dict):
                    raise ValueError("not an object")
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror})")
    except UnicodeDecodeError:
        fail(f"{path} is no UTF-8 text")
    except ValueError as error:
        fail(f"line {number} of {path} is no JSON object: {error}")
    return rows


def peak_memory_gib() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
