"""SDPO: the divergence and its teacher by brute force, the update, the command."""

import argparse
import copy

import pytest
import torch
from forking import output
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close
from toys import naive_logits

from extras.baselines import sdpo
from t2g.chat import chat_text
from t2g.feedback import Feedback, revision_prompt
from t2g.log import read_jsonl
from t2g.rollout import sample

PROMPTS = ["Hi.", "I am 27.", "My name is Ana. I plan to learn chess.", "I live in Porto."]
CRITIQUES = ["The age is 41, not 27.", "Good.", "It leaves out the name, Ana.", "It repeats."]
FEEDBACK = [Feedback(critique) for critique in CRITIQUES]
ARGS = dict(
    temperature=0.7, bf16=False, num_ppo_epochs=1, num_mini_batches=1,
    per_device_train_batch_size=8, max_grad_norm=1e9
)  # fmt: skip


@pytest.fixture(scope="module")
def teacher(model):
    """A model near the policy."""
    other = copy.deepcopy(model).requires_grad_(False)
    torch.manual_seed(1)
    for weight in other.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    return other


@pytest.fixture(scope="module")
def batch(model, tokenizer):
    """Sampled responses of several lengths, and as the teacher reads them."""
    rollout = sample(model, tokenizer, PROMPTS, 10, generator=torch.Generator().manual_seed(0))
    assert len(set(rollout.mask.sum(1).tolist())) > 2, "another seed gives several lengths"
    hindsight, fits = sdpo.add_critiques(tokenizer, model, PROMPTS, rollout, FEEDBACK)
    assert fits.all()
    return rollout, hindsight


def distributions(model, tokenizer, prompt, ids):
    """The distributions of the tokens of a response, by a pass without padding."""
    prompt_ids = tokenizer(chat_text(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    return Categorical(logits=naive_logits(model, prompt_ids, ids) / ARGS["temperature"])


@torch.no_grad()
def test_the_teacher_judges_each_token_after_its_critique(model, teacher, tokenizer, batch):
    rollout, hindsight = batch
    found = sdpo.token_divergence(model, teacher, rollout, hindsight, argparse.Namespace(**ARGS))
    for b, (prompt, feedback) in enumerate(zip(PROMPTS, FEEDBACK)):
        asked, ids = revision_prompt(prompt, rollout.texts[b], feedback), rollout.ids(b)
        p = distributions(model, tokenizer, prompt, ids)
        q = distributions(teacher, tokenizer, asked, ids)
        assert_close(found[b, : len(ids)], kl_divergence(p, q), atol=1e-4, rtol=1e-4)


def gradients(model, teacher, rollout, hindsight, mask, **changed):
    """Returns the gradients of one update, from a step of SGD with learning rate 1, and its stats.

    Without a teacher the policy is its own.
    """
    policy, args = copy.deepcopy(model), argparse.Namespace(**ARGS | changed)
    before = [weight.detach().clone() for weight in policy.parameters()]
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    stats = sdpo.update(policy, teacher or policy, optimizer, rollout, hindsight, mask, args)
    return [old - new.detach() for old, new in zip(before, policy.parameters())], stats


def test_no_gradient_flows_through_the_teacher(model, batch):
    """A policy as its own teacher learns what it learns from a frozen copy of itself."""
    rollout, hindsight = batch
    frozen = copy.deepcopy(model).requires_grad_(False)
    from_itself, _ = gradients(model, None, rollout, hindsight, rollout.mask)
    from_copy, stats = gradients(model, frozen, rollout, hindsight, rollout.mask)
    assert stats["divergence"] > 0.01 and max(g.abs().max() for g in from_copy) > 1e-3
    assert_close(from_itself, from_copy)


def test_no_split_into_microbatches_changes_the_step(model, teacher, batch):
    inputs = model, teacher, *batch, batch[0].mask
    whole, stats = gradients(*inputs)
    split, parts = gradients(*inputs, per_device_train_batch_size=1)
    assert stats["divergence"] == pytest.approx(parts["divergence"], rel=1e-4)
    assert_close(whole, split, atol=1e-5, rtol=1e-3)


def test_masked_rows_contribute_nothing(model, teacher, batch):
    rollout, hindsight = batch
    rows, mask = [0, 2, 3], rollout.mask.clone()
    mask[1] = False
    masked, stats = gradients(model, teacher, rollout, hindsight, mask)
    kept = rollout.rows(rows), hindsight.rows(rows), rollout.mask[rows]
    without, same = gradients(model, teacher, *kept)
    assert stats["divergence"] == pytest.approx(same["divergence"], rel=1e-5)
    assert_close(masked, without, atol=1e-5, rtol=1e-3)
    everything, _ = gradients(model, teacher, rollout, hindsight, rollout.mask)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(masked, everything))


def test_distillation_brings_the_policy_to_its_teacher(model, teacher, batch):
    policy, args = copy.deepcopy(model), argparse.Namespace(**ARGS)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
    inputs = policy, teacher, optimizer, *batch, batch[0].mask, args
    divergences = [sdpo.update(*inputs)["divergence"] for _ in range(20)]
    assert divergences[-1] < 0.3 * divergences[0]


@pytest.mark.parametrize("rate", [0, 0.25, 1])
def test_the_teacher_moves_at_its_rate(model, teacher, rate):
    moved, start = copy.deepcopy(teacher), next(teacher.parameters())
    sdpo.move_teacher(moved, model, rate)
    goal = next(model.parameters()).detach()
    assert_close(next(moved.parameters()), (1 - rate) * start + rate * goal)


def test_a_row_without_critique_or_room_keeps_its_prompt(model, tokenizer, batch):
    rollout, _ = batch
    feedback = [FEEDBACK[0], None, Feedback("word " * 300), FEEDBACK[3]]
    prompts = [*PROMPTS[:3], "word " * 400]
    hindsight, fits = sdpo.add_critiques(tokenizer, model, prompts, rollout, feedback)
    assert fits.tolist() == [True, False, False, True]
    rows = zip(hindsight.prompt, hindsight.prompt_mask)
    texts = [tokenizer.decode(prompt[mask]) for prompt, mask in rows]
    asked = revision_prompt(PROMPTS[0], rollout.texts[0], FEEDBACK[0])
    expected = [chat_text(tokenizer, text) for text in (asked, *PROMPTS[1:3])]
    assert texts[:3] == expected
    assert "[...]" in texts[3] and rollout.texts[3] in texts[3] and CRITIQUES[3] in texts[3]
    assert hindsight.prompt.shape[1] + rollout.response.shape[1] <= 256
    assert torch.equal(hindsight.response, rollout.response)


SHORT = "--critic rule --per_device_train_batch_size 4 --response_length 12 --seed 5"


def test_two_steps_begin_with_the_rollout_of_train_ppo(tmp_path, untrained):
    both = f"{SHORT} --policy {untrained}"
    sdpo_flags = f"--max_steps 2 --learning_rate 0.01 --output_dir {tmp_path}/sdpo"
    output(f"extras.baselines.sdpo {both} {sdpo_flags}")
    lines = read_jsonl(tmp_path / "sdpo" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["kl"] == lines[0]["unparsable"] == lines[0]["too_long"] == 0 < lines[1]["kl"]
    assert (tmp_path / "sdpo" / "checkpoint-2" / "model.safetensors").is_file()
    ppo_flags = f"--num_mini_batches 2 --max_steps 1 --eval_samples 1 --output_dir {tmp_path}/ppo"
    output(f"train_ppo {both} {ppo_flags}")
    [line] = read_jsonl(tmp_path / "ppo" / "metrics.jsonl")
    for name in ("reward", "entropy", "tokens_poor", "response_tokens", "prompt_tokens", "words"):
        assert lines[0][name] == line[name], name
