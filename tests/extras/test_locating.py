"""The task of the study of locating: its marks, its starting policy, and a run of it."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extras.studies import locating
from t2g.align import resolve, span_rewards, token_offsets
from t2g.feedback import quoted


def lists(spans="all"):
    """An example of each of some prompts, with a list as the starting policy learns to write it."""
    args = SimpleNamespace(seed=0, length=0, spans=spans, max_steps=1)
    args.per_device_train_batch_size = 6
    by_prompt = {example.prompt: example for example in locating.load(args)[0]}
    pairs = locating.sft_pairs(args, list(by_prompt.values()))
    return [(by_prompt[prompt], response) for prompt, response in pairs]


def test_right_items_are_those_of_the_word_in_their_place_and_no_further():
    example, _ = lists()[0]
    key, asked = example.prompt.split()
    habits, asked = example.facts["habits"], int(asked)

    def item(place):
        return f"{habits[key, place % locating.SLOTS][0]} {place}"

    right = [item(place) for place in range(1, asked + 1)]
    assert locating.score(example, " ".join(right)) == {"right": 1, "items": asked}
    assert locating.score(example, " ".join(right[: asked // 2]))["right"] <= 0.5
    longer = " ".join([*right, item(asked + 1)])
    assert len(locating.critique(example, longer).good) <= asked
    assert locating.score(example, " ".join(right[1:]))["right"] == 0
    assert locating.score(example, "")["right"] == 0 and not locating.critique(example, "").poor


@pytest.mark.parametrize("spans", ["1", "3", "60", "all"])
def test_so_many_items_are_marked_and_all_quotes_are_found_where_they_stand(spans):
    for example, response in lists(spans):
        asked, feedback = int(example.prompt.split()[1]), locating.critique(example, response)
        count = asked if spans == "all" else min(int(spans), asked)
        marks, counts = resolve(response, feedback, severities=True)
        assert len(marks) == count and counts["exact"] == count and counts["ambiguous"] == 0
        judged = {(start, end): right for start, end, right in locating.judged(example, response)}
        assert all(judged[start, end] == (score > 0) for start, end, score in marks)
        assert sum(abs(score) for *_, score in marks) == pytest.approx(1)
        assert locating.critique(example, response) == feedback


words = st.sampled_from([*locating.WORDS[:3], *locating.KEYS[:1], *map(str, range(1, 6))])


@given(st.lists(words, max_size=40))
def test_any_text_can_be_criticised_and_its_quotes_stand_in_it(text):
    example, response = lists("8")[0][0], " ".join(text)
    feedback = locating.critique(example, response)
    assert len(feedback.good) + len(feedback.poor) <= 8
    assert all(quoted(quote)[0] in response for quote in [*feedback.good, *feedback.poor])


def test_a_mark_is_two_tokens_and_a_number_is_one():
    tokenizer, _ = locating.new_model(0)
    for example, response in lists("3"):
        ids = tokenizer(response, add_special_tokens=False)["input_ids"]
        assert len(ids) == 2 * int(example.prompt.split()[1]) and tokenizer.unk_token_id not in ids
        spans, _ = resolve(response, locating.critique(example, response), severities=True)
        rewards = span_rewards(token_offsets(tokenizer, ids), spans, "severity")
        assert (rewards != 0).sum() == 6 and rewards.abs().sum().item() == pytest.approx(2)


def test_a_starting_policy_is_wrong_at_the_rates_of_its_habits():
    args = SimpleNamespace(seed=0, length=400, spans="all", max_steps=1)
    args.per_device_train_batch_size = 100
    example = locating.load(args)[0][0]
    pairs = locating.sft_pairs(args, [example])
    right = [locating.score(example, text)["right"] for _, text in pairs]
    key, habits = example.prompt.split()[0], locating.habits(0)
    rates = [habits[key, slot][2] for slot in range(locating.SLOTS)]
    assert sum(right) / len(right) == pytest.approx(sum(rates) / len(rates), abs=0.02)
    assert locating.habits(0) == habits != locating.habits(1)
