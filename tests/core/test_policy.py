"""Policy and sampling against naive forwards of a tiny Llama: one row, no padding, no cache."""

import argparse
import copy
import math

import pytest
import torch
from torch.testing import assert_close
from toys import naive_logits
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_ppo
from t2g import adapters, cpu
from t2g.align import span_rewards, token_offsets
from t2g.chat import chat_text
from t2g.log import print_once
from t2g.policy import Policy, autocast, eos_ids, latest_checkpoint, load, response_logits, save
from t2g.ppo import entropies, gae, kl_penalty, masked_mean, policy_loss, vocabulary_logprobs
from t2g.rollout import draw, encode_prompts, respond, sample
from t2g.score import score

PROMPTS = [
    "Hi.",
    "I am 27 years old.",
    "My name is Ana. I plan to learn chess. My friend Ben has a dog.",
    "I live in Porto.",
]
T = 12


@pytest.fixture(scope="module")
def policy(model):
    """The model with a value head that has learnt something."""
    torch.manual_seed(1)
    policy = Policy(model)
    torch.nn.init.normal_(policy.value_head.weight)
    return policy


@pytest.fixture(scope="module")
def rollout(model, tokenizer):
    """Sampled responses of several lengths, some ended by EOS and some cut off."""
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        rollout = sample(model, tokenizer, PROMPTS * 2, T, generator=random)
        several = len(set(rollout.mask.sum(1).tolist())) > 2
        if several and rollout.finished.any() and not rollout.finished.all():
            return rollout
    pytest.fail("no seed gives responses of several lengths, some of them cut off")


def naive_rows(model, rollout):
    """Each row's number, length, response, and logits by one plain forward over this row."""
    for b in range(len(rollout)):
        prompt = rollout.prompt[b, rollout.prompt_mask[b]]
        response = rollout.response[b, rollout.mask[b]]
        yield b, len(response), response, naive_logits(model, prompt, response)


# ---- log-probabilities, entropies, values ----------------------------------------------------
def test_impossible_tokens_add_nothing_to_entropy_and_kl(policy, rollout):
    """A vocabulary that is padded with logits of -inf."""
    logits = response_logits(policy.model, rollout)[0].detach()
    padded = torch.nn.functional.pad(logits, (0, 3), value=-math.inf).requires_grad_()
    ours, theirs = vocabulary_logprobs(padded), vocabulary_logprobs(padded * 0.5)
    assert_close(ours[..., :-3], vocabulary_logprobs(logits), atol=1e-6, rtol=0)
    assert_close(entropies(ours), entropies(ours[..., :-3]), atol=1e-6, rtol=0)
    kl = kl_penalty(ours, theirs, "full")
    assert_close(kl, kl_penalty(ours[..., :-3], theirs[..., :-3], "full"), atol=1e-6, rtol=0)
    entropies(ours).sum().backward()
    assert padded.grad.isfinite().all()


@pytest.mark.parametrize("kind", train_ppo.KL_KINDS)
@pytest.mark.parametrize("lora", [False, True])
@torch.no_grad()
def test_scores_are_those_of_naive_forwards_of_policy_and_reference(model, rollout, kind, lora):
    """The reference is a model of its own, or with LoRA the policy without its adapters."""
    torch.manual_seed(2)
    trained, reference = copy.deepcopy(model), None if lora else model
    trained = adapters.added(trained, argparse.Namespace(lora_r=2 if lora else None, lora_alpha=4))
    for name, weight in trained.named_parameters():
        if not lora or "lora_B" in name:
            weight += 0.1 * torch.randn_like(weight)
    args = dict(per_device_train_batch_size=3, bf16=False, temperature=0.7, kl_estimator=kind)
    scores = score(Policy(trained), reference, rollout, argparse.Namespace(**args))
    rows = zip(naive_rows(trained, rollout), naive_rows(model, rollout))
    for (b, n, response, logits), (*_, ref_logits) in rows:
        both = [vocabulary_logprobs(x, 0.7) for x in (logits, ref_logits)]
        sampled = [log_p.gather(1, response[:, None])[:, 0] for log_p in both]
        kl = kl_penalty(*(both if kind == "full" else sampled), kind)
        for ours, naive in ((scores.kl, kl), (scores.logprobs, sampled[0])):
            assert_close(ours[b, :n], naive, atol=1e-5, rtol=1e-4)
            assert not ours[b, n:].any()
    assert scores.kl.abs().max() > 0.01


@torch.no_grad()
def test_what_stands_in_padding_changes_nothing_and_off_the_mask_all_is_zero(policy, rollout):
    changed = copy.copy(rollout)
    changed.prompt = rollout.prompt.masked_fill(~rollout.prompt_mask, 77)
    changed.response = rollout.response.masked_fill(~rollout.mask, 99)
    results = [policy(each, with_entropy=True)[:3] for each in (rollout, changed)]
    for plain, other in zip(*results):
        assert torch.equal(plain, other) and plain.dtype == torch.float32
        assert torch.equal(plain != 0, rollout.mask)


@torch.no_grad()
def test_values_are_the_head_s_reading_of_the_last_state_before_each_token(policy, rollout):
    values = policy(rollout).values
    for b in range(len(rollout)):
        prompt, response = rollout.prompt[b, rollout.prompt_mask[b]], rollout.ids(b)
        ids = torch.tensor([[*prompt, *response]])
        states = policy.model.model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
        expected = policy.value_head(states)[:, 0]
        assert_close(values[b, : len(response)], expected, atol=1e-5, rtol=0)
    assert not Policy(policy.model)(rollout).values.any(), "a new head says zero"


def test_the_entropy_bonus_is_subtracted_from_the_loss_and_has_a_gradient(policy, rollout):
    """L = L_pi + c_V L_V - c_H mean(H); without c_H no entropy is computed."""
    assert policy(rollout).entropy is None
    names = ("old_logprobs", "old_values", "advantages", "returns")
    batch = dict.fromkeys(names, torch.zeros(rollout.mask.shape)) | {"mask": rollout.mask}
    flags = dict(bf16=False, temperature=1.0, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1)

    def loss(coefficient):
        args = argparse.Namespace(**flags, entropy_coef=coefficient)
        return train_ppo.microbatch_loss(policy, rollout, batch, rollout.mask.sum(), args)[0]

    assert policy(rollout).logprobs.requires_grad
    entropy = policy(rollout, with_entropy=True).entropy
    assert entropy.requires_grad
    with torch.no_grad():
        assert not policy(rollout, with_entropy=True).entropy.requires_grad
    assert_close(loss(0.3), loss(0.0) - 0.3 * masked_mean(entropy, rollout.mask))


# ---- sampling --------------------------------------------------------------------------------
def test_a_token_is_drawn_as_often_as_it_is_likely_and_one_that_cannot_be_never():
    """Evenly spread numbers pick each token for a share of them that is its probability."""
    logits = torch.tensor([-math.inf, 1.0, 0.0, -math.inf, 2.0, -1.0, -math.inf])
    uniform = torch.arange(10_000) / 10_000
    counts = draw(logits.expand(10_000, -1), 0.7, uniform).bincount(minlength=7) / 10_000
    assert_close(counts, (logits / 0.7).softmax(-1), atol=2e-4, rtol=0)
    assert not counts[[0, 3, 6]].any()
    assert draw(logits[None], 1.0, torch.tensor([1 - 2**-24])).item() == 5


def test_prompts_are_padded_on_the_left_and_end_with_the_generation_prompt(tokenizer):
    prompt, mask = encode_prompts(tokenizer, PROMPTS)
    for ids, real, text in zip(prompt, mask, PROMPTS):
        assert real[-1] and not (real[:-1] & ~real[1:]).any()
        assert (ids[~real] == tokenizer.pad_token_id).all()
        assert tokenizer.decode(ids[real]) == chat_text(tokenizer, text)


def test_respond_answers_in_the_order_of_the_prompts(model, tokenizer):
    texts, finished = respond(model, tokenizer, PROMPTS, T, batch_size=3, temperature=0)
    for prompt, text, ended in zip(PROMPTS, texts, finished):
        one = sample(model, tokenizer, [prompt], T, temperature=0)
        assert [text] == one.texts and [ended] == one.finished.tolist()


def test_a_prompt_beyond_the_context_ends_with_one_sentence(model, tokenizer, refused):
    assert "context" in refused(sample, model, tokenizer, ["I work as a baker. " * 100], T)


def test_rows_take_the_same_rows_of_everything_and_leave_out_columns_of_padding(rollout):
    index = [5, 0, 3]
    part = rollout.rows(torch.tensor(index))
    assert len(part) == 3 and part.texts == [rollout.texts[i] for i in index]
    for name in ("response", "mask", "finished"):
        assert torch.equal(getattr(part, name), getattr(rollout, name)[index])
    left_out = rollout.prompt.shape[1] - part.prompt.shape[1]
    assert left_out > 0 and part.prompt_mask[:, 0].any()
    assert not rollout.prompt_mask[index, :left_out].any()
    for name in ("prompt", "prompt_mask"):
        assert torch.equal(getattr(part, name), getattr(rollout, name)[index, left_out:])


# ---- gradients -------------------------------------------------------------------------------
def gradients(policy, loss):
    return torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)


def test_without_critic_the_step_is_the_natural_language_gradient(policy, tokenizer, rollout):
    """gamma = lam = 0 and V = 0: the gradient is - sum_t delta_t grad log pi(y_t) / count."""
    delta = torch.zeros(rollout.response.shape)
    for b, text in enumerate(rollout.texts):
        n, third = int(rollout.mask[b].sum()), len(text) // 3
        if third:
            offsets = token_offsets(tokenizer, rollout.response[b, :n].tolist())
            delta[b, :n] = span_rewards(offsets, [(0, third, 1.0), (2 * third, len(text), -0.5)])
    assert (delta > 0).any() and (delta < 0).any() and (delta[rollout.mask] == 0).any()

    stats = policy(rollout)
    advantages, _ = gae(delta, torch.zeros_like(delta), rollout.mask, 0.0, 0.0)
    loss, _ = policy_loss(stats.logprobs, stats.logprobs.detach(), advantages, rollout.mask, 0.2)
    by_ppo = gradients(policy, loss)

    objective = 0.0
    for b, n, response, logits in naive_rows(policy.model, rollout):
        logprobs = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
        objective = objective + (delta[b, :n] * logprobs).sum()
    by_hand = gradients(policy, -objective / rollout.mask.sum())
    assert any(g is not None and g.abs().max() > 1e-4 for g in by_ppo)
    for one, other in zip(by_ppo, by_hand):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, atol=1e-5, rtol=1e-4)


# ---- checkpoints -----------------------------------------------------------------------------
@torch.no_grad()
def test_a_checkpoint_comes_back_as_it_was(policy, tokenizer, rollout, tmp_path):
    (tmp_path / "checkpoint-2.unfinished").mkdir()  # which a kill has left
    folder = save(policy.model, tokenizer, tmp_path, 3, policy.value_head)
    assert folder == tmp_path / "checkpoint-3" == latest_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    expected, weights = policy(rollout), policy.model.state_dict()
    for path in (tmp_path, folder, str(folder)):
        loaded_tokenizer, loaded = load(path)
        assert all(torch.equal(x, weights[name]) for name, x in loaded.state_dict().items())
        assert_close(Policy(loaded)(rollout).logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)
        ids = [encode_prompts(t, PROMPTS)[0] for t in (loaded_tokenizer, tokenizer)]
        assert torch.equal(*ids)
        assert eos_ids(loaded_tokenizer, loaded) == eos_ids(tokenizer, policy.model)
        assert not loaded.training
    loaded.generation_config.eos_token_id = ["<eos>", None]  # as some files name it
    assert eos_ids(tokenizer, loaded) == [tokenizer.eos_token_id]


@torch.no_grad()
def test_transformers_alone_loads_a_checkpoint(policy, tokenizer, rollout, tmp_path):
    """The value head, which lies in a folder of its own, is not in its way."""
    folder = save(policy.model, tokenizer, tmp_path, 3, policy.value_head)
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(map(torch.equal, plain.state_dict().values(), policy.model.state_dict().values()))
    assert torch.equal(cpu.use(plain)(rollout.prompt).logits, policy.model(rollout.prompt).logits)
    text = chat_text(tokenizer, PROMPTS[1])
    assert AutoTokenizer.from_pretrained(folder).encode(text) == tokenizer.encode(text)


def test_the_latest_checkpoint_is_that_of_the_highest_step(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11.unfinished"):
        (tmp_path / name).mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes bf16")
@pytest.mark.parametrize(("capability", "emulates"), [("AVX2", True), ("AVX512", False)])
def test_a_cpu_that_emulates_bf16_computes_in_fp32(monkeypatch, capsys, capability, emulates):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    print_once.cache_clear()
    with autocast(bf16=True):
        assert torch.is_autocast_enabled("cpu") != emulates
    assert ("computes in fp32" in capsys.readouterr().out) == emulates
