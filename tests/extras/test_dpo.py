"""DPO: the loss by identities, log-probabilities by brute force, pairs, and the command."""

import json
import math
import random

import pytest
import torch
from forking import output
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from toys import STEP, check_splits, naive_logprobs, noisy_examples
from transformers import GPT2Config, GPT2LMHeadModel

from extras.baselines import dpo
from extras.baselines.common import Scored
from t2g import policy
from t2g.log import read_jsonl
from t2g.tasks import toy

PAIRS = [
    {"prompt": e.prompt[: 30 + 5 * n], "chosen": e.reference[: 20 + 3 * n], "rejected": y[: 45 - n]}
    for n, (e, y) in enumerate(noisy_examples(random.Random(0), 6))
]
nats = st.floats(-300, 0)


def loss_of(*numbers, beta):
    tensors = [torch.tensor([number], dtype=torch.float64) for number in numbers]
    losses, stats = dpo.dpo_loss(*tensors, beta)
    return losses.item(), stats


@given(nats, nats, nats, nats, st.floats(0.01, 2), st.floats(-50, 50))
def test_the_loss_is_log_1_plus_exp_of_minus_the_margin(y, z, ref_y, ref_z, beta, constant):
    h = beta * ((y - z) - (ref_y - ref_z))
    loss, stats = loss_of(y, z, ref_y, ref_z, beta=beta)
    assert loss == pytest.approx(max(-h, 0) + math.log1p(math.exp(-abs(h))), abs=1e-9)
    assert stats["pair_margin"] == pytest.approx(h, abs=1e-9)
    moved = loss_of(y + constant, z, ref_y + constant, ref_z, beta=beta)[0]
    assert moved == pytest.approx(loss, abs=1e-9), "only the change against the reference counts"
    assert loss_of(y, z, y, z, beta=beta)[0] == pytest.approx(math.log(2))


def test_the_gradient_weights_a_pair_by_how_wrong_it_is():
    logprobs = [[-5.0, -5.0], [-9.0, -9.0], [-6.0, -1.0], [-8.0, -9.0]]
    inputs = torch.tensor(logprobs, requires_grad=True)
    dpo.dpo_loss(*inputs, beta=0.5)[0].sum().backward()
    weight = 0.5 * torch.tensor([-1.0, 2.0]).sigmoid()  # beta sigmoid(-h)
    assert_close(inputs.grad, torch.stack([-weight, weight, weight, -weight]))


def referenced(tokenizer, model):
    return dpo.add_references(dpo.encode(tokenizer, PAIRS), tokenizer, model, STEP)


def test_references_are_the_log_probabilities_of_each_response_alone(fresh):
    tokenizer, model = fresh()
    rows = referenced(tokenizer, model)
    assert len({len(row[1]) for row in rows}) > 2
    for prompt, chosen, rejected, *references in rows:
        naive = [naive_logprobs(model, prompt, y).sum() for y in (chosen, rejected)]
        assert_close(torch.tensor(references), torch.stack(naive).detach())


def test_no_split_into_microbatches_changes_the_step(fresh):
    def rows(tokenizer, model):  # with margins that are not 0
        rows = enumerate(referenced(tokenizer, model), 1)
        return [[p, y, z, log_y + n / 5, log_z] for n, (p, y, z, log_y, log_z) in rows]

    check_splits(fresh, rows, dpo.PREFERENCE)


def test_eos_is_learned_after_finished_responses_only(fresh):
    tokenizer, _ = fresh()
    [[_, chosen, rejected]] = dpo.encode(tokenizer, [{**PAIRS[0], "rejected_finished": False}])
    assert chosen[-1] == tokenizer.eos_token_id != rejected[-1]
    assert tokenizer.decode(rejected) == PAIRS[0]["rejected"]


def test_the_best_response_is_preferred_to_the_worst_and_dropped_prompts_are_counted():
    example = toy.make_example(random.Random(1))

    def group(*rewards, text=str):
        return [Scored(example, text(reward), reward != -7, None, reward) for reward in rewards]

    same_text = group(1, 2, text=lambda _: "same")
    groups = [group(1, 3, -7, 2), group(None, 2, 2), group(None, 4, None), same_text]
    [pair], dropped = dpo.best_and_worst(groups)
    chosen = {"chosen": "3", "chosen_reward": 3, "chosen_finished": True}
    rejected = {"rejected": "-7", "rejected_reward": -7, "rejected_finished": False}
    assert pair == {"prompt": example.prompt, **chosen, **rejected}
    assert dropped == {"ties": 0.5, "unpaired": 0.25}


def test_two_steps_of_the_command_and_again_from_its_pairs(tmp_path, untrained):
    sampling = "--critic rule --num_prompts 6 --samples_per_prompt 3 --response_length 12"
    training = "--max_steps 2 --per_device_train_batch_size 2 --learning_rate 1e-3 --beta 0.2"
    training += f" --policy {untrained}"
    output(f"extras.baselines.dpo {sampling} {training} --output_dir {tmp_path}/dpo")
    lines = read_jsonl(tmp_path / "dpo" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    [stats] = json.loads((tmp_path / "dpo" / "sampling.json").read_text())
    assert set(stats) >= {"ties", "unpaired", "unparsable", "seconds_rollout"}
    pairs = tmp_path / "dpo" / "pairs.jsonl"
    assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in read_jsonl(pairs))
    output(f"extras.baselines.dpo {training} --output_dir {tmp_path}/again --pairs {pairs}")
    names = [tmp_path / name / "checkpoint-2" / "model.safetensors" for name in ("dpo", "again")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_dropout_does_not_part_policy_and_reference(fresh, tmp_path):
    """At step 1 they are equal, so the margin is 0, which GPT-2's dropout of 0.1 would move."""
    tokenizer, _ = fresh()
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    shape = dict(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, bos_token_id=None)
    policy.save(GPT2LMHeadModel(GPT2Config(**shape, **ids)), tokenizer, tmp_path / "sft", 1)
    pairs = [PAIRS[0] | {"chosen": "half an emoji \ud83d"}, PAIRS[1]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    flags = "--max_steps 1 --per_device_train_batch_size 2 --validation_share 0"
    paths = f"--output_dir {tmp_path}/dpo --pairs {tmp_path}/pairs.jsonl"
    output(f"extras.baselines.dpo {flags} {paths}")
    [line] = read_jsonl(tmp_path / "dpo" / "metrics.jsonl")
    assert line["pair_margin"] == pytest.approx(0, abs=1e-5)
    assert read_jsonl(tmp_path / "dpo" / "pairs.jsonl")[0]["chosen"] == "half an emoji ?"
