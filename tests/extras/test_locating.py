"""The bench that asks where locating pays: its task, its critic's limit on marks, and the whole of it in short."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extras.studies import locating
from t2g import tasks
from t2g.align import resolve, span_rewards, token_offsets
from t2g.feedback import quoted

ARGS = SimpleNamespace(seed=0, max_steps=1, per_device_train_batch_size=6)


def lists(spans="all"):
    """The task, and an example of each of six prompts with a list as the starting policy learns to write it."""
    task = locating.task(spans, [50, 150])
    by_prompt = {example.prompt: example for example in task.load(ARGS)[0]}
    return task, [
        (by_prompt[prompt], response)
        for prompt, response in task.sft_pairs(ARGS, list(by_prompt.values()))
    ]


def test_the_task_has_what_a_task_must_have():
    task, pairs = lists()
    train, heldout = task.load(ARGS)
    assert {example.prompt for example in train} == {example.prompt for example in heldout}
    for example, response in pairs:
        assert set(task.score(example, response)) == set(task.METRICS)
        assert task.score(example, response)["items"] == int(example.prompt.split()[1])


def test_right_items_are_those_of_the_word_in_their_place_and_no_further():
    task, [(example, _), *_] = lists()
    key, asked = example.prompt.split()
    right = [
        f"{example.facts[key, place % locating.SLOTS][0]} {place}"
        for place in range(1, int(asked) + 1)
    ]
    assert task.score(example, " ".join(right)) == {"right": 1, "items": int(asked)}
    assert task.score(example, " ".join(right[: int(asked) // 2]))["right"] < 0.5
    behind = f"{example.facts[key, (int(asked) + 1) % locating.SLOTS][0]} {int(asked) + 1}"
    assert not task.critique(example, " ".join([*right, behind])).good[int(asked) :]
    assert task.score(example, " ".join(right[1:]))["right"] == 0
    assert task.score(example, "")["right"] == 0 and not task.critique(example, "").poor


@pytest.mark.parametrize("spans", ["1", "3", "60", "all"])
def test_so_many_items_are_marked_and_all_quotes_are_found_where_they_stand(spans):
    task, pairs = lists(spans)
    for example, response in pairs:
        asked, feedback = int(example.prompt.split()[1]), task.critique(example, response)
        count = asked if spans == "all" else min(int(spans), asked)
        found, counts = resolve(response, feedback, severities=True)
        assert len(found) == count and counts["exact"] == count and counts["ambiguous"] == 0
        judged = {(start, end): right for start, end, right in locating.judged(example, response)}
        assert all(judged[start, end] == (score > 0) for start, end, score in found)
        assert sum(abs(score) for *_, score in found) == pytest.approx(1)
        assert task.critique(example, response) == feedback


words = st.sampled_from([*locating.WORDS[:3], *locating.KEYS[:1], *map(str, range(1, 6))])


@given(st.lists(words, max_size=40))
def test_any_text_can_be_criticised_and_its_quotes_stand_in_it(text):
    task, [(example, _), *_] = lists("8")
    response = " ".join(text)
    feedback = task.critique(example, response)
    assert len(feedback.good) + len(feedback.poor) <= 8
    assert all(quoted(quote)[0] in response for quote in [*feedback.good, *feedback.poor])


def test_a_mark_is_two_tokens_and_a_number_is_one():
    task, pairs = lists("3")
    tokenizer, _ = task.new_model(0)
    for example, response in pairs:
        ids = tokenizer(response, add_special_tokens=False)["input_ids"]
        assert len(ids) == 2 * int(example.prompt.split()[1]) and tokenizer.unk_token_id not in ids
        spans, _ = resolve(response, task.critique(example, response), severities=True)
        rewards = span_rewards(token_offsets(tokenizer, ids), spans, "severity")
        assert (rewards != 0).sum() == 6 and rewards.abs().sum().item() == pytest.approx(2)


def test_a_starting_policy_is_wrong_at_the_rates_of_its_habits():
    example = locating.task("all", [400]).load(ARGS)[0][0]
    args = SimpleNamespace(seed=0, max_steps=1, per_device_train_batch_size=100)
    right = [
        locating.score(example, text)["right"] for _, text in locating.sft_pairs(args, [example])
    ]
    rates = [example.facts[example.prompt.split()[0], slot][2] for slot in range(locating.SLOTS)]
    assert sum(right) / len(right) == pytest.approx(sum(rates) / len(rates), abs=0.02)
    assert locating.habits(0) == locating.habits(0) != locating.habits(1)


def test_curves_are_compared_at_the_lower_of_the_final_kls(monkeypatch):
    curves = {"span": ([0, 2, 4], [0.5, 0.7, 0.9]), "scalar": ([0, 1, 2], [0.5, 0.55, 0.6])}

    def read(cell, args):
        curve = curves[cell.reward]
        return dict(
            before=0.5, after=curve[1][-1], mended=0.0, kl=curve[0][-1], items=25, curve=curve
        )

    monkeypatch.setattr(locating, "read", read)
    found = locating.compare(50, "2", {"span": 1e-3, "scalar": 1e-3}, SimpleNamespace(seeds=[0, 1]))
    assert found["gain"]["mean"] == pytest.approx(0.3) and found["gain at equal KL"][
        "mean"
    ] == pytest.approx(0.1)


@pytest.mark.slow
def test_the_bench_in_short_ends_with_json_and_a_plot_and_runs_nothing_twice(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tasks, "get", tasks.get)  # the bench puts its own in its place
    flags = ["--quick", "--output_dir", str(tmp_path), "--plot", str(tmp_path / "plot.png")]
    lines = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["locating", *flags])
        locating.main()
        lines.append(capsys.readouterr().out.splitlines())
    result = json.loads(lines[0][-1])
    assert set(result["table"]) == {"50 tokens, 2", "50 tokens, all"} and result == json.loads(
        lines[1][-1]
    )
    assert re.search(r"\| 50 tokens, all \| 0\.\d\d \[", "\n".join(lines[0]))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*/*.1"))  # where train_ppo.py moves an earlier run


@pytest.mark.parametrize("flags", [["--seeds", "0"], ["--spans", "0"], ["--spans", "many"]])
def test_flags_that_make_no_sense_end_in_one_sentence(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["locating", *flags])
    with pytest.raises(SystemExit) as stopped:
        locating.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
