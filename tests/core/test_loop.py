"""The training loop: what its update receives and what it logs, recomputed from their definitions."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from forking import output
from torch.testing import assert_close

import train_ppo
from t2g.feedback import Feedback
from t2g.log import read_jsonl
from t2g.ppo import gae

STEPS, ROWS = 4, 6
GAMMA, LAM, MAX_NORM = 0.9, 0.7, 0.05
KL_COEF, KL_TARGET, KL_HORIZON = 0.1, 0.05, 50.0
RATES = 2e-3, 0.05  # of the policy, and of the value head
FLAGS = (
    "--critic", "rule", "--per_device_train_batch_size", ROWS // 2, "--eval_samples", 1,
    "--response_length", 10, "--gamma", GAMMA, "--lam", LAM, "--kl_coef", KL_COEF,
    "--kl_target", KL_TARGET, "--kl_horizon", KL_HORIZON, "--max_grad_norm", MAX_NORM,
    "--learning_rate", RATES[0], "--value_learning_rate", RATES[1], "--reward", "scalar",
)  # fmt: skip


def critic(examples, texts):
    """The first characters are good, the last are poor, and one response in three is unreadable."""
    feedback = [Feedback("", [text[:2]], [text[-2:]]) for text in texts]
    return [one if i % 3 else None for i, one in enumerate(feedback)]


def train(*flags) -> list:
    """Runs train_ppo.py. Returns what the parts of each step gave, and what its update received."""
    steps, latest = [], {}

    def recorded(name):
        part = getattr(train_ppo, name)

        def call(*args):
            latest[name] = part(*args)
            return latest[name]

        return call

    def update(actor, optimizer, rollout, batch, args):
        norms = []

        def before_step(optimizer, *_):
            weights = [w for group in optimizer.param_groups for w in group["params"]]
            gradients = [w.grad.norm() for w in weights if w.grad is not None]
            norms.append(torch.stack(gradients).norm())

        hook = optimizer.register_step_pre_hook(before_step)
        stats = ours(actor, optimizer, rollout, batch, args)
        hook.remove()
        rates = tuple(group["lr"] for group in optimizer.param_groups)
        steps.append(SimpleNamespace(rollout=rollout, batch=batch, rates=rates, norms=norms))
        vars(steps[-1]).update(latest)
        return stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ppo.critics, "load_critic", lambda *_: critic)
        ours = train_ppo.update
        patch.setattr(train_ppo, "update", update)
        for name in ("token_rewards", "place_rewards", "score"):
            patch.setattr(train_ppo, name, recorded(name))
        output("train_ppo", *FLAGS, *flags)
    return steps


@pytest.fixture(scope="module")
def steps(folder):
    """Each step of a run, with its line of metrics.jsonl as `row`."""
    where = "--policy", folder / "model", "--output_dir", folder / "run"
    steps = train("--max_steps", STEPS, *where)
    for step, step.row in zip(steps, read_jsonl(folder / "run" / "metrics.jsonl"), strict=True):
        step.delta = step.token_rewards[0]
        step.mask = step.rollout.mask & (torch.arange(ROWS) % 3 > 0)[:, None]
    return steps


def test_the_update_receives_whitened_advantages_of_the_rewards_less_the_kl_penalty(steps):
    for step in steps:
        old, mask = step.score, step.mask
        rewards = step.place_rewards - step.row["kl_coef"] * old.kl
        advantages, returns = gae(rewards, old.values, mask, GAMMA, LAM)
        centred = advantages - advantages[mask].mean()
        expected = {
            "mask": mask,
            "old_logprobs": old.logprobs,
            "old_values": old.values,
            "returns": returns,
            "advantages": torch.where(mask, centred / advantages[mask].std(correction=0), 0),
        }
        assert step.batch.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_close(step.batch[name], tensor, atol=1e-5, rtol=1e-4)
        assert (step.rollout.mask & ~mask).any() and mask.any()
    assert all(step.score.kl.any() and step.score.values.any() for step in steps[1:])


def test_the_log_holds_means_over_the_readable_responses_and_their_tokens(steps):
    for step in steps:
        delta, mask, old, rollout = step.delta, step.mask, step.score, step.rollout
        error = step.batch["returns"] - old.values
        variances = [x[mask].var(correction=0) for x in (error, step.batch["returns"])]
        readable = mask.any(1).sum()
        expected = {
            "reward": delta[mask].sum() / readable,
            "kl": old.kl[mask].sum() / readable,
            "entropy": old.entropy[mask].mean(),
            "tokens_good": (delta[mask] > 0).float().mean(),
            "tokens_poor": (delta[mask] < 0).float().mean(),
            "unparsable": 1 - readable / ROWS,
            "value_explained": 1 - variances[0] / variances[1],
            "prompt_tokens": rollout.prompt_mask.sum() / ROWS,
            "response_tokens": rollout.mask.sum() / ROWS,
            "eos_rate": rollout.finished.float().mean(),
        }
        for name, value in expected.items():
            assert step.row[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    assert any(step.row["tokens_good"] and step.row["tokens_poor"] for step in steps)
    assert len({step.row["eos_rate"] for step in steps}) > 1


def test_the_kl_coefficient_follows_the_kl_of_readable_responses(steps):
    assert steps[0].row["kl_coef"] == KL_COEF
    for step, after in pairwise(steps):
        error = min(max(step.row["kl"] / KL_TARGET - 1, -0.2), 0.2)
        factor = 1 + error * step.mask.any(1).sum().item() / KL_HORIZON
        assert after.row["kl_coef"] == pytest.approx(step.row["kl_coef"] * factor)


def test_both_learning_rates_fall_linearly_and_gradients_are_clipped(steps):
    for done, step in enumerate(steps):
        assert step.rates == pytest.approx([rate * (1 - done / STEPS) for rate in RATES])
        assert step.row["learning_rate"] == step.rates[0]
        assert step.row["grad_norm"] > MAX_NORM
        assert max(step.norms).item() == pytest.approx(MAX_NORM, rel=1e-3)


def test_a_run_that_starts_from_another_run_takes_its_value_head(steps, folder):
    assert not steps[0].score.values.any()
    where = "--policy", folder / "run", "--output_dir", folder / "next"
    [first] = train("--max_steps", 1, *where)
    assert first.score.values.abs().max() > 0.01
