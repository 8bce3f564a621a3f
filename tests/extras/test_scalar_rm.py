"""The scalar reward model: its targets, its scores, what it learns, and the critic in PPO."""

import argparse
import copy
import random
from functools import partial

import pytest
import torch
from annotating import annotated
from forking import output
from torch.testing import assert_close
from toys import check_splits, noisy_examples, scorer_of

from extras.baselines import scalar_rm
from extras.baselines.common import text_reward
from t2g import policy
from t2g.align import token_offsets
from t2g.feedback import Feedback
from t2g.log import read_jsonl
from t2g.notes import write_whole
from t2g.tasks import Example, toy


@pytest.fixture(scope="module")
def fresh(fresh):
    """Returns the tokenizer and a new copy of a scorer at each call."""
    tokenizer, model = fresh()
    return lambda: (tokenizer, scorer_of(copy.deepcopy(model)))


def annotations(n):
    """Returns records of noisy summaries as annotate.py writes them."""
    records = []
    for number, (example, response) in enumerate(noisy_examples(random.Random(0), n)):
        said, more = toy.critique(example, response).plain(), {"status": "ok", "reason": ""}
        records.append(annotated(example.prompt, response, said, id=str(number), **more))
    return records


def rows_of(tokenizer, n=6):
    records = annotations(n)
    prompts = [record["prompt"][: 20 + 30 * i] for i, record in enumerate(records)]
    responses = [record["response"] for record in records]
    ids = scalar_rm.encode(tokenizer, prompts, responses, limit=512)
    return [(*row, 0.5 * i - 1) for i, row in enumerate(ids)]


def test_the_target_is_good_tokens_minus_poor_tokens(tok):
    response = "Ana is 27, lives in Porto, and she is 27, misses a son."
    offsets = token_offsets(tok, tok(response, add_special_tokens=False)["input_ids"])

    def tokens(quote):
        start = response.rindex(quote)
        return sum(a < start + len(quote) and b > start and a < b for a, b in offsets)

    for good, poor in ((["Porto"], []), ([], ["27"]), (["Porto"], ["27"]), ([], [])):
        expected = sum(map(tokens, good)) - sum(map(tokens, poor))
        assert text_reward(tok, response, Feedback("", good, poor)) == expected
    porto, plain = Feedback("", [" Porto"]), "Ana is 27, lives in Porto"
    control = plain.replace(",", f"{tok.eos_token},")  # a token that decoding leaves out
    assert text_reward(tok, control, porto) == text_reward(tok, plain, porto) > 0
    assert text_reward(tok, response, 0.5) == 0.5 and text_reward(tok, response, None) == 0


def test_a_score_is_read_after_the_last_token_whatever_else_is_in_the_batch(fresh):
    tokenizer, scorer = fresh()
    rows = rows_of(tokenizer)
    batch, *_ = scalar_rm.collate(rows, tokenizer.pad_token_id, "cpu")
    head = scorer.value_head
    for (text, eos, _), score in zip(rows, scalar_rm.scores(scorer, batch)):
        assert eos == [tokenizer.eos_token_id]
        states = scorer.model(torch.tensor([text]), output_hidden_states=True).hidden_states[-1]
        assert_close(score, states[0, -1] @ head.weight[0] + head.bias[0])


def test_no_split_into_microbatches_changes_the_step(fresh):
    check_splits(fresh, lambda tokenizer, scorer: rows_of(tokenizer), scalar_rm.REGRESSION)


@pytest.fixture(scope="module")
def root(fresh, tmp_path_factory):
    """Four steps of the command on 40 annotations."""
    root = tmp_path_factory.mktemp("scalar")
    tokenizer, scorer = fresh()
    policy.save(scorer.model, tokenizer, root / "sft", 1, scorer.value_head)
    write_whole(root / "annotations.jsonl", annotations(40))
    training = "--max_steps 4 --per_device_train_batch_size 4 --eval_steps 2 --learning_rate 1e-3"
    training += f" --validation_share 0.25 --output_dir {root}/rm_scalar"
    output(f"extras.baselines.scalar_rm {training}")
    return root


def critic_of(root, **changed):
    args = dict(reward_model=None, output_dir=root / "ppo", bf16=False) | changed
    return scalar_rm.critic(toy, argparse.Namespace(**args), batch_size=3)


def test_the_critic_gives_rewards_and_its_error_is_the_one_of_training(root):
    lines = read_jsonl(root / "rm_scalar" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    best = min(line["validation_loss"] for line in lines if "validation_loss" in line)
    records = annotations(40)
    random.Random(0).shuffle(records)
    tokenizer, _ = scalar_rm.load(root / "rm_scalar")
    targets = []
    for record in records:
        feedback = Feedback(record["critique"], record["good_spans"], record["poor_spans"])
        targets.append(text_reward(tokenizer, record["response"], feedback))
    heldout, targets = records[:10], torch.tensor(targets)
    examples = [Example(record["prompt"], "", {}) for record in heldout]
    scores = critic_of(root)(examples, [record["response"] for record in heldout])
    error = (torch.tensor(scores) - targets[:10]).square().mean()
    assert (error / targets.var(correction=0)).item() == pytest.approx(best, rel=1e-4)


def test_train_ppo_takes_the_critic_by_its_path(root):
    flags = "--per_device_train_batch_size 2 --max_steps 1 --response_length 6 --eval_samples 1"
    critic = "--critic extras/baselines/scalar_rm.py"
    output(f"train_ppo {critic} {flags} --output_dir {root}/ppo")
    [line] = read_jsonl(root / "ppo" / "metrics.jsonl")
    assert line["unparsable"] == 0 and line["reward"] != 0


def test_other_models_are_refused(root, refused):
    """The value head of a policy has another meaning."""
    load = partial(critic_of, root, reward_model=root / "sft")
    assert "is no scalar reward model" in refused(load)


def test_a_long_prompt_is_shortened_and_a_long_response_is_unreadable(root):
    example, long = toy.make_example(random.Random(0)), " so it is" * 300
    examples = [example._replace(prompt=example.prompt + long), example]
    shortened, too_long = critic_of(root)(examples, ["Ana is 27.", long])
    assert isinstance(shortened, float) and too_long is None
