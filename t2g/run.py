"""The record of a run of train_ppo.py: its progress, prompts, metrics and checkpoints.

A run resumes where a killed one stopped, because every draw of a step depends on the seed, the step
and the rank alone.
"""

import signal
from collections import defaultdict
from itertools import pairwise

import torch
from tqdm import tqdm

from t2g import checkpoint, dist
from t2g.cli import fail
from t2g.folder import open_log
from t2g.page import Samples
from t2g.policy import now
from t2g.rollout import step_rng

PHASES = ("rollout", "critique", "score", "update", "shift")
STATUS = (
    "reward {reward:+.2f} kl {kl:.2f} | log pi: good {shift_good:+.3f} rest {shift_rest:+.3f} "
    "poor {shift_poor:+.3f}"
)
VALUE_STEP = 0.2  # of V in one step of Adam, if the states' absolute values are near 1
BAD_STEPS = 5  # steps in a row without a finite gradient, after which a run ends


def add_step_flags(add, num_ppo_epochs):
    add("--max_steps", 100, "number of rollouts; each is followed by one update")
    add("--num_ppo_epochs", num_ppo_epochs, "passes over a rollout")
    add("--num_mini_batches", 2, "optimiser steps in each pass")
    add("--gradient_accumulation_steps", 1, "microbatches in each optimiser step")
    add("--per_device_train_batch_size", 8, "responses in each microbatch")
    add("--learning_rate", 1e-6, "AdamW's learning rate, decayed linearly to 0")
    add("--max_grad_norm", 1.0, "gradients are clipped to this norm")
    add("--response_length", 64, "maximum tokens of a response")
    add("--temperature", 1.0, "temperature of sampling and of all log-probabilities")


def sampling(args) -> dict:
    names = ("response_length", "temperature", "bf16")
    return {name: getattr(args, name) for name in names}


class Run:
    """Resumes the run in a folder, and keeps its metrics, samples and checkpoints."""

    def __init__(self, args, task, tokenizer, actor, pool, heldout, folder):
        self.args, self.tokenizer, self.actor = args, tokenizer, actor
        self.pool, self.heldout, self.bad_steps = pool, heldout, 0
        parts = checkpoint.trainable(actor.model), checkpoint.trainable(actor.value_head)
        groups = [{"params": part.values()} for part in parts]  # steps() sets their rates
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        value_rate = args.value_learning_rate or VALUE_STEP / actor.value_head.in_features
        self.rates = args.learning_rate, value_rate
        self.meta = checkpoint.resume(actor, self.optimizer, args, pool)
        self.first, self.kl_coef = self.meta["step"] + 1, self.meta["kl_coef"]
        kept = self.meta["step"]
        self.write = open_log(folder, args, task.METRICS, args.tensorboard, kept)
        self.samples = Samples(folder, args.max_steps, kept)

    def steps(self):
        """Yields each step that is left, with its learning rate set, and draws the progress bar."""
        steps = range(self.first, self.args.max_steps + 1)
        self.bar = tqdm(steps, desc="PPO", unit="step", disable=dist.rank() > 0)
        self.signals = []  # schedulers send SIGTERM a while before they kill
        before = signal.signal(signal.SIGTERM, lambda *received: self.signals.append(received))
        try:
            for step in self.bar:
                done = (step - 1) / self.args.max_steps
                for group, rate in zip(self.optimizer.param_groups, self.rates):
                    group["lr"] = rate * (1 - done)
                self.clock = [now()]
                yield step
        finally:
            signal.signal(signal.SIGTERM, before)

    def draw(self, step) -> list:
        """This rank's examples of a step, short prompts first. Seeds torch for the step."""
        rng = step_rng(self.args.seed, step, dist.rank())
        examples = dist.own(rng.choices(self.pool, k=self.args.batch_size))
        return sorted(examples, key=lambda example: len(example.prompt))

    def end_phase(self, phase):
        assert phase == PHASES[len(self.clock) - 1]
        self.clock.append(now())

    def log(self, step, metrics):
        """Writes the step's metrics, and ends the run if its gradients stay not finite."""
        metrics |= seconds_of(self.clock) | {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        self.write(step, metrics)
        self.bar.set_postfix_str(STATUS.format_map(defaultdict(float, metrics)))
        updates = self.args.num_ppo_epochs * self.args.num_mini_batches
        is_bad = metrics["skipped_updates"] == updates and metrics["unparsable"] < 1
        self.bad_steps = self.bad_steps + 1 if is_bad else 0
        if self.bad_steps == BAD_STEPS:
            remedy = "lower --learning_rate and go on with --resume CHECKPOINT"
            fail(f"no finite gradient in {BAD_STEPS} steps in a row, up to {step}: {remedy}")

    def save_or_stop(self, step, kl_coef):
        """Saves every --save_steps steps and at the end; on SIGTERM saves and exits. Collective."""
        args, is_last = self.args, step == self.args.max_steps
        if self.stopping() or is_last or step % args.save_steps == 0:
            meta = self.meta | {"step": step, "kl_coef": kl_coef}
            checkpoint.save_checkpoint(self.actor, self.tokenizer, self.optimizer, args, meta)
            if self.stopping():  # also if the signal came while saving
                resume = "run the same command to resume"
                print(f"\nSIGTERM: stopped after step {step}; {resume}", flush=True)
                dist.barrier()
                raise SystemExit(128 + signal.SIGTERM)

    def stopping(self) -> bool:
        """Whether a rank has received SIGTERM. Collective."""
        return dist.totals({"signals": len(self.signals)})["signals"] > 0


def seconds_of(clock) -> dict[str, float]:
    """The seconds of each phase and of the step, from the times at which phases began and ended."""
    seconds = [end - start for start, end in pairwise(clock)]
    phases = {f"seconds_{phase}": spent for phase, spent in zip(PHASES, seconds)}
    return phases | {"seconds": sum(seconds)}
