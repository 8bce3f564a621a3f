"""Supervised training: the loss is on the completions alone, however they are batched; a stopped run goes on to the same bits."""

import argparse
import copy
import itertools
import json
import random

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from t2g import adapters, checkpoint, supervised
from t2g.critics import fitting_prompt
from t2g.feedback import reward_prompt
from t2g.log import read_jsonl
from t2g.policy import latest_checkpoint
from t2g.rollout import chat_text
from t2g.tasks import toy

RNG = random.Random(0)
EXAMPLES = [toy.make_example(RNG) for _ in range(24)]
PAIRS = [
    (e.prompt[: RNG.randrange(20, 200)], e.reference[: RNG.randrange(5, 90)]) for e in EXAMPLES
]


@pytest.fixture(scope="module")
def fresh():
    """A new copy of the same tokenizer and small model at each call."""
    torch.manual_seed(0)
    tokenizer, model = toy.new_model(0)
    return lambda: (tokenizer, copy.deepcopy(model))


def flags(folder, **given):
    """The flags of a script that trains, as the command line gives them, with small numbers."""
    parser = argparse.ArgumentParser()
    supervised.add_flags(parser.add_argument)
    args = parser.parse_args([])
    small = {"output_dir": str(folder), "seed": 0, "bf16": False, "max_steps": 8, "per_device_train_batch_size": 3,
             "learning_rate": 1e-3, "eval_steps": 3, "save_steps": 2}  # fmt: skip
    vars(args).update(small | given)
    return args


def test_the_loss_is_on_the_completion_alone_and_padding_changes_nothing(fresh):
    tokenizer, model = fresh()
    rows, args = supervised.encode_pairs(tokenizer, PAIRS[:6]), flags("nowhere")
    batch, learnt = supervised.as_rollout(rows, tokenizer.pad_token_id, "cpu")
    assert len({len(completion) for _, completion in rows}) > 2
    naive = 0.0
    for (prompt, completion), response, chosen in zip(rows, batch.response, learnt):
        assert response[chosen].tolist() == completion and completion[-1] == tokenizer.eos_token_id
        logprobs = (
            model(torch.tensor([prompt + completion]))
            .logits[0, len(prompt) - 1 : -1]
            .log_softmax(-1)
        )
        naive -= logprobs.gather(1, torch.tensor(completion)[:, None]).sum()
    assert_close(supervised.token_loss(model, batch, learnt, args), naive)


def test_accumulated_microbatches_give_the_gradient_of_one_batch(fresh):
    """Normalised by all tokens of the step: the mean of the microbatches' means would be another one."""
    gradients, losses = [], []
    for sizes in ([6], [1, 3, 2]):
        tokenizer, model = fresh()
        rows = iter(supervised.encode_pairs(tokenizer, PAIRS[:6]))
        parts = [[next(rows) for _ in range(size)] for size in sizes]
        microbatches = [
            supervised.as_rollout(part, tokenizer.pad_token_id, "cpu") for part in parts
        ]
        losses.append(supervised.train_step(model, microbatches, flags("nowhere"))["loss"])
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert_close(losses[0], losses[1])
    assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_every_pass_has_each_row_once_and_rows_of_like_length_go_together():
    lengths = [
        min(1500, int(random.Random(i).lognormvariate(6, 0.6))) for i in range(640)
    ]  # as those of news articles
    rows = [([i] * n, [i] * (1 + n // 7)) for i, n in enumerate(lengths)]
    batches = supervised.in_batches(rows, 8, seed=0)
    for _ in range(2):
        one_pass = [next(batches) for _ in range(80)]
        assert sorted(prompt[0] for batch in one_pass for prompt, _ in batch) == list(range(640))
        parts = [supervised.as_rollout(batch, 0, "cpu")[0] for batch in one_pass]
        places = [mask for part in parts for mask in (part.prompt_mask, part.mask)]
        assert 1 - sum(mask.sum() for mask in places) / sum(mask.numel() for mask in places) < 0.1


@pytest.mark.parametrize(
    "kind", [{}, {"optimizer": "muon"}, {"lora_r": 4, "gradient_accumulation_steps": 2}]
)
def test_a_stopped_run_goes_on_to_the_same_bits(fresh, tmp_path, monkeypatch, kind):
    def train(name):
        tokenizer, model = fresh()
        torch.manual_seed(3)
        return supervised.finetune(
            model, tokenizer, PAIRS, flags(tmp_path / "run", validation_share=0.2, **kind), name
        )

    saved = train("never stopped")
    (tmp_path / "run").rename(tmp_path / "whole")
    step = supervised.train_step
    for fatal in (3, 6):  # once after a state was written, once more in what was resumed
        calls = iter(range(1, 99))

        def stop(*args, fatal=fatal, calls=calls):
            return step(*args) if next(calls) < fatal else (_ for _ in ()).throw(KeyboardInterrupt)

        monkeypatch.setattr(supervised, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train("stopped")
    assert latest_checkpoint(tmp_path / "run") is None, (
        "a run that did not finish has no checkpoint"
    )
    monkeypatch.setattr(supervised, "train_step", step)
    again = train("resumed")
    whole = tmp_path / "whole" / saved.name
    assert again.name == saved.name and {p.name for p in again.parent.iterdir()} == {
        p.name for p in whole.parent.iterdir()
    }
    lines = [read_jsonl(run.parent / "metrics.jsonl") for run in (again, whole)]
    for line in itertools.chain(*lines):
        assert line.pop("seconds_update") > 0
    assert lines[0] == lines[1]
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def stopped(folder, model):
    """As if the run had been stopped after its step 5."""
    checkpoint.save(folder / "state.safetensors", model, step=5, best_step=0, best_loss=9.0)


@pytest.mark.parametrize("changed", ["flags", "data"])
def test_another_run_in_the_same_folder_begins_anew(fresh, tmp_path, changed):
    tokenizer, model = fresh()
    args = flags(tmp_path / "run")
    supervised.finetune(model, tokenizer, PAIRS, args, "first")
    stopped(tmp_path / "run", model)
    args = flags(tmp_path / "run", learning_rate=2e-3 if changed == "flags" else args.learning_rate)
    supervised.finetune(
        model, tokenizer, PAIRS if changed == "flags" else PAIRS[::-1], args, "second"
    )
    assert (tmp_path / "run.1").is_dir() and len(
        read_jsonl(tmp_path / "run" / "metrics.jsonl")
    ) == args.max_steps


def test_a_run_that_was_killed_after_its_checkpoint_can_be_finished(fresh, tmp_path):
    tokenizer, model = fresh()
    saved = supervised.finetune(model, tokenizer, PAIRS, flags(tmp_path / "run"), "first")
    stopped(tmp_path / "run", model)
    assert supervised.finetune(model, tokenizer, PAIRS, flags(tmp_path / "run"), "again") == saved
    assert (
        len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 8
        and not (tmp_path / "run" / "state.safetensors").exists()
    )


def test_two_processes_do_not_train_in_one_folder(fresh, tmp_path, capsys):
    tokenizer, model = fresh()
    (tmp_path / "run").mkdir()
    with checkpoint.held(tmp_path / "run"), pytest.raises(SystemExit):
        supervised.finetune(model, tokenizer, PAIRS, flags(tmp_path / "run"), "second")
    assert "another process trains in" in capsys.readouterr().err


def test_no_text_is_longer_than_the_model_s_context(fresh, tmp_path, capsys):
    tokenizer, model = fresh()
    model.config.max_position_embeddings = sorted(
        sum(map(len, row)) for row in supervised.encode_pairs(tokenizer, PAIRS)
    )[-2]
    supervised.finetune(
        model, tokenizer, PAIRS, flags(tmp_path / "run", max_length=5000, max_steps=1), "long"
    )
    assert "1 of 24 training texts have more than" in capsys.readouterr().out


def test_the_best_model_is_saved_and_a_run_without_progress_stops_early(fresh, tmp_path):
    """Completions of the training pairs that say the opposite of the held-out ones: the validation loss can only rise."""
    tokenizer, model = fresh()
    pairs = [("Well?", "Yes, it is.")] * 4 + [("Well?", "No, never, not at all.")] * 16
    args = flags(
        tmp_path / "run",
        validation_share=0.2,
        max_steps=60,
        learning_rate=1e-2,
        early_stopping_patience=2,
    )
    saved = supervised.finetune(model, tokenizer, pairs, args, "overfits")
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    losses = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    best = min(losses, key=losses.get)
    assert (
        saved.name == f"checkpoint-{best}"
        and rows[-1]["step"] == best + 2 * args.eval_steps < args.max_steps
    )
    heldout = supervised.encode_pairs(tokenizer, pairs[:4])
    assert_close(
        supervised.validation_loss(
            AutoModelForCausalLM.from_pretrained(saved), tokenizer, heldout, args
        ),
        losses[best],
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_adapters_are_merged_into_a_plain_model(fresh, tmp_path, optimizer):
    tokenizer, model = fresh()
    before = copy.deepcopy(model.state_dict())
    saved = supervised.finetune(
        model, tokenizer, PAIRS, flags(tmp_path / "run", lora_r=4, optimizer=optimizer), "adapters"
    )
    after = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj" in name}, (
        "LoRA trains the linear layers of the blocks"
    )


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_learning_rate_rises_and_falls_to_nearly_nothing(kind):
    args = flags("nowhere", max_steps=200, lr_scheduler_type=kind, warmup_ratio=0.1)
    rates = [supervised.schedule(step, args) for step in range(1, 201)]
    top = rates.index(max(rates))
    assert (
        15 <= top < 21
        and rates[: top + 1] == sorted(rates[: top + 1])
        and rates[top:] == sorted(rates[top:], reverse=True)
    )
    assert (
        rates[0] == 1 / 20
        and rates[-1] < 0.01
        and (rates[150] < 0.2 if kind == "cosine" else rates[150] == 0.25)
    )


def test_texts_that_are_too_long_are_left_out_and_counted(fresh, tmp_path, capsys):
    tokenizer, model = fresh()
    limit = sorted(sum(map(len, row)) for row in supervised.encode_pairs(tokenizer, PAIRS))[-3]
    supervised.finetune(
        model, tokenizer, PAIRS, flags(tmp_path / "run", max_length=limit, max_steps=1), "some"
    )
    assert f"2 of 24 training texts have more than {limit} tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        supervised.finetune(model, tokenizer, PAIRS, flags(tmp_path / "none", max_length=3), "none")
    assert "no training text of at most 3 tokens" in capsys.readouterr().err


def test_a_state_that_is_broken_or_of_another_model_is_refused(fresh, tmp_path, capsys):
    _, model = fresh()
    path = tmp_path / "state.safetensors"
    checkpoint.save(path, model, step=1)
    assert checkpoint.load(path, model) == {"step": 1}
    with pytest.raises(SystemExit):
        checkpoint.load(path, adapters.added(model, flags("nowhere", lora_r=2)))
    assert "belongs to another model" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SystemExit):
        checkpoint.load(path, fresh()[1])
    assert "is no state of a run" in capsys.readouterr().err


def test_a_long_prompt_is_shortened_in_its_middle_and_nowhere_else(fresh):
    tokenizer, _ = fresh()

    def length(text):
        return len(tokenizer(chat_text(tokenizer, text), add_special_tokens=False)["input_ids"])

    prompt = (
        "Summarize. "
        + " ".join(f"{i} bakers live in Porto." for i in range(80))
        + " In one sentence!"
    )
    response = "Bakers live in Porto."
    whole = reward_prompt(prompt, response)
    assert fitting_prompt(tokenizer, prompt, response, length(whole)) == whole
    for limit in range(length(reward_prompt("", response)) + 20, length(whole), 97):
        asked = fitting_prompt(tokenizer, prompt, response, limit)
        head, tail = asked.removesuffix(reward_prompt("", response)).split(" [...] ")
        assert limit - 8 <= length(asked) <= limit and 0.5 < len(head) / len(tail) < 2
        assert prompt.startswith(head) and prompt.endswith(tail)
    assert fitting_prompt(tokenizer, prompt, response, 3) == reward_prompt(" [...] ", response), (
        "never the response"
    )


def test_a_run_writes_the_flags_that_it_was_given(fresh, tmp_path):
    tokenizer, model = fresh()
    supervised.finetune(model, tokenizer, PAIRS, flags(tmp_path / "run", max_steps=1), "one step")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["learning_rate"] == 1e-3
