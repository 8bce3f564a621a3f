"""Supervised training: the loss covers the completions alone, and a stopped run resumes exactly."""

import argparse
import itertools
import os
import random
from unittest import mock

import pytest
import torch
from torch.testing import assert_close
from toys import check_splits, naive_logprobs
from transformers import AutoModelForCausalLM

from t2g import checkpoint, cli, supervised
from t2g.chat import chat_text
from t2g.critics import fitting_prompt
from t2g.feedback import reward_prompt
from t2g.folder import lock
from t2g.log import read_jsonl
from t2g.muon import Muon
from t2g.policy import latest_checkpoint
from t2g.tasks import toy

RNG = random.Random(0)
EXAMPLES = [toy.make_example(RNG) for _ in range(24)]
CUTS = [(RNG.randrange(20, 200), RNG.randrange(5, 90)) for _ in EXAMPLES]
PAIRS = [(e.prompt[:a], e.reference[:b]) for e, (a, b) in zip(EXAMPLES, CUTS)]


def flags(folder, **given):
    """The flags of a training script, with small numbers."""
    parser = argparse.ArgumentParser()
    supervised.add_flags(cli.flags(parser))
    args = parser.parse_args([])
    small = {"max_steps": 8, "learning_rate": 1e-3, "eval_steps": 3, "save_steps": 2}
    small |= {"output_dir": str(folder), "seed": 0, "bf16": False, "per_device_train_batch_size": 3}
    vars(args).update(small | given)
    return args


@pytest.fixture
def finetune(fresh, tmp_path):
    """finetune(pairs, model, **flags) trains in tmp_path/run and returns the checkpoint."""

    def run(pairs=PAIRS, model=None, folder="run", **given):
        tokenizer, new = fresh()
        torch.manual_seed(3)
        args = flags(tmp_path / folder, **given)
        return supervised.finetune(model or new, tokenizer, pairs, args, "test")

    return run


def test_the_loss_covers_the_completion_alone_and_padding_changes_nothing(fresh):
    tokenizer, model = fresh()
    rows = supervised.encode_pairs(tokenizer, PAIRS[:6])
    batch, trained = supervised.as_rollout(rows, tokenizer.pad_token_id, "cpu")
    assert len({len(completion) for _, completion in rows}) > 2
    naive = 0.0
    for (prompt, completion), response, chosen in zip(rows, batch.response, trained):
        assert response[chosen].tolist() == completion and completion[-1] == tokenizer.eos_token_id
        naive -= naive_logprobs(model, prompt, completion).sum()
    assert_close(supervised.token_loss(model, batch, trained, flags("nowhere")), naive)


def test_no_split_into_microbatches_changes_the_step(fresh):
    """All tokens of a step weigh the same, which a mean of the microbatches' means would change."""
    check_splits(fresh, lambda tokenizer, _: supervised.encode_pairs(tokenizer, PAIRS[:6]))


def test_every_pass_has_each_row_once_and_rows_of_similar_length_share_a_batch():
    # The lengths are distributed as those of news articles.
    lengths = [min(1500, int(random.Random(i).lognormvariate(6, 0.6))) for i in range(640)]
    rows = [([i] * n, [i] * (1 + n // 7)) for i, n in enumerate(lengths)]
    batches = supervised.in_batches(rows, 8, seed=0)
    for _ in range(2):
        one_pass = [next(batches) for _ in range(80)]
        assert sorted(prompt[0] for batch in one_pass for prompt, _ in batch) == list(range(640))
        parts = [supervised.as_rollout(batch, 0, "cpu")[0] for batch in one_pass]
        masks = [mask for part in parts for mask in (part.prompt_mask, part.mask)]
        assert 1 - sum(mask.sum() for mask in masks) / sum(mask.numel() for mask in masks) < 0.1


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_moves_as_torch_moves_to_the_precision_of_bf16(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    both = dict(lr=0.01, weight_decay=0.2)
    muon = Muon([ours], **both)
    of_torch = torch.optim.Muon([theirs], **both, adjust_lr_fn="match_rms_adamw")
    for _ in range(10):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in (muon, of_torch):
            optimizer.step()
    moved = theirs.detach() - start
    assert (ours.detach() - theirs.detach()).norm() < 0.01 * moved.norm()


@pytest.mark.parametrize(
    "kind", [{}, {"optimizer": "muon"}, {"lora_r": 4, "gradient_accumulation_steps": 2}]
)
def test_a_stopped_run_resumes_to_the_same_bits(finetune, tmp_path, kind):
    kind |= {"validation_share": 0.2}
    whole = finetune(**kind)
    (tmp_path / "run").rename(tmp_path / "whole")
    whole = tmp_path / "whole" / whole.name
    step = supervised.train_step
    for taken in (2, 5):  # stopped once after a state was written, once more in the resumed run
        effects = [mock.DEFAULT] * taken + [KeyboardInterrupt]
        stop = mock.patch.object(supervised, "train_step", wraps=step, side_effect=effects)
        with stop, pytest.raises(KeyboardInterrupt):
            finetune(**kind)
    assert latest_checkpoint(tmp_path / "run") is None, "an unfinished run has no checkpoint"
    resumed = finetune(**kind)
    assert resumed.name == whole.name
    assert {p.name for p in resumed.parent.iterdir()} == {p.name for p in whole.parent.iterdir()}
    lines = [read_jsonl(run.parent / "metrics.jsonl") for run in (resumed, whole)]
    for line in itertools.chain(*lines):
        assert line.pop("seconds_update") > 0
    assert lines[0] == lines[1]
    bits = [(run / "model.safetensors").read_bytes() for run in (resumed, whole)]
    assert bits[0] == bits[1]


def test_a_run_that_is_killed_between_its_best_and_its_state_resumes(finetune, monkeypatch):
    kind = dict(validation_share=0.2, eval_steps=1, save_steps=2, max_steps=4)
    ours = checkpoint.replace

    def killed(folder, name, *state, **reached):
        ours(folder, name, *state, **reached)
        if name == "best" and reached["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "replace", killed)
    losses = iter([4.0, 3.0, 2.0, 2.5, 1.5])  # of steps 1, 2, 3, again 3, and 4
    monkeypatch.setattr(supervised, "validation_loss", lambda *args: next(losses))
    with pytest.raises(KeyboardInterrupt):
        finetune(**kind)
    monkeypatch.setattr(checkpoint, "replace", ours)
    assert finetune(**kind).name == "checkpoint-4"


@pytest.fixture
def stop_again(fresh, finetune, tmp_path):
    """Trains, and leaves the folder as a run that was killed after its checkpoint."""
    saved = finetune()
    state = dict(step=5, best_step=0, best_loss=9.0)
    checkpoint.replace(tmp_path / "run", "state", fresh()[1], **state)
    return saved


@pytest.mark.parametrize("changed", [{"learning_rate": 2e-3}, {"pairs": PAIRS[::-1]}, {}])
def test_the_same_run_is_finished_and_another_starts_anew(stop_again, finetune, tmp_path, changed):
    assert finetune(**changed) == stop_again
    assert (tmp_path / "run.1").is_dir() == bool(changed)
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 8
    assert not list((tmp_path / "run").glob("state*"))


def test_two_processes_cannot_train_in_one_folder(finetune, tmp_path, refused):
    (tmp_path / "run").mkdir()
    handle = lock(tmp_path / "run")
    assert "another process" in refused(finetune)
    os.close(handle)


def test_the_best_model_is_saved_and_a_run_without_progress_stops_early(fresh, finetune):
    """The training completions contradict the held-out ones, so the validation loss rises."""
    pairs = [("Well?", "Yes, it is.")] * 4 + [("Well?", "No, never, not at all.")] * 16
    stop = dict(max_steps=60, early_stopping_patience=2, validation_share=0.2)
    saved = finetune(pairs, learning_rate=1e-2, **stop)
    rows = read_jsonl(saved.parent / "metrics.jsonl")
    losses = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    best = min(losses, key=losses.get)
    assert saved.name == f"checkpoint-{best}" and rows[-1]["step"] == best + 2 * 3 < 60
    tokenizer, model = fresh()[0], AutoModelForCausalLM.from_pretrained(saved)
    heldout = supervised.encode_pairs(tokenizer, pairs[:4])
    loss = supervised.validation_loss(model, tokenizer, heldout, flags("nowhere"))
    assert_close(loss, losses[best])


def test_adapters_are_merged_into_a_plain_model(fresh, finetune):
    before = fresh()[1].state_dict()
    saved = finetune(lora_r=4, optimizer="muon")
    after = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj" in name}


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_learning_rate_rises_and_then_falls_to_nearly_zero(kind):
    args = flags("nowhere", max_steps=200, lr_scheduler_type=kind, warmup_ratio=0.1)
    rates = [supervised.schedule(step, args) for step in range(1, 201)]
    top = rates.index(max(rates))
    assert 15 <= top < 21 and rates[0] == 1 / 20 and rates[-1] < 0.01
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
    assert rates[150] < 0.2 if kind == "cosine" else rates[150] == 0.25


def test_texts_that_are_too_long_are_dropped_and_counted(fresh, finetune, capsys):
    tokenizer, model = fresh()
    lengths = sorted(sum(map(len, row)) for row in supervised.encode_pairs(tokenizer, PAIRS))
    longer = {limit: sum(length > limit for length in lengths) for limit in lengths}
    limit = lengths[-4]
    finetune(max_length=limit, max_steps=1)
    assert f"{longer[limit]} of 24 training texts have more than" in capsys.readouterr().out
    limit = model.config.max_position_embeddings = lengths[-2]
    finetune(model=model, max_length=5000, max_steps=1)
    assert f"{longer[limit]} of 24 training texts have more than" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        finetune(max_length=3, folder="none")
    assert "--max_length" in capsys.readouterr().err


def test_a_long_prompt_is_shortened_in_its_middle_and_nowhere_else(fresh):
    tokenizer, _ = fresh()

    def length(text):
        return len(tokenizer(chat_text(tokenizer, text), add_special_tokens=False)["input_ids"])

    middle = " ".join(f"{i} bakers live in Porto." for i in range(80))
    prompt, response = f"Summarize. {middle} In one sentence!", "Bakers live in Porto."
    whole = reward_prompt(prompt, response)
    assert fitting_prompt(tokenizer, prompt, response, length(whole)) == whole
    for limit in range(length(reward_prompt("", response)) + 20, length(whole), 97):
        text = fitting_prompt(tokenizer, prompt, response, limit)
        head, tail = text.removesuffix(reward_prompt("", response)).split(" [...] ")
        assert limit - 8 <= length(text) <= limit and 0.5 < len(head) / len(tail) < 2
        assert prompt.startswith(head) and prompt.endswith(tail)
    shortest = fitting_prompt(tokenizer, prompt, response, 3)
    assert shortest == reward_prompt(" [...] ", response), "the response is never shortened"
