"""Critics: programs and their quotes, files of one's own, reward models, and annotation by them."""

import re
from argparse import Namespace

import pytest
from annotating import flags, requests, texts, write
from hypothesis import assume, given
from hypothesis import strategies as st

from t2g import annotator, critics
from t2g.align import locate
from t2g.critics import checked, quote_of, rule_critic
from t2g.feedback import Feedback
from t2g.log import read_jsonl
from t2g.openai_critic import openai_critic
from t2g.tasks import Example, toy

# ---- quotes and files of one's own -------------------------------------------------------------
PARTS = st.lists(st.sampled_from(["a", "b", "ab", "27"]), min_size=1, max_size=8)


@given(st.data(), PARTS, st.sampled_from([" ", ", ", ","]))
def test_a_quote_of_words_is_found_once_and_ends_where_they_end(data, parts, glue):
    """This holds where it is possible: the text up to there must be unique."""
    text = glue.join(parts)
    bounds = [match.span() for match in re.finditer(r"\w+", text)]
    first = data.draw(st.integers(0, len(parts) - 1))
    start, end = bounds[first][0], bounds[data.draw(st.integers(first, len(parts) - 1))][1]
    assume(text.count(text[:end]) == 1 and locate(text, text[:end]) == [(0, end)])
    quote = quote_of(text, start, end)
    assert quote.endswith(text[start:end])
    assert locate(text, quote) == [(end - len(quote), end)]


GROWN = [
    ("Ana is 27, lives in Porto", (7, 9), "27"),
    ("27,b,27,27", (8, 10), ",27,27"),
    ("27 27", (0, 2), "27 27"),
    ("27 and, 27", (0, 2), "27 and,"),
    ("27", (0, 2), "27"),
    (" so, so", (1, 3), " so,"),
    ("it is 27, and it is not 27", (24, 26), " not 27"),
    ("In 1927 27", (5, 7), " 1927"),
]


@pytest.mark.parametrize(("text", "place", "quote"), GROWN)
def test_a_quote_grows_word_by_word_until_it_is_unique(text, place, quote):
    assert quote_of(text, *place) == quote


RETURNS = "critic = lambda *_: lambda *_: "
FAULTY = [  # a critic's file, and what the sentence names
    ("def critic(task, args:", "cannot be imported: '(' was never closed"),
    ("import no_such_module", "cannot be imported: No module"),
    ("x = 1", "must define critic(task, args)"),
    ("critic = lambda task: None", "must define critic(task, args)"),
    ("critic = lambda *_: None", "must return a function, not None"),
    (RETURNS + "None", "no list of values for 2 responses"),
    (RETURNS + "(0.0 for _ in 'ab')", "no list of values"),
    (RETURNS + "Feedback('')", "no list of values"),
    (RETURNS + "['a', 'b']", "returned 'a', not"),
    (RETURNS + "[Feedback(None)] * 2", "critique=None"),
    (RETURNS + "[Feedback('', ('a',))] * 2", '"good" must be a list'),
    (RETURNS + "[1, 1]", "returned 1, not"),
    (RETURNS + "[1.0, float('nan')]", "returned nan"),
    (RETURNS + "[None]", "1 values for 2 responses"),
]


@pytest.mark.parametrize(("source", "named"), FAULTY)
def test_a_faulty_critic_file_ends_with_one_sentence(source, named, tmp_path, refused):
    (tmp_path / "mine.py").write_text("from t2g.feedback import Feedback\n" + source)
    args = Namespace(critic=str(tmp_path / "mine.py"))

    def criticise():
        critics.load_critic(None, args, tmp_path)([None] * 2, ["a", "b"])

    assert named in refused(criticise)


def test_half_a_surrogate_pair_in_feedback_becomes_a_question_mark(capsys):
    half = Feedback("Lyon \ud83d", [], ["a", {"text": "\ud83d", "severity": 0.5}])
    whole = Feedback("Lyon ?", [], ["a", {"text": "?", "severity": 0.5}])
    assert checked(lambda *_: [half, None])([None] * 2, ["a", "b"]) == [whole, None]
    assert "half a surrogate pair" in capsys.readouterr().out


def test_a_rule_must_return_feedback(refused):
    for one in (None, 1.0, "poor"):
        critic = rule_critic(Namespace(critique=lambda *_, one=one: one))
        assert f"returned {one!r}" in refused(critic, [None], ["a"])


# ---- annotation by programs --------------------------------------------------------------------
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
    write(tmp_path / "in.jsonl", [records[0], {"id": "a", "prompt": "Sub.", "response": "x"}])
    call(*given, tmp_path / "both.jsonl")
    critiques = [record["critique"] for record in read_jsonl(tmp_path / "both.jsonl")]
    assert critiques == ["r0 fails 0", "x fails few"]


def test_a_server_reads_the_test_log_and_the_criteria(serve, tmp_path, call, tested, monkeypatch):
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
    return critics.load_critic(toy, args, None)


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
