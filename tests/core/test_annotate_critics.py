"""Annotation by programs; reward models and chat models as critics."""

from argparse import Namespace

import pytest
from annotating import flags, requests, texts, write

from t2g import annotator, critics, policy
from t2g.feedback import Feedback
from t2g.log import read_jsonl
from t2g.openai_critic import openai_critic
from t2g.tasks import Example, toy


# ---- programs ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """An untrained policy of the toy."""
    tokenizer, model = toy.new_model(0)
    return policy.save(model, tokenizer, tmp_path_factory.mktemp("policy"), 0)


def test_the_rule_judges_given_responses_as_it_judges_samples(untrained, tmp_path, call):
    samples, bare, given = (tmp_path / f"{name}.jsonl" for name in ("samples", "bare", "given"))
    assert call("--policy", untrained, "--num_samples", 5, "--out", samples)[0] == 0
    fields = ("id", "prompt", "response")
    write(bare, [{name: record[name] for name in fields} for record in read_jsonl(samples)])
    assert call("--responses", bare, "--out", given)[0] == 0
    assert given.read_bytes() == samples.read_bytes()
    assert "exists already" in call("--responses", bare, "--out", given)[1]
    write(bare, texts(1))
    assert "prompt of record 1" in call("--responses", bare, "--out", tmp_path / "new.jsonl")[1]


def test_samples_for_a_server_are_kept(serve, untrained, tmp_path, call):
    out = tmp_path / "out.jsonl"
    sampling = ("--policy", untrained, "--num_samples", 3, "--out", out)
    sampling += ("--model", "m", "--base_url", serve()[0])
    call(*sampling)
    out.unlink()
    kept = read_jsonl(tmp_path / "out.responses.jsonl")
    assert "sampled before" in call(*sampling)[1] and len(kept) == 3
    written = {(r["id"], r["prompt"], r["response"]) for r in read_jsonl(out)}
    assert written == {tuple(record.values()) for record in kept}
    (tmp_path / "out.responses.jsonl").unlink()
    assert "without its responses" in call(*sampling)[1]


@pytest.fixture
def tested(monkeypatch):
    """The toy as a task with unit tests, which a record may bring along."""

    def result(example, response):
        return f"{response} fails {example.facts['tests']}"

    def critique(example, response):
        return Feedback(result(example, response), [], [response])

    def own(record):
        return Example("", "", record) if "tests" in record else None

    examples = [Example("Add.", "", {"tests": "all"})], [Example("Sub.", "", {"tests": "few"})]
    hooks = dict(critique=critique, test_log=result, example_of_record=own)
    for name, hook in {**hooks, "load": lambda args: examples}.items():
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


def test_a_server_reads_the_log_of_the_unit_tests_and_the_task_s_criteria(
    serve, tmp_path, call, tested, monkeypatch
):
    url, log = serve()
    monkeypatch.setattr(toy, "CRITERIA", "Good is what is short.", raising=False)
    call(*flags(url, tmp_path, [{"id": "a", "prompt": "Sub.", "response": "x"}]))
    question = requests(log())[0]["asked"]["messages"][0]["content"]
    assert "Good is what is short." in question and annotator.CRITERIA not in question
    assert "### Log of the unit tests\nx fails few" in question
    assert read_jsonl(tmp_path / "out.jsonl")[0]["test_log"] == "x fails few"


# ---- critics -----------------------------------------------------------------------------------
EXAMPLES = [Example(f"p{n}", "", {}) for n in range(4)]
RESPONSES = [f"r{n}" for n in range(4)]
WELL = Feedback("Well.", ["r"], [])


def test_a_reward_model_behind_a_server_is_a_critic_and_a_lost_critique_is_none(serve):
    url, log = serve(answer=WELL.render(), poison="r2")
    critic = openai_critic(url, "rm", critique_length=33, max_retries=1)
    assert critic(EXAMPLES, RESPONSES) == [WELL, WELL, None, WELL]
    asked = [line["asked"] for line in requests(log())]
    sent = {"model": "rm", "max_tokens": 33, "temperature": 0}
    assert all(request.items() >= sent.items() for request in asked)
    prompts = {request["messages"][0]["content"] for request in asked}
    assert prompts == {critics.reward_prompt(e.prompt, r) for e, r in zip(EXAMPLES, RESPONSES)}


@pytest.mark.parametrize(
    "settings", [{"status": 500}, {"status": 404}, {"rate": 1, "faults": ["broken body"]}]
)
def test_a_server_without_any_critique_ends_the_program(serve, refused, settings):
    critic = openai_critic(serve(**settings)[0], "rm", max_retries=1)
    assert "check the address" in refused(critic, EXAMPLES, RESPONSES)


def test_long_prompts_are_shortened_and_long_responses_unreadable(monkeypatch, capsys, refused):
    answer, asked = Feedback("c").render(), []

    def respond(model, tokenizer, prompts, length, **sampling):
        asked.extend(prompts)
        assert all(critics.token_count(tokenizer, prompt) + length <= 1024 for prompt in prompts)
        return [answer] * len(prompts), [True] * len(prompts)

    monkeypatch.setattr(critics, "respond", respond)
    tokenizer, model = toy.new_model(0)
    model.config.max_position_embeddings = 1024
    critic = critics.reward_model_critic(model, tokenizer, 20)
    long = "Head. " + "middle " * 1200 + " Tail."
    examples = [Example(prompt, "", {}) for prompt in ("p", "p", long)]
    for _ in range(2):
        feedback = critic(examples, ["Ana is 27.", "word " * 1200, "Ana is 27."])
        assert feedback[0] and feedback[1] is None and feedback[2]
    assert len(asked) == 4 and all(part in asked[1] for part in ("Head.", " [...] ", "Tail."))
    assert capsys.readouterr().out.count("some responses are too long") == 1
    fault = refused(critics.reward_model_critic, model, tokenizer, 1024)
    assert "--critique_length 1024" in fault


def load_critic(base_url):
    args = Namespace(critic="openai", base_url=base_url, reward_model="rm", critique_length=20)
    args.free_critiques = True
    return critics.load_critic(toy, args, None, "cpu")


def test_a_batch_without_a_readable_critique_warns_once(serve, capsys):
    critic = load_critic(serve(answer="no feedback")[0])
    assert critic(EXAMPLES, RESPONSES) == critic(EXAMPLES, RESPONSES) == [None] * 4
    assert capsys.readouterr().out.count("no critique of a batch") == 1
    assert all(load_critic(serve(answer=WELL.render())[0])(EXAMPLES, RESPONSES))
    assert not capsys.readouterr().out


def test_a_wrong_address_or_a_missing_key_is_reported_before_training(monkeypatch, refused):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert "--base_url" in refused(load_critic, "localhost:8716")
    assert "OPENAI_API_KEY" in refused(load_critic, None)
