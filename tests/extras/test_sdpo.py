"""Self-distillation from feedback: the divergence against torch's own, its gradient, the teacher against naive forwards."""

import argparse
import copy
import importlib
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import extras.baselines.sdpo as train_sdpo
from t2g.feedback import Feedback, revision_prompt
from t2g.log import METRICS, read_jsonl
from t2g.policy import save
from t2g.rollout import chat_text, sample
from t2g.tasks import toy

KINDS = ("reverse_kl", "forward_kl", "jsd")
PROMPTS = [
    "Hi.",
    "I am 27 years old.",
    "My name is Ana. I plan to learn chess. My friend Ben has a dog.",
    "I live in Porto.",
]
SAID = [
    Feedback("The age is 41, not 27."),
    Feedback("Good."),
    Feedback("It leaves out the name, Ana."),
    Feedback("It repeats."),
]
T = 10


def distributions(seed, spread=2.0, vocabulary=7):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(2, 3, 4, vocabulary, generator=generator, dtype=torch.float64) * spread
    return draws.log_softmax(-1)


# ---- the divergence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10**6), spread=st.floats(0.01, 30))
def test_the_divergence_is_zero_for_equal_distributions_and_above_it_for_others(kind, seed, spread):
    p, q = distributions(seed, spread)
    assert train_sdpo.divergence(p, q, kind).shape == p.shape[:-1]
    assert (train_sdpo.divergence(p, q, kind) > 0).all()
    assert_close(
        train_sdpo.divergence(p, p.clone(), kind), torch.zeros(p.shape[:-1], dtype=p.dtype)
    )


def test_the_divergences_are_torch_s_own():
    p, q = distributions(0)
    middle = Categorical(probs=(p.exp() + q.exp()) / 2)
    P, Q = Categorical(logits=p), Categorical(logits=q)
    assert_close(train_sdpo.divergence(p, q, "reverse_kl"), kl_divergence(P, Q))
    assert_close(train_sdpo.divergence(p, q, "forward_kl"), kl_divergence(Q, P))
    assert_close(
        train_sdpo.divergence(p, q, "jsd"),
        (kl_divergence(P, middle) + kl_divergence(Q, middle)) / 2,
    )
    with pytest.raises(ValueError, match="reverse_kl, forward_kl or jsd"):
        train_sdpo.divergence(p, q, "kl")


def test_the_jensen_shannon_divergence_is_symmetric_and_bounded():
    p, q = distributions(1, spread=40.0)
    assert_close(train_sdpo.divergence(p, q, "jsd"), train_sdpo.divergence(q, p, "jsd"))
    assert 0.6 < train_sdpo.divergence(p, q, "jsd").max() <= math.log(2) + 1e-12


def test_the_gradient_of_the_reverse_divergence_is_a_policy_gradient_over_the_vocabulary():
    """sum_v p(v) A(v) grad log p(v) with the fixed advantages A(v) = log q(v) - log p(v), to be ascended."""
    p, q = distributions(2)
    logits = p.clone().requires_grad_()
    train_sdpo.divergence(logits.log_softmax(-1), q, "reverse_kl").sum().backward()
    policy, advantages = p.exp(), q - p
    jacobian = (
        torch.eye(p.shape[-1], dtype=p.dtype) - policy[..., None, :]
    )  # d log p(v) / d logit(w)
    assert_close(-logits.grad, torch.einsum("btv,btv,btvw->btw", policy, advantages, jacobian))


# ---- policy and teacher ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(model):
    """Another one of its kind."""
    other = copy.deepcopy(model).requires_grad_(False)
    torch.manual_seed(1)
    for weight in other.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    return other


@pytest.fixture(scope="module")
def batch(model, tokenizer):
    """Sampled responses of several lengths, and as the teacher reads them."""
    for seed in range(20):
        rollout = sample(
            model, tokenizer, PROMPTS, T, generator=torch.Generator().manual_seed(seed)
        )
        if len(set(rollout.mask.sum(1).tolist())) > 2:
            hindsight, fits = train_sdpo.with_critiques(tokenizer, 256, PROMPTS, rollout, SAID)
            assert fits.all()
            return rollout, hindsight
    pytest.fail("no seed gives responses of several lengths")


def flags(**changed):
    plain = dict(
        divergence="reverse_kl", temperature=0.7, bf16=False, num_ppo_epochs=1, num_mini_batches=1
    )
    return argparse.Namespace(
        **plain | dict(per_device_train_batch_size=8, max_grad_norm=1e9) | changed
    )


@torch.no_grad()
def next_token(model, tokenizer, asked, written):
    """log pi(. | asked, written) of a single row: one forward pass without padding, its last logits."""
    ids = torch.tensor(
        [tokenizer(chat_text(tokenizer, asked), add_special_tokens=False)["input_ids"] + written]
    )
    return (model(input_ids=ids).logits[0, -1] / 0.7).log_softmax(-1)


def test_the_teacher_judges_each_token_behind_its_critique_and_what_was_written_before(
    model, teacher, tokenizer, batch
):
    rollout, hindsight = batch
    found = train_sdpo.token_divergence(model, teacher, rollout, hindsight, flags())
    for b, (prompt, said) in enumerate(zip(PROMPTS, SAID)):
        asked, ids = (
            revision_prompt(prompt, rollout.texts[b], said),
            rollout.response[b][rollout.mask[b]].tolist(),
        )
        for t in range(len(ids)):
            p, q = (
                next_token(model, tokenizer, prompt, ids[:t]),
                next_token(teacher, tokenizer, asked, ids[:t]),
            )
            assert_close(
                found[b, t].detach(),
                kl_divergence(Categorical(logits=p), Categorical(logits=q)),
                atol=1e-4,
                rtol=1e-4,
            )


def gradients(model, teacher, rollout, hindsight, mask, **changed):
    """Those of one update, read off a step of plain descent with learning rate 1."""
    policy = copy.deepcopy(model)
    before = [weight.detach().clone() for weight in policy.parameters()]
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    stats = train_sdpo.update(
        policy, teacher or policy, optimizer, rollout, hindsight, mask, flags(**changed)
    )
    return [old - new.detach() for old, new in zip(before, policy.parameters())], stats


def test_no_gradient_flows_through_the_teacher(model, batch):
    """The policy as its own teacher learns what it learns from a frozen copy of itself."""
    rollout, hindsight = batch
    frozen = copy.deepcopy(model).requires_grad_(False)
    of_itself, _ = gradients(model, None, rollout, hindsight, rollout.mask)
    of_a_copy, stats = gradients(model, frozen, rollout, hindsight, rollout.mask)
    assert stats["divergence"] > 0.01 and max(g.abs().max() for g in of_a_copy) > 1e-3
    for ours, theirs in zip(of_itself, of_a_copy):
        assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_no_split_into_microbatches_changes_the_step(model, teacher, batch, kind):
    rollout, hindsight = batch
    whole, stats = gradients(model, teacher, rollout, hindsight, rollout.mask, divergence=kind)
    split, parts = gradients(
        model,
        teacher,
        rollout,
        hindsight,
        rollout.mask,
        divergence=kind,
        per_device_train_batch_size=1,
    )
    assert math.isclose(stats["divergence"], parts["divergence"], rel_tol=1e-4)
    for ours, theirs in zip(whole, split):
        assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_masked_samples_contribute_nothing(model, teacher, batch):
    rollout, hindsight = batch
    mask = rollout.mask & torch.tensor([True, False, True, True])[:, None]
    with_it, stats = gradients(model, teacher, rollout, hindsight, mask)
    rows = [0, 2, 3]
    without, same = gradients(
        model, teacher, rollout.rows(rows), hindsight.rows(rows), rollout.mask[rows]
    )
    everything, _ = gradients(model, teacher, rollout, hindsight, rollout.mask)
    assert math.isclose(stats["divergence"], same["divergence"], rel_tol=1e-5)
    for ours, theirs in zip(with_it, without):
        assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    assert any((ours - theirs).abs().max() > 1e-3 for ours, theirs in zip(with_it, everything))


def test_distilling_brings_the_policy_to_its_teacher(model, teacher, batch):
    rollout, hindsight = batch
    policy = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
    seen = [
        train_sdpo.update(policy, teacher, optimizer, rollout, hindsight, rollout.mask, flags())
        for _ in range(20)
    ]
    assert seen[-1]["divergence"] < 0.3 * seen[0]["divergence"]


def test_the_teacher_follows_at_its_rate(model, teacher):
    start, goal = next(teacher.parameters()), next(model.parameters())
    for rate in (0, 0.25, 1):
        slow = copy.deepcopy(teacher)
        train_sdpo.follow(slow, model, rate)
        assert_close(next(slow.parameters()), (1 - rate) * start + rate * goal.detach())


def test_a_sample_without_a_critique_or_without_room_for_it_keeps_its_own_prompt(tokenizer, batch):
    rollout, _ = batch
    long = Feedback("word " * 300)
    hindsight, fits = train_sdpo.with_critiques(
        tokenizer, 256, PROMPTS, rollout, [SAID[0], None, long, SAID[3]]
    )
    assert fits.tolist() == [True, False, False, True]
    read = [tokenizer.decode(row[m]) for row, m in zip(hindsight.prompt, hindsight.prompt_mask)]
    for b in (1, 2):
        assert read[b] == chat_text(tokenizer, PROMPTS[b])
    for b in (0, 3):
        assert read[b] == chat_text(
            tokenizer, revision_prompt(PROMPTS[b], rollout.texts[b], SAID[b])
        )
    assert torch.equal(hindsight.response, rollout.response) and torch.equal(
        hindsight.mask, rollout.mask
    )


def test_a_long_prompt_is_shortened_for_the_teacher_and_not_its_critique(tokenizer, batch):
    rollout, _ = batch
    prompts = ["word " * 400, *PROMPTS[1:]]
    hindsight, fits = train_sdpo.with_critiques(tokenizer, 256, prompts, rollout, SAID)
    read = tokenizer.decode(hindsight.prompt[0][hindsight.prompt_mask[0]])
    assert fits.all() and hindsight.prompt.shape[1] + rollout.response.shape[1] <= 256
    assert "[...]" in read and rollout.texts[0] in read and SAID[0].critique in read


# ---- the script ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch):
    """Runs a script's main() in this process."""

    def run_main(script, *words):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        importlib.import_module(script).main()

    return run_main


SHORT = (
    "--critic",
    "rule",
    "--per_device_train_batch_size",
    4,
    "--num_mini_batches",
    2,
    "--response_length",
    12,
    "--seed",
    5,
)


def test_two_steps_of_the_script(run, tmp_path):
    tokenizer, model = toy.new_model(0)
    save(model, tokenizer, tmp_path / "sft", 1)
    run(
        "train_sdpo",
        "--output_dir",
        tmp_path / "sdpo",
        *SHORT,
        "--max_steps",
        2,
        "--learning_rate",
        0.01,
    )
    lines = read_jsonl(tmp_path / "sdpo" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2] and set(lines[0]) <= set(METRICS) | set(
        toy.METRICS
    )
    assert (
        lines[0]["kl"] == 0 < lines[1]["kl"] and lines[0]["unparsable"] == lines[0]["too_long"] == 0
    )
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "sdpo" / "checkpoint-2")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters()))

    run(
        "train_ppo", "--output_dir", tmp_path / "ppo", *SHORT, "--max_steps", 1, "--eval_samples", 1
    )
    (line,) = read_jsonl(tmp_path / "ppo" / "metrics.jsonl")
    for name in (
        "reward",
        "entropy",
        "tokens_poor",
        "response_tokens",
        "prompt_tokens",
        "words",
        "poor",
    ):
        assert lines[0][name] == line[name], f"the first rollout is not train_ppo.py's: {name}"


def test_a_critic_without_words_is_refused(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("train_sdpo", "--critic", "scalar")
    assert stopped.value.code == 2 and "a number is no critique" in capsys.readouterr().err
