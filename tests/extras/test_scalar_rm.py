"""The scalar reward model: what it learns, what it says whatever stands beside it in the batch, its way into a file and back."""

import argparse
import copy
import json
import random
import sys

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import extras.baselines.scalar_rm as train_scalar_rm
from extras.baselines import scalar_critic
from extras.baselines.scalar_rm import REGRESSION, agreement, collate, target
from t2g import cli, policy, supervised
from t2g.feedback import Feedback, reward_prompt
from t2g.log import METRICS, read_jsonl
from t2g.policy import Policy
from t2g.rollout import chat_text
from t2g.tasks import Example, toy

ARGS = argparse.Namespace(bf16=False, per_device_train_batch_size=2, max_grad_norm=1e9)


@pytest.fixture(scope="module")
def fresh():
    """The same tokenizer and small model with a head that is not zero, new at each call."""
    torch.manual_seed(0)
    tokenizer, model = toy.new_model(0)
    scorer = Policy(model).eval()
    torch.nn.init.normal_(scorer.value_head.weight)
    torch.nn.init.ones_(scorer.value_head.bias)
    return lambda: (tokenizer, copy.deepcopy(scorer))


def annotations(n):
    """Records as annotate.py writes them, of noisy summaries."""
    rng, records = random.Random(0), []
    for number in range(n):
        example = toy.make_example(rng)
        response = toy.noisy_summary(example, rng)
        said = toy.critique(example, response).plain()
        record = {
            "id": str(number),
            "prompt": example.prompt,
            "response": response,
            "critique": said.critique,
        }
        records.append(
            {
                **record,
                "good_spans": said.good,
                "poor_spans": said.poor,
                "status": "ok",
                "reason": "",
            }
        )
    return records


def rows_of(tokenizer, n=6):
    asked = [
        reward_prompt(record["prompt"][: 20 + 30 * i], record["response"])
        for i, record in enumerate(annotations(n))
    ]
    return [(*row, 0.5 * i - 1) for i, row in enumerate(scalar_critic.encode(tokenizer, asked))]


def test_the_target_is_good_tokens_minus_poor_tokens(tok):
    response = "Ana is 27, lives in Porto, and she is 27, misses a son."
    offsets = train_scalar_rm.token_offsets(
        tok, tok(response, add_special_tokens=False)["input_ids"]
    )

    def touching(start, end):
        return sum(a < end and b > start and a < b for a, b in offsets)

    city, age = (
        (response.index("Porto"), response.index("Porto") + 5),
        (response.rindex("27"), response.rindex("27") + 2),
    )
    assert target(tok, response, Feedback("", good=[" Porto"])) == touching(*city) > 0
    assert target(tok, response, Feedback("", poor=["27"])) == -touching(*age) < 0
    assert target(tok, response, Feedback("", good=[" Porto"], poor=["27"])) == touching(
        *city
    ) - touching(*age)
    assert target(tok, response, Feedback("Nothing to say.")) == 0


def test_a_score_is_read_off_the_last_token_whatever_stands_beside_it_in_the_batch(fresh):
    tokenizer, scorer = fresh()
    rows = rows_of(tokenizer)
    batch, *_ = collate(rows, tokenizer.pad_token_id, "cpu")
    together = scalar_critic.scores(scorer, batch)
    for (text, eos, _), score in zip(rows, together):
        assert eos == [tokenizer.eos_token_id]
        last = scorer.model(torch.tensor([text]), output_hidden_states=True).hidden_states[-1][
            0, -1
        ]
        assert_close(score, last @ scorer.value_head.weight[0] + scorer.value_head.bias[0])


def test_the_step_does_not_depend_on_how_the_texts_are_spread_over_microbatches(fresh):
    gradients, metrics = [], []
    for sizes in ([6], [1, 3, 2]):
        tokenizer, scorer = fresh()
        rows = iter(rows_of(tokenizer))
        microbatches = [
            collate([next(rows) for _ in range(size)], tokenizer.pad_token_id, "cpu")
            for size in sizes
        ]
        found = supervised.train_step(scorer, microbatches, ARGS, REGRESSION)
        metrics.append({name: found[name] for name in ("loss", "texts", "grad_norm")})
        gradients.append(
            torch.cat([p.grad.flatten() for p in scorer.parameters() if p.grad is not None])
        )
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4) and metrics[0]["texts"] == 6
    assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-3)


def test_agreement_of_known_scores(fresh, monkeypatch):
    tokenizer, scorer = fresh()
    rows = rows_of(tokenizer)
    mean = sum(row[2] for row in rows) / len(rows)

    def measured(change):
        monkeypatch.setattr(
            train_scalar_rm,
            "collate",
            lambda some, *_: (torch.tensor([row[2] for row in some]),) * 3,
        )
        monkeypatch.setattr(train_scalar_rm, "scores", lambda _, targets, bf16: change(targets))
        return agreement(scorer, tokenizer, rows, ARGS)

    assert measured(lambda s: s) == pytest.approx({"validation_r2": 1, "validation_rank": 1})
    assert measured(lambda s: 0 * s + mean) == pytest.approx({"validation_r2": 0})
    assert measured(lambda s: 2 * mean - s) == pytest.approx(
        {"validation_r2": -3, "validation_rank": -1}
    )


def test_it_learns_what_can_be_learnt(tmp_path):
    """Whether a response says yes or no: almost all of the variance after forty small steps."""
    torch.manual_seed(0)
    tokenizer, model = toy.new_model(0)
    words = random.Random(0).choices(["yes", "no"], k=200)
    rows = [
        (*row, 1.0 if word == "yes" else -1.0)
        for word, row in zip(words, scalar_critic.encode(tokenizer, words))
    ]
    flags = argparse.ArgumentParser()
    supervised.add_flags(cli.flags(flags))
    args = flags.parse_args([])
    vars(args).update(
        output_dir=str(tmp_path),
        seed=0,
        bf16=False,
        max_steps=40,
        learning_rate=3e-3,
        eval_steps=20,
    )
    supervised.train(
        Policy(model), tokenizer, rows[20:], rows[:20], args, tmp_path, "words", REGRESSION
    )
    found = read_jsonl(tmp_path / "metrics.jsonl")[-1]
    assert found["validation_r2"] > 0.95 and found["validation_rank"] > 0.8
    assert found["validation_loss"] < 0.05


# ---- the script and the critic -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(fresh, tmp_path_factory):
    """Four steps of the script on 40 annotations."""
    root = tmp_path_factory.mktemp("scalar")
    tokenizer, scorer = fresh()
    policy.save(scorer.model, tokenizer, root / "sft", 1, scorer.value_head)
    (root / "annotations.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in annotations(40))
    )
    flags = (
        "--max_steps",
        4,
        "--per_device_train_batch_size",
        4,
        "--eval_steps",
        2,
        "--learning_rate",
        1e-3,
    )
    with pytest.MonkeyPatch.context() as patch:
        command = [
            "train_scalar_rm.py",
            "--output_dir",
            root / "rm_scalar",
            "--validation_share",
            0.25,
            *flags,
        ]
        patch.setattr(sys, "argv", list(map(str, command)))
        train_scalar_rm.main()
    return root


def test_the_critic_speaks_in_the_unit_of_rewards_and_scores_as_in_training(run):
    """The R^2 of what it says of the held-out annotations is the one that was logged, of targets in another unit."""
    lines = read_jsonl(run / "rm_scalar" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and set().union(*lines) <= set(METRICS)
    best = min(
        (line for line in lines if "validation_loss" in line),
        key=lambda line: line["validation_loss"],
    )
    assert (run / "rm_scalar" / f"checkpoint-{best['step']}").is_dir()
    records = annotations(40)
    random.Random(0).shuffle(records)
    tokenizer, _ = scalar_critic.load(run / "rm_scalar")
    marks = [Feedback(r["critique"], r["good_spans"], r["poor_spans"]) for r in records[:10]]
    true = torch.tensor([target(tokenizer, r["response"], said) for r, said in zip(records, marks)])
    critic = scalar_critic.scalar_critic(run / "rm_scalar", "cpu", batch_size=3)
    said = torch.tensor(
        critic(
            [Example(r["prompt"], "", {}) for r in records[:10]],
            [r["response"] for r in records[:10]],
        )
    )
    r2 = 1 - (said - true).square().sum() / (true - true.mean()).square().sum()
    assert r2.item() == pytest.approx(best["validation_r2"], abs=1e-4)


def test_the_checkpoint_is_a_plain_model_that_says_what_its_head_means(run):
    (folder,) = (run / "rm_scalar").glob("checkpoint-*")
    assert (
        AutoModelForCausalLM.from_pretrained(folder).config.reward_unit == scalar_critic.REWARD_UNIT
    )


def test_what_is_no_scalar_reward_model_is_refused(run, capsys):
    """A policy has a value head too, but its V means something else."""
    with pytest.raises(SystemExit):
        scalar_critic.scalar_critic(run / "sft", "cpu")
    assert "is no scalar reward model" in capsys.readouterr().err


def test_a_long_prompt_is_shortened_and_a_response_that_is_too_long_even_so_counts_as_unreadable(
    run, capsys
):
    critic = scalar_critic.scalar_critic(run / "rm_scalar", "cpu")
    example, long = toy.make_example(random.Random(0)), " so it is" * 300
    examples, responses = (
        [example._replace(prompt=example.prompt + long), example],
        ["Ana is 27.", long],
    )
    tokenizer, _ = scalar_critic.load(run / "rm_scalar")
    assert (
        len(tokenizer(chat_text(tokenizer, reward_prompt(examples[0].prompt, "")))["input_ids"])
        > 512
    )
    capsys.readouterr()
    (shortened, too_long), _ = critic(examples, responses), critic(examples, responses)
    assert isinstance(shortened, float) and too_long is None
    assert "".join(capsys.readouterr()).count("1 of 2 responses do not fit") == 1


def test_annotations_that_say_nothing_end_in_one_sentence(run, monkeypatch, capsys, tmp_path):
    same = [{**record, "good_spans": [], "poor_spans": []} for record in annotations(3)]
    for records, sentence in (
        ([{"status": "failed"}], "no annotation to learn from"),
        (same, "have the same reward"),
    ):
        (tmp_path / "notes.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records)
        )
        flags = [
            "--model",
            run / "sft",
            "--annotations",
            tmp_path / "notes.jsonl",
            "--output_dir",
            tmp_path / "rm_scalar",
        ]
        monkeypatch.setattr(sys, "argv", list(map(str, ["train_scalar_rm.py", *flags])))
        with pytest.raises(SystemExit) as stopped:
            train_scalar_rm.main()
        assert stopped.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "rm_scalar").exists()
