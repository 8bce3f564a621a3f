"""The training loop: what its update receives and what it logs, recomputed from their definitions."""

import copy
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from forking import output, refusal
from safetensors.torch import load_file
from torch.testing import assert_close

import train_ppo
from t2g.feedback import Feedback
from t2g.log import read_jsonl
from t2g.policy import Policy, latest_checkpoint
from t2g.ppo import gae
from t2g.run import BAD_STEPS, Run
from t2g.tasks import toy

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


def test_held_out_prompts_are_shown_before_the_first_update_and_after_each(steps, folder):
    rows = [row for row in read_jsonl(folder / "run" / "samples.jsonl") if row["heldout"]]
    kl = {row["step"]: [token["kl"] for token in row["tokens"]] for row in rows}
    assert sorted(kl) == list(range(STEPS + 1))
    assert set(kl[0]) == {0} and any(kl[STEPS]), "policy and reference are one at the start"


def test_by_default_a_step_changes_v_by_a_fifth_for_states_of_ones(model, tokenizer, tmp_path):
    args = SimpleNamespace(learning_rate=1e-6, value_learning_rate=None, kl_coef=0.1)
    args.output_dir, args.max_steps, args.tensorboard = tmp_path, 1, False
    actor = Policy(copy.deepcopy(model))
    run = Run(args, toy, tokenizer, actor, [], [], tmp_path)
    ones = torch.ones(1, 1, actor.value_head.in_features)
    for _ in run.steps():
        actor.values(ones, torch.ones(1, 1, dtype=torch.bool)).sum().backward()
        run.optimizer.step()
    assert actor.value_head(ones).item() == pytest.approx(-0.2, rel=0.1)  # and the bias a little


# ---- updates that are skipped ------------------------------------------------------------------
@pytest.fixture
def flags(folder, tmp_path):
    """The flags of a run in tmp_path/run whose steps have four minibatches and a checkpoint."""
    more = "--num_ppo_epochs", 2, "--num_mini_batches", 2, "--save_steps", 1
    where = "--policy", folder / "model", "--output_dir", tmp_path / "run"
    return [*FLAGS, *more, "--save_total_limit", 9, *where, "--max_steps"]


@pytest.fixture
def break_gradients(monkeypatch):
    """break_gradients(steps) makes the gradients of these steps nan."""
    calls, honest = [], train_ppo.policy_loss

    def break_gradients(steps):
        def loss(*args):
            calls.append(len(calls) // 4 + 1)
            value, stats = honest(*args)
            return value * (float("nan") if calls[-1] in steps else 1), stats

        monkeypatch.setattr(train_ppo, "policy_loss", loss)

    return break_gradients


def test_a_gradient_that_is_not_finite_changes_nothing(flags, tmp_path, break_gradients):
    break_gradients({2})
    output("train_ppo", *flags, 3)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped_updates"] for row in rows] == [0, 4, 0]
    files = [tmp_path / "run" / f"checkpoint-{n}" / "model.safetensors" for n in (1, 2, 3)]
    one, two, three = map(load_file, files)
    assert all(one[name].equal(two[name]) for name in one)
    assert not all(two[name].equal(three[name]) for name in one)


def test_gradients_that_stay_not_finite_end_the_run(flags, tmp_path, break_gradients):
    break_gradients(range(2, 99))
    sentence = refusal("train_ppo", *flags, 9)
    assert "no finite gradient" in sentence and "--learning_rate" in sentence
    assert latest_checkpoint(tmp_path / "run").name == f"checkpoint-{BAD_STEPS}"


@pytest.mark.parametrize(("first", "skipped"), [("1.0", 2), ("None", 4)])
def test_a_minibatch_without_readable_critiques_changes_nothing(flags, tmp_path, first, skipped):
    """With one readable response in a step, one of the two minibatches of each epoch is empty.

    A run without any goes on for more steps than one without finite gradients may have.
    """
    critic = f"critic = lambda *_: lambda _, texts: [{first}, *[None] * (len(texts) - 1)]"
    (tmp_path / "critic.py").write_text(critic)
    output("train_ppo", *flags, BAD_STEPS + 1, "--critic", tmp_path / "critic.py")
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped_updates"] for row in rows] == [skipped] * (BAD_STEPS + 1)
    [state] = (tmp_path / "run" / "checkpoint-1" / "state").glob("*.safetensors")
    assert load_file(state).get("optimizer.0.0.step", 0) == 4 - skipped
