"""Annotation by programs, unit tests, people and a model loaded here; and a reward model behind a server."""

import json
from argparse import Namespace

import pytest
from annotating import flags, requests, texts, write
from fault_server import annotation

from t2g import annotator, critics, policy
from t2g.feedback import Feedback
from t2g.log import read_jsonl
from t2g.notes import read_annotations
from t2g.tasks import Example, summarize, toy

# ---- programs and people -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A policy of the toy that has learnt nothing."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer, model = toy.new_model(0)
    return policy.save(model, tokenizer, folder, 0)


def test_the_rule_writes_the_same_for_given_responses_as_for_sampled_ones(
    untrained, tmp_path, call
):
    sampled, given, bare = (
        tmp_path / "sampled.jsonl",
        tmp_path / "given.jsonl",
        tmp_path / "bare.jsonl",
    )
    assert call("--policy", untrained, "--num_samples", 5, "--out", sampled)[0] == 0
    write(
        bare,
        [{name: r[name] for name in ("id", "prompt", "response")} for r in read_jsonl(sampled)],
    )
    assert call("--responses", bare, "--out", given)[0] == 0
    assert given.read_bytes() == sampled.read_bytes()
    assert "exists already" in call("--responses", bare, "--out", given)[1]
    write(bare, texts(1))
    assert (
        "the prompt of record 1 is none of the task toy"
        in call("--responses", bare, "--out", tmp_path / "new.jsonl")[1]
    )


def test_sampled_responses_of_a_paid_annotator_are_kept(serve, untrained, tmp_path, call):
    url, _ = serve()
    out = tmp_path / "out.jsonl"
    sampling = (
        "--policy",
        untrained,
        "--num_samples",
        3,
        "--out",
        out,
        "--model",
        "m",
        "--base_url",
        url,
    )
    call(*sampling, "--dry_run")
    kept = read_jsonl(tmp_path / "out.responses.jsonl")
    _, printed = call(*sampling)
    assert "sampled before" in printed
    assert {(r["id"], r["prompt"], r["response"]) for r in read_jsonl(out)} == {
        tuple(r.values()) for r in kept
    } and len(kept) == 3
    (tmp_path / "out.responses.jsonl").unlink()
    assert "exists already, without" in call(*sampling)[1]


@pytest.fixture
def tested(monkeypatch):
    """The toy as a task with unit tests, which a record may bring along."""
    result = lambda example, response: f"{response} fails {example.facts['tests']}"  # noqa: E731
    critique = lambda example, response: Feedback(result(example, response), [], [response])  # noqa: E731
    examples = [Example("Add.", "", {"tests": "all"})], [Example("Sub.", "", {"tests": "few"})]
    own = lambda record: Example("", "", record) if "tests" in record else None  # noqa: E731
    hooks = dict(
        critique=critique, test_log=result, load=lambda args: examples, example_of_record=own
    )
    for name, hook in hooks.items():
        monkeypatch.setattr(toy, name, hook, raising=False)


def test_records_are_judged_by_their_own_example_or_by_the_task_s(tmp_path, call, tested):
    records = [{"id": str(n), "prompt": "p", "response": f"r{n}", "tests": n} for n in range(2)]
    given = ("--responses", write(tmp_path / "in.jsonl", records), "--out")
    assert call(*given, tmp_path / "own.jsonl")[0] == 0
    critiques = [record["critique"] for record in read_jsonl(tmp_path / "own.jsonl")]
    assert critiques == ["r0 fails 0", "r1 fails 1"]
    write(tmp_path / "in.jsonl", [{"id": "a", "prompt": "Sub.", "response": "x"}])
    call(*given, tmp_path / "task.jsonl")
    assert read_jsonl(tmp_path / "task.jsonl")[0]["critique"] == "x fails few"


def test_a_served_annotator_reads_the_log_of_the_unit_tests(serve, tmp_path, call, tested):
    url, log = serve()
    call(*flags(url, tmp_path, [{"id": "a", "prompt": "Sub.", "response": "x"}]))
    question = requests(log())[0]["asked"]["messages"][0]["content"]
    assert "### Log of the unit tests\nx fails few" in question
    assert read_jsonl(tmp_path / "out.jsonl")[0]["test_log"] == "x fails few"


def test_records_that_people_filled_in(tmp_path, call):
    """Quotes are mended as a model's are; what is empty or wrong is told by its line, and not lost: it stands in the input."""
    a, b, c, d = texts(4)
    filled = {
        **a,
        "critique": "Fine.",
        "good_spans": [{"text": a["response"][:6].upper(), "severity": 0.5}],
    }
    wrong = {**c, "critique": "Bad.", "poor_spans": ["nowhere"]}
    path, out = (
        write(tmp_path / "in.jsonl", [filled, b, wrong, {**d, "critique": 7}]),
        tmp_path / "out.jsonl",
    )
    code, printed = call("--critic", "human", "--responses", path, "--out", out)
    assert (
        code == 0
        and f"record 3 of {path} is left out: quote 1 of poor_spans" in printed
        and "record 4 of" in printed
    )
    assert "1 records are not filled in yet and 2 have a fault" in printed
    (record,) = read_jsonl(out)
    assert (
        record["good_spans"] == [{"text": a["response"][:6], "severity": 0.5}]
        and record["poor_spans"] == []
    )
    assert (record["status"], record["reason"], record["id"]) == ("ok", "", "r0")
    assert (
        "is filled in as it should be"
        in call("--critic", "human", "--responses", write(path, [b]), "--out", tmp_path / "no")[1]
    )


def test_kinds_of_people_that_fit_no_quotes_are_a_fault(tmp_path, call):
    """train_rm.py would refuse the file for them."""
    a, b = ({**text, "critique": "Bad.", "poor_spans": [text["response"][:6]]} for text in texts(2))
    path, out = (
        write(tmp_path / "in.jsonl", [{**a, "kinds": ["x", "y"]}, {**b, "kinds": ["x"]}]),
        tmp_path / "out.jsonl",
    )
    code, printed = call("--critic", "human", "--responses", path, "--out", out)
    assert (
        code == 0
        and f'record 1 of {path} is left out: "kinds"' in printed
        and "1 have a fault" in printed
    )
    assert [record["kinds"] for record in read_annotations(out)] == [["x"]]


def test_an_empty_file_of_people_is_told(tmp_path, call):
    (tmp_path / "in.jsonl").touch()
    code, printed = call(
        "--critic", "human", "--responses", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl"
    )
    assert code == 2 and "holds no record" in printed and not (tmp_path / "out.jsonl").exists()


def test_a_task_s_own_criteria_stand_in_the_prompt(serve, tmp_path, call, monkeypatch):
    url, log = serve()
    monkeypatch.setattr(summarize, "CRITERIA", "Good is what is short.", raising=False)
    call(*flags(url, tmp_path, texts(1), "--task", "summarize"))
    asked = requests(log())[0]["asked"]["messages"][0]["content"]
    assert "Good is what is short." in asked and annotator.CRITERIA not in asked


# ---- a reward model behind a server --------------------------------------------------------------------------------------

EXAMPLES = [Example(f"p{n}", "", {}) for n in range(4)]
RESPONSES = [f"r{n}" for n in range(4)]


def test_a_served_reward_model_is_a_critic(serve):
    url, log = serve(answer=Feedback("Well.", ["r"], []).render())
    said = critics.openai_critic(url, "rm", critique_length=33)(EXAMPLES, RESPONSES)
    assert said == [Feedback("Well.", ["r"], [])] * 4
    asked = requests(log())[0]["asked"]
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("rm", 33, 0)
    prompts = {line["asked"]["messages"][0]["content"] for line in requests(log())}
    assert prompts == {critics.reward_prompt(e.prompt, r) for e, r in zip(EXAMPLES, RESPONSES)}


def test_critiques_that_do_not_come_are_none_unless_none_comes(serve, capsys):
    url, _ = serve(answer=Feedback("Well.").render(), poison="r2")
    said = critics.openai_critic(url, "rm", max_retries=1)(EXAMPLES, RESPONSES)
    assert [f is None for f in said] == [False, False, True, False]
    assert (
        critics.openai_critic(serve(answer="no feedback")[0], "rm")(EXAMPLES, RESPONSES)
        == [None] * 4
    )
    for settings, sentence in (
        (dict(status=500), "none of 4 critiques"),
        (dict(status=404), "no such model"),
    ):
        with pytest.raises(SystemExit):
            critics.openai_critic(serve(**settings)[0], "rm", max_retries=1)(EXAMPLES, RESPONSES)
        assert sentence in capsys.readouterr().err


def test_a_model_that_is_loaded_here_is_asked_and_read_as_a_server_is(monkeypatch):
    record, asked = texts(1)[0], []
    answers = [
        json.dumps(annotation(record["response"])),
        "Nice summary!",
        json.dumps(annotation("another text altogether")),
    ]

    def respond(model, tokenizer, prompts, length, **sampling):
        asked.extend(prompts)
        return answers, [True] * len(answers)

    tokenizer, model = toy.new_model(0)
    model.config.max_position_embeddings = 10**4
    monkeypatch.setattr(critics, "respond", respond)
    critic = annotator.prompted_critic(model, tokenizer, "Look for rain.")
    said = critic([Example(record["prompt"], "", {})] * 3, [record["response"]] * 3)
    assert asked == [annotator.question(record, "Look for rain.", 2)] * 3
    assert said[0].good and said[1:] == [None, None], (
        "what a server would be asked again for is unreadable here"
    )


# ---- what does not go well -----------------------------------------------------------------------------------------------

SETTINGS = dict(task="toy", critic="openai", base_url=None, reward_model="rm", critique_length=20)


@pytest.mark.parametrize("kind", ["trained", "prompted"])
def test_a_response_that_is_too_long_for_its_critic_is_unreadable_and_the_others_are_not(
    kind, monkeypatch, capsys
):
    """A long prompt is shortened instead."""
    answer = {
        "trained": Feedback("c").render(),
        "prompted": json.dumps(annotation("") | {"good_spans": [], "poor_spans": []}),
    }
    asked = []

    def respond(model, tokenizer, prompts, length, **sampling):
        asked.extend(prompts)
        assert all(critics.token_count(tokenizer, prompt) + length <= 1024 for prompt in prompts)
        return [answer[kind]] * len(prompts), [True] * len(prompts)

    monkeypatch.setattr(critics, "respond", respond)
    tokenizer, model = toy.new_model(0)
    model.config.max_position_embeddings = 1024
    critic = (
        critics.reward_model_critic(model, tokenizer, 20)
        if kind == "trained"
        else annotator.prompted_critic(model, tokenizer, "", 20)
    )
    examples = [
        Example(prompt, "", {}) for prompt in ("p", "p", "Head. " + "middle " * 1200 + " Tail.")
    ]
    for _ in range(2):
        said = critic(examples, ["Ana is 27.", "word " * 1200, "Ana is 27."])
        assert said[0] and said[1] is None and said[2]
    assert len(asked) == 4 and "Head." in asked[1] and " [...] " in asked[1] and "Tail." in asked[1]
    assert capsys.readouterr().out.count("1 of 3 responses are too long to be criticised") == 1


def test_a_critique_longer_than_the_context_is_refused(capsys):
    tokenizer, model = toy.new_model(0)
    with pytest.raises(SystemExit):
        critics.reward_model_critic(model, tokenizer, 512)
    assert "--critique_length 512 leaves no room in the context of 512" in capsys.readouterr().err


def test_a_batch_of_which_no_critique_can_be_read_is_told_once(serve, capsys):
    critic = critics.load_critic(
        toy, Namespace(**SETTINGS | {"base_url": serve(answer="no feedback")[0]}), None, "cpu"
    )
    assert critic(EXAMPLES, RESPONSES) == critic(EXAMPLES, RESPONSES) == [None] * 4
    assert (
        capsys.readouterr().out.count("warning: none of the 4 critiques of this batch can be read")
        == 1
    )
    critic = critics.load_critic(
        toy,
        Namespace(**SETTINGS | {"base_url": serve(answer=Feedback("Well.").render())[0]}),
        None,
        "cpu",
    )
    assert all(critic(EXAMPLES, RESPONSES)) and not capsys.readouterr().out


def test_a_served_reward_model_without_an_address_or_a_key_is_told_before_anything_is_asked(
    monkeypatch, capsys
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for base_url, sentence in (
        ("localhost:8716", "no address of a server"),
        (None, "set OPENAI_API_KEY"),
    ):
        with pytest.raises(SystemExit):
            critics.load_critic(toy, Namespace(**SETTINGS | {"base_url": base_url}), None, "cpu")
        assert sentence in capsys.readouterr().err
