"""DPO: the loss against its formula, its gradient and what it must not depend on; pairs; the script in two steps."""

import argparse
import copy
import json
import math
import random
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import extras.baselines.dpo as train_dpo
from extras.baselines.dpo import (
    add_references,
    best_and_worst,
    collate,
    dpo_loss,
    encode,
    preference_loss,
    sequence_logprobs,
)
from extras.baselines.offline import Scored
from t2g import policy, supervised
from t2g.log import METRICS, read_jsonl
from t2g.tasks import toy

RNG = random.Random(0)
PAIRS = [
    {
        "prompt": e.prompt[: 30 + 5 * n],
        "chosen": e.reference[: 20 + 3 * n],
        "rejected": toy.noisy_summary(e, RNG)[: 45 - 2 * n],
    }
    for n, e in enumerate(toy.make_example(RNG) for _ in range(6))
]
ARGS = argparse.Namespace(beta=0.3, bf16=False, per_device_train_batch_size=2, max_grad_norm=1e9)


@pytest.fixture(scope="module")
def fresh():
    """A new copy of the same tokenizer and small model at each call."""
    torch.manual_seed(0)
    tokenizer, model = toy.new_model(0)
    return lambda: (tokenizer, copy.deepcopy(model).eval())


# ---- the loss ----------------------------------------------------------------------------------------------------------

nats = st.floats(-300, 0, allow_nan=False)


def loss_of(*numbers, beta):
    losses, stats = dpo_loss(
        *(torch.tensor([number], dtype=torch.float64) for number in numbers), beta
    )
    return losses.item(), stats


@given(nats, nats, st.floats(0.01, 2))
def test_a_policy_that_is_its_reference_loses_log_2_on_every_pair(chosen, rejected, beta):
    loss, stats = loss_of(chosen, rejected, chosen, rejected, beta=beta)
    assert loss == pytest.approx(math.log(2)) and stats == {"pair_margin": 0, "pair_accuracy": 0}


@given(nats, nats, nats, nats, st.floats(0.01, 2))
def test_the_loss_is_that_of_the_paper_as_others_write_it(
    chosen, rejected, ref_chosen, ref_rejected, beta
):
    """As log(1 + e^-h) with h the difference of two log ratios between the responses, the policy's and the reference's."""
    h = beta * ((chosen - rejected) - (ref_chosen - ref_rejected))
    loss, stats = loss_of(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    assert loss == pytest.approx(max(-h, 0) + math.log1p(math.exp(-abs(h))), abs=1e-9)
    assert stats["pair_margin"] == pytest.approx(h, abs=1e-9)


def test_known_values():
    assert loss_of(-5, -9, -6, -8, beta=0.5)[0] == pytest.approx(
        0.31326168751822286
    )  # log(1 + e^-1)
    assert loss_of(-9, -5, -8, -6, beta=0.5)[0] == pytest.approx(1.3132616875182228)  # log(1 + e)
    losses, stats = dpo_loss(
        *torch.tensor([[-5.0, -9.0], [-9.0, -5.0], [-6.0, -8.0], [-8.0, -6.0]]), 0.5
    )
    assert_close(losses, torch.tensor([0.3132617, 1.3132617]))
    assert (stats["pair_margin"], stats["pair_accuracy"]) == (0, 0.5)


@given(nats, nats, nats, nats, st.floats(-50, 50))
def test_only_the_change_against_the_reference_counts(
    chosen, rejected, ref_chosen, ref_rejected, constant
):
    loss = loss_of(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)[0]
    for moved in (
        (chosen + constant, rejected, ref_chosen + constant, ref_rejected),
        (chosen, rejected + constant, ref_chosen, ref_rejected + constant),
        (chosen + constant, rejected + constant, ref_chosen, ref_rejected),
    ):
        assert loss_of(*moved, beta=0.1)[0] == pytest.approx(loss, abs=1e-9)


def test_a_step_down_the_gradient_raises_the_chosen_and_lowers_the_rejected_the_more_the_wronger_the_pair():
    inputs = torch.tensor(
        [[-5.0, -5.0], [-9.0, -9.0], [-6.0, -1.0], [-8.0, -9.0]], requires_grad=True
    )
    dpo_loss(*inputs, beta=0.5)[0].sum().backward()
    weight = 0.5 * torch.tensor([-1.0, 2.0]).sigmoid()  # beta sigmoid(-h)
    assert_close(inputs.grad, torch.stack([-weight, weight, weight, -weight]))


# ---- log-probabilities of whole responses -------------------------------------------------------------------------------


def naive_logprob(model, prompt, response):
    logprobs = (
        model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    )
    return logprobs.gather(1, torch.tensor(response)[:, None]).sum()


def test_cached_references_are_those_of_each_response_alone(fresh):
    tokenizer, model = fresh()
    rows = encode(tokenizer, PAIRS)
    found = add_references(rows, tokenizer, model, ARGS)
    assert [row[:3] for row in found] == rows and len({len(row[1]) for row in rows}) > 2
    for prompt, chosen, rejected, *references in found:
        assert_close(
            torch.tensor(references),
            torch.stack([naive_logprob(model, prompt, y) for y in (chosen, rejected)]).detach(),
        )


def test_the_end_is_learnt_of_responses_that_ended_and_of_no_other(fresh):
    tokenizer, _ = fresh()
    (_, chosen, rejected) = encode(tokenizer, [{**PAIRS[0], "rejected_finished": False}])[0]
    assert chosen[-1] == tokenizer.eos_token_id != rejected[-1]
    assert tokenizer.decode(rejected) == PAIRS[0]["rejected"]


def test_the_step_does_not_depend_on_how_the_pairs_are_spread_over_microbatches(fresh):
    gradients, metrics = [], []
    for sizes in ([6], [1, 3, 2]):
        tokenizer, model = fresh()
        rows = [
            (*row[:3], row[3] + n, row[4])
            for n, row in enumerate(add_references(encode(tokenizer, PAIRS), *fresh(), ARGS))
        ]
        rows = iter(
            rows
        )  # references that differ from the policy, so that the pairs weigh differently
        microbatches = [
            collate([next(rows) for _ in range(size)], tokenizer.pad_token_id, "cpu")
            for size in sizes
        ]
        found = supervised.train_step(model, microbatches, ARGS, train_dpo.PREFERENCE)
        metrics.append(
            {
                name: found[name]
                for name in ("loss", "pairs", "pair_margin", "pair_accuracy", "grad_norm")
            }
        )
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4) and metrics[0]["pairs"] == 6
    assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_training_prefers_the_chosen(fresh):
    tokenizer, model = fresh()
    batch = collate(
        add_references(encode(tokenizer, PAIRS), tokenizer, model, ARGS),
        tokenizer.pad_token_id,
        "cpu",
    )
    before = sequence_logprobs(model, *batch[:2]).detach().chunk(2)
    preference_loss(model, *batch, ARGS)[0].backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-4 * p.grad
    after = sequence_logprobs(model, *batch[:2]).detach().chunk(2)
    assert ((after[0] - before[0]) - (after[1] - before[1])).sum() > 0
    assert preference_loss(model, *batch, ARGS)[1]["pair_accuracy"] > 3


def test_a_policy_that_is_not_its_reference_at_the_start_is_an_error(fresh):
    tokenizer, model = fresh()
    rows = add_references(encode(tokenizer, PAIRS), tokenizer, model, ARGS)
    train_dpo.check_start(model, rows, tokenizer, ARGS)
    with pytest.raises(RuntimeError, match="must agree"):
        train_dpo.check_start(
            model, [(*rows[0][:3], rows[0][3] + 0.1, rows[0][4])], tokenizer, ARGS
        )


# ---- pairs -------------------------------------------------------------------------------------------------------------


def test_the_best_is_preferred_to_the_worst_and_what_gives_no_pair_is_counted(capsys):
    example = toy.make_example(random.Random(1))

    def group(*rewards, text=str):
        return [Scored(example, text(reward), reward != -7, None, reward) for reward in rewards]

    groups = [
        group(1, 3, -7, 2),
        group(None, 2, 2, 2),
        group(None, 4, None, None),
        group(1, 2, text=lambda _: "same"),
    ]
    pairs, dropped = best_and_worst(groups)
    (pair,) = pairs
    assert pair == {"prompt": example.prompt, "chosen": "3", "chosen_reward": 3, "chosen_finished": True,
                    "rejected": "-7", "rejected_reward": -7, "rejected_finished": False}  # fmt: skip
    assert dropped == {"ties": 0.5, "unpaired": 0.25}
    assert (
        "4 prompts: 1 pairs, 2 ties, 1 with too few readable critiques" in capsys.readouterr().out
    )


# ---- the script ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch):
    """Runs the script's main() in this process."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["train_dpo.py", *map(str, flags)])
        train_dpo.main()

    return run


def test_two_steps_on_the_toy_and_again_from_the_pairs_of_that_run(call, fresh, tmp_path):
    tokenizer, model = fresh()
    policy.save(model, tokenizer, tmp_path / "sft", 1)
    sampling = (
        "--critic",
        "rule",
        "--num_prompts",
        6,
        "--samples_per_prompt",
        3,
        "--response_length",
        12,
    )
    training = (
        "--max_steps",
        2,
        "--per_device_train_batch_size",
        2,
        "--learning_rate",
        1e-3,
        "--beta",
        0.2,
    )
    call("--output_dir", tmp_path / "dpo", *sampling, *training)
    lines = read_jsonl(tmp_path / "dpo" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2] and set(lines[0]) <= set(METRICS)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and lines[0][
        "pair_margin"
    ] == pytest.approx(0, abs=1e-4)
    [stats] = json.loads((tmp_path / "dpo" / "sampling.json").read_text())
    assert set(stats) >= {
        "ties",
        "unpaired",
        "unparsable",
        "seconds_rollout",
    }
    pairs = read_jsonl(tmp_path / "dpo" / "pairs.jsonl")
    assert pairs and all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
    call("--output_dir", tmp_path / "again", "--pairs", tmp_path / "dpo" / "pairs.jsonl", *training)
    weights = [
        (tmp_path / name / "checkpoint-2" / "model.safetensors").read_bytes()
        for name in ("dpo", "again")
    ]
    assert weights[0] == weights[1]


def test_flags_and_pairs_of_no_use_end_in_one_sentence(call, capsys, fresh, tmp_path):
    tokenizer, model = fresh()
    policy.save(model, tokenizer, tmp_path / "sft", 1)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "half.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    for flags, sentence in (
        (("--samples_per_prompt", 1), "must be at least 2"),
        (("--pairs", tmp_path / "empty.jsonl"), "holds no pair"),
        (("--pairs", tmp_path / "half.jsonl"), "record 1 of"),
        (
            (
                "--critic",
                "rule",
                "--num_prompts",
                1,
                "--samples_per_prompt",
                2,
                "--response_length",
                1,
            ),
            "gives a pair",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            call("--output_dir", tmp_path / "dpo", *flags)
        assert stopped.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "dpo").exists()
