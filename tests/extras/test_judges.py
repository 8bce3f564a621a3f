"""Win rates and MT-Bench: what a judge behind a server is asked, how its verdicts are read, and what they come to."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from annotating import write

from extras.benchmarks import mt_bench, win_rate
from t2g import cli, policy
from t2g.log import read_jsonl
from t2g.metrics import resamples
from t2g.tasks import toy

ROOT = Path(__file__).resolve().parents[2]
MT_BENCH = ROOT.parent / "shared" / "data" / "mt_bench"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        self.server.asked.append(messages)
        said = self.server.decide(messages)
        body = (
            b""
            if said is None
            else json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        )
        self.send_response(401 if said is None else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 256

    def handle_error(self, *_):
        """A client that was killed breaks its connections; that is no news."""


@pytest.fixture
def judged_by(monkeypatch):
    """judged_by(decide) starts a judge that answers decide(messages), or 401 for None; returns its address, what it was asked."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    running = []

    def start(decide):
        server = Server(("127.0.0.1", 0), Handler)
        server.decide, server.asked = decide, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/v1", server.asked

    yield start
    for server in running:
        server.shutdown()


def arguments(module, *flags, models=()):
    """The flags of a benchmark, with those that benchmark.py adds to them."""
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    for name in ("--out", "--seed"):
        parser.add_argument(
            name, type=int if name == "--seed" else str, default=0 if name == "--seed" else None
        )
    parser.add_argument("--bf16", action="store_true")
    module.add_flags(cli.flags(parser))
    args = parser.parse_args(
        list(map(str, ("--judge", "j", "--timeout", 5, "--max_retries", 2, *flags)))
    )
    args.models = [str(model) for model in models]
    return args


def shown(messages):
    """The prompt and the two responses that the judge is shown, first and second."""
    return re.search(
        r"### Prompt\n(.*)\n\n### Response A\n(.*)\n\n### Response B\n(.*)\n",
        messages[0]["content"],
        re.S,
    ).groups()


def the_better(messages):
    """A perfect judge of the files below: the response that says "right" wins."""
    _, first, second = shown(messages)
    return (
        "[[tie]]"
        if ("right" in first) == ("right" in second)
        else "[[A]]"
        if "right" in first
        else "[[B]]"
    )


def the_longer(messages):
    _, first, second = shown(messages)
    return "I compare.\n[[A]]" if len(first) > len(second) else "I compare.\n[[B]]"


def files(tmp_path, a, b):
    """Two files of responses to the prompts 0, 1, 2, ..."""
    pairs = [("A.jsonl", a), ("B.jsonl", b)]
    return [
        write(
            tmp_path / name,
            [{"prompt": f"Ask {i}.", "response": text} for i, text in enumerate(texts)],
        )
        for name, texts in pairs
    ]


def rate(tmp_path, url, a, b, *flags):
    models = files(tmp_path, a, b)
    return win_rate.run(
        arguments(
            win_rate, "--base_url", url, "--out", tmp_path / "out.json", *flags, models=models
        )
    )


# ---- win rate ------------------------------------------------------------------------------------------------------------


def test_a_perfect_judge_gives_the_share_of_better_responses_and_ties_count_a_half(
    judged_by, tmp_path
):
    url, asked = judged_by(the_better)
    found = rate(tmp_path, url, ["right"] * 6 + ["wrong"] * 4, ["wrong"] * 7 + ["right"] * 3)
    assert (
        found["win_rate"]["value"] == pytest.approx((6 + 0.5) / 10)
        and found["items"] == 10
        and len(asked) == 20
    )
    assert (
        found["ties"] == pytest.approx(0.1)
        and found["inconsistent"] == 0
        and found["first_position"] == 0.5
    )
    assert found["win_rate"]["low"] < 0.65 < found["win_rate"]["high"]
    assert found["length_controlled"] == pytest.approx(found["win_rate"], abs=1e-6), (
        "all are equally long"
    )


def test_each_pair_is_shown_in_both_orders_with_its_prompt(judged_by, tmp_path):
    url, asked = judged_by(lambda messages: "[[tie]]")
    rate(tmp_path, url, ["ya", "yb"], ["na", "nb"])
    assert sorted(map(shown, asked)) == [("Ask 0.", *"na ya".split()), ("Ask 0.", *"ya na".split()),
                                         ("Ask 1.", *"nb yb".split()), ("Ask 1.", *"yb nb".split())]  # fmt: skip


def test_a_judge_that_always_says_the_first_gives_a_half_and_all_the_bias(judged_by, tmp_path):
    url, _ = judged_by(lambda messages: "[[A]]")
    found = rate(tmp_path, url, ["right"] * 8, ["wrong"] * 8)
    assert found["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert found["first_position"] == 1 and found["inconsistent"] == 1 and found["ties"] == 0


def test_the_length_controlled_rate_sees_through_a_judge_that_prefers_what_is_longer(
    judged_by, tmp_path
):
    """A is longer three times in four, and no better. Of 60 prompts the interval holds a half, of 2000 the figure comes near."""
    url, _ = judged_by(the_longer)
    longer = np.random.default_rng(0).normal(40, 60, 2000).astype(int)
    longer += longer == 0
    found = rate(tmp_path, url, ["x" * (300 + d) for d in longer[:60]], ["y" * 300] * 60)
    assert found["win_rate"]["low"] > 0.6 and found["first_position"] == 0.5
    assert (
        found["length_controlled"]["low"] < 0.5
        and found["length_controlled"]["value"] < found["win_rate"]["value"] - 0.1
    )
    (many,) = win_rate.length_controlled((longer > 0).astype(float), longer, np.ones((1, 2000)))
    assert many == pytest.approx(0.5, abs=0.1)


def test_the_length_controlled_rate_is_the_rate_where_length_says_nothing_and_mirrors_when_the_sides_change():
    rng = np.random.default_rng(0)
    longer, scores = rng.normal(0, 50, 400), rng.choice([0, 0.5, 1], 400, p=[0.2, 0.1, 0.7])
    weights = resamples(400)[:20]
    there = win_rate.length_controlled(scores, longer, weights)
    assert there[0] == pytest.approx(scores.mean(), abs=0.02)
    assert win_rate.length_controlled(1 - scores, -longer, weights) == pytest.approx(
        1 - there, abs=1e-4
    )


def test_quality_is_found_under_a_judge_that_also_likes_length():
    rng = np.random.default_rng(1)
    longer = rng.normal(60, 60, 4000)
    scores = (
        rng.random(4000) < 1 / (1 + np.exp(-(0.8 + 1.5 * np.tanh(longer / longer.std(ddof=1)))))
    ).astype(float)
    found = win_rate.length_controlled(scores, longer, np.ones((1, 4000)))
    assert found[0] == pytest.approx(1 / (1 + np.exp(-0.8)), abs=0.03) and scores.mean() > 0.75


def test_an_answer_without_a_single_verdict_is_asked_for_again_and_then_counted(
    judged_by, tmp_path, capsys
):
    """It says so for prompt 0 for ever, for prompt 1 once."""
    seen = []

    def decide(messages):
        prompt, first, _ = shown(messages)
        seen.append((prompt, first, len(messages)))
        if prompt == "Ask 0." or (prompt == "Ask 1." and len(messages) == 1):
            return "[[A]], or is it [[B]]?"
        return the_better(messages)

    url, asked = judged_by(decide)
    found = rate(tmp_path, url, ["right"] * 3, ["wrong"] * 3)
    assert found["unreadable"] == 2 and found["items"] == 2 and found["win_rate"]["value"] == 1
    assert [seen.count(("Ask 0.", "right", n)) for n in (1, 3)] == [1, 2] and seen.count(
        ("Ask 1.", "right", 3)
    ) == 1
    again = next(messages for messages in asked if len(messages) == 3)
    assert (
        again[1] == {"role": "assistant", "content": "[[A]], or is it [[B]]?"}
        and "no single verdict" in again[2]["content"]
    )
    failed = [
        record
        for record in read_jsonl(tmp_path / "out.verdicts.jsonl")
        if record["status"] == "failed"
    ]
    assert len(failed) == 2 and "2 verdicts could not be read" in capsys.readouterr().out
    asked.clear()
    rate(tmp_path, judged_by(the_better)[0], ["right"] * 3, ["wrong"] * 3)
    again = rate(tmp_path, judged_by(the_better)[0], ["right"] * 3, ["wrong"] * 3, "--retry_failed")
    assert again["unreadable"] == 0 and again["items"] == 3


def test_stopped_half_way_it_goes_on_and_asks_nothing_twice(judged_by, tmp_path, capsys):
    """The key is no longer accepted after 11 verdicts."""
    a, b = ["right"] * 10, ["wrong"] * 10
    served = []

    def decide(messages):
        served.append(messages)
        return the_better(messages) if len(served) <= 11 else None

    with pytest.raises(SystemExit):
        rate(tmp_path, judged_by(decide)[0], a, b, "--concurrency", 1)
    assert "does not accept the key" in capsys.readouterr().err
    there = read_jsonl(tmp_path / "out.verdicts.jsonl")
    assert len(there) == 11
    url, asked = judged_by(the_better)
    assert rate(tmp_path, url, a, b)["win_rate"]["value"] == 1
    assert len(asked) == 9 and not {shown(messages) for messages in asked} & {
        shown(m) for m in served[:11]
    }
    asked.clear()
    rate(tmp_path, url, a, b)
    assert not asked


@pytest.mark.slow
def test_killed_it_goes_on_and_asks_nothing_twice(judged_by, tmp_path):
    def slowly(messages):
        time.sleep(0.02)
        return the_better(messages)

    url, asked = judged_by(slowly)
    models = [str(path) for path in files(tmp_path, ["right"] * 60, ["wrong"] * 60)]
    flags = [
        "--judge",
        "j",
        "--base_url",
        url,
        "--out",
        str(tmp_path / "out.json"),
        "--concurrency",
        "2",
    ]
    code = "import sys; from test_judges import *; win_rate.run(arguments(win_rate, *sys.argv[3:], models=sys.argv[1:3]))"
    command, paths = (
        [sys.executable, "-c", code, *models, *flags],
        {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    process = subprocess.Popen(
        command, env={**os.environ, **paths}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    out = tmp_path / "out.verdicts.jsonl"
    while not out.exists() or out.read_bytes().count(b"\n") < 30:
        assert process.poll() is None, "it ended before its time"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    there = {(row["prompt"], *row["response"]) for row in rows}
    time.sleep(0.1)
    asked.clear()
    assert win_rate.run(arguments(win_rate, *flags, models=models))["win_rate"]["value"] == 1
    assert not set(map(shown, asked)) & there and len(asked) == 120 - len(there)


def test_verdicts_of_another_judge_or_on_other_responses_are_not_taken(judged_by, tmp_path, capsys):
    url, asked = judged_by(the_better)
    rate(tmp_path, url, ["right"], ["wrong"])
    for a, flags in ((["right"], ["--judge", "k"]), (["right too"], [])):
        with pytest.raises(SystemExit):
            rate(tmp_path, url, a, ["wrong"], *flags)
        assert "verdicts of another judge, or on other responses" in capsys.readouterr().err
    assert len(asked) == 2


def test_the_annotator_is_refused_as_the_judge_unless_that_is_wanted(judged_by, tmp_path, capsys):
    url, asked = judged_by(the_better)
    notes = write(tmp_path / "notes.jsonl", [{"annotator": "openai/GPT-4o"}])
    known = ("--annotations", notes, "--judge", "gpt-4o")
    with pytest.raises(SystemExit):
        rate(tmp_path, url, ["right"], ["wrong"], *known)
    assert "choose another --judge" in capsys.readouterr().err and not asked
    assert (
        rate(tmp_path, url, ["right"], ["wrong"], *known, "--same_judge")["win_rate"]["value"] == 1
    )


def test_the_budget_stops_it_and_a_larger_one_goes_on(judged_by, tmp_path, capsys):
    """Without usage figures, an answer is taken to have cost all that it may."""
    url, asked = judged_by(the_better)
    prices = ("--output_price", 1e6, "--judge_tokens", 1)
    with pytest.raises(SystemExit):
        rate(tmp_path, url, ["right"] * 4, ["wrong"] * 4, *prices, "--budget", 5)
    assert "3 verdicts are left" in capsys.readouterr().err and len(asked) == 5
    assert (
        rate(tmp_path, url, ["right"] * 4, ["wrong"] * 4, *prices, "--budget", 8)["items"] == 4
        and len(asked) == 8
    )


def test_prompts_that_only_one_file_answers_are_counted(judged_by, tmp_path, capsys):
    url, _ = judged_by(the_better)
    assert rate(tmp_path, url, ["right"] * 3, ["wrong"] * 2)["items"] == 2
    assert "1 prompts stand in one file only" in capsys.readouterr().out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer, tiny = toy.new_model(0)
    return policy.save(tiny, tokenizer, tmp_path_factory.mktemp("models"), 0)


@pytest.mark.usefixtures("posts")
def test_models_answer_once_and_their_answers_are_kept(judged_by, tmp_path, model, capsys):
    url, asked = judged_by(lambda messages: "[[tie]]")
    flags = (
        "--base_url",
        url,
        "--out",
        tmp_path / "out.json",
        "--eval_samples",
        3,
        "--response_length",
        4,
    )
    args = arguments(win_rate, *flags, models=[model, model])
    assert win_rate.run(args)["win_rate"]["value"] == 0.5 and len(asked) == 6
    assert win_rate.run(args)["items"] == 3 and len(asked) == 6
    args.response_length = 5
    with pytest.raises(SystemExit):
        win_rate.run(args)
    assert "of other flags" in capsys.readouterr().err


# ---- MT-Bench ------------------------------------------------------------------------------------------------------------

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write a line.", "Now in French."]},
    {"question_id": 2, "category": "math", "turns": ["What is 2 + 3?", "And {twice} that?"]},
]
REFERENCES = [{"question_id": 2, "choices": [{"turns": ["It is 5.", "It is 10."]}]}]
TALK = "Q1 {question_1} A1 {answer_1} Q2 {question_2} A2 {answer_2}"
JUDGE_PROMPTS = [
    {"name": "single-v1", "system_prompt": "s", "prompt_template": "Rate. Q {question} A {answer}"},
    {
        "name": "single-math-v1",
        "system_prompt": "s",
        "prompt_template": "Rate. R {ref_answer_1} Q {question} A {answer}",
    },
    {"name": "single-v1-multi-turn", "system_prompt": "multi", "prompt_template": TALK},
    {
        "name": "single-math-v1-multi-turn",
        "system_prompt": "multi",
        "prompt_template": "R {ref_answer_1} {ref_answer_2} " + TALK,
    },
]


def mt_flags(tmp_path, url, *more):
    paths = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in
             (("questions", QUESTIONS), ("references", REFERENCES), ("judge_prompts", JUDGE_PROMPTS))]  # fmt: skip
    named = [word for path in paths for word in (f"--{path.stem}", path)]
    return *named, "--base_url", url, "--out", tmp_path / "out.json", "--response_length", 6, *more


def rating(messages):
    """3 for a first turn, 9 for a second one."""
    return "Fine. Rating: [[9]]" if "Q2 " in messages[1]["content"] else "Fine. Rating: [[3]]"


def test_both_turns_reach_the_judge_with_the_models_answers_and_references_where_they_count(
    judged_by, tmp_path, model
):
    url, asked = judged_by(rating)
    found = mt_bench.run(arguments(mt_bench, *mt_flags(tmp_path, url), models=[model]))
    said = {
        row["prompt"][0]: row["response"]
        for row in read_jsonl(next(tmp_path.glob("out.checkpoint-0-*.jsonl")))
    }
    (w1, w2), (m1, m2) = said["Write a line."], said["What is 2 + 3?"]
    assert sorted(messages[1]["content"] for messages in asked) == sorted(
        [
            f"Rate. Q Write a line. A {w1}",
            f"Q1 Write a line. A1 {w1} Q2 Now in French. A2 {w2}",
            f"Rate. R It is 5. Q What is 2 + 3? A {m1}",
            f"R It is 5. It is 10. Q1 What is 2 + 3? A1 {m1} Q2 And {{twice}} that? A2 {m2}",
        ]
    )
    assert {messages[0]["role"] for messages in asked} == {"system"}
    scores = found["scores"][str(model)]
    assert (
        scores["turn_1"]["value"] == 3
        and scores["turn_2"]["value"] == 9
        and scores["overall"]["value"] == 6
    )
    assert scores["writing"]["value"] == scores["math"]["value"] == 6 and scores["unreadable"] == 0
    asked.clear()
    assert (
        mt_bench.run(arguments(mt_bench, *mt_flags(tmp_path, url), models=[model])) == found
        and not asked
    )


def test_the_second_turn_is_asked_with_the_first_before_it():
    record = {"prompt": ["one", "two"], "response": ["said"]}
    assert mt_bench.chat(record, 0) == [{"role": "user", "content": "one"}]
    assert [(m["role"], m["content"]) for m in mt_bench.chat(record, 1)] == [
        ("user", "one"),
        ("assistant", "said"),
        ("user", "two"),
    ]


def test_an_answer_is_the_greedy_one_whatever_stands_beside_it_in_the_batch(model):
    from t2g.respond import respond

    tokenizer, loaded = policy.load(model)
    prompts = ["Go.", "I live in Porto and miss my sister.", "My name is Ana."]
    args = argparse.Namespace(response_length=8, bf16=False)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    said = mt_bench.respond_to_chats(loaded, tokenizer, chats, [0.0, 0.0, 0.0], args, None)
    texts, finished = respond(loaded, tokenizer, prompts, 8, temperature=0)
    assert said == [(text.strip(), not ended) for text, ended in zip(texts, finished)]


def test_a_rating_that_cannot_be_read_is_counted_and_left_out(judged_by, tmp_path, model):
    url, _ = judged_by(
        lambda messages: "Rating: 9" if "French" in messages[1]["content"] else "[[4]]"
    )
    found = mt_bench.run(arguments(mt_bench, *mt_flags(tmp_path, url), models=[model]))["scores"][
        str(model)
    ]
    assert (
        found["unreadable"] == 1
        and found["overall"]["value"] == 4
        and found["turn_2"]["value"] == 4
    )


def test_the_mean_weighs_ratings_and_the_interval_draws_questions():
    table = np.array([[1.0, np.nan], [7.0, 10.0], [4.0, 4.0]])
    found = mt_bench.figures(table, ["a", "b", "b"], resamples(3))
    assert (
        found["overall"][0] == pytest.approx(26 / 5)
        and found["b"][0] == pytest.approx(25 / 4)
        and found["a"][0] == 1
    )
    assert (
        found["turn_2"][0] == 7
        and np.nanmax(found["overall"]) == 8.5
        and np.nanmin(found["overall"]) == 1
    )


def test_a_category_that_needs_references_says_so_where_they_are_absent(
    judged_by, tmp_path, model, capsys
):
    url, asked = judged_by(rating)
    args = arguments(mt_bench, *mt_flags(tmp_path, url), models=[model])
    write(tmp_path / "references.jsonl", [{**REFERENCES[0], "question_id": 3}])
    with pytest.raises(SystemExit):
        mt_bench.run(args)
    assert "no answer to question 2" in capsys.readouterr().err and not asked


def test_the_real_files_are_read_and_every_question_finds_its_judge_prompt(
    judged_by, tmp_path, model
):
    if not MT_BENCH.is_dir():
        pytest.skip(f"the real files are not here: {MT_BENCH}")
    url, asked = judged_by(lambda messages: "Rating: [[5]]")
    real = [word for name, file in (("questions", "question"), ("references", "reference_answer_gpt-4"),
            ("judge_prompts", "judge_prompts")) for word in (f"--{name}", MT_BENCH / f"{file}.jsonl")]  # fmt: skip
    questions = mt_bench.read_questions(MT_BENCH / "question.jsonl")
    short = write(
        tmp_path / "short.jsonl", [q for q in questions if sum(map(len, q["turns"])) < 300]
    )
    flags = (
        *real,
        "--questions",
        short,
        "--base_url",
        url,
        "--out",
        tmp_path / "out.json",
        "--response_length",
        4,
    )
    found = mt_bench.run(arguments(mt_bench, *flags, models=[model]))["scores"][str(model)]
    number = len(read_jsonl(short))
    assert (
        len(questions) == 80
        and number > 30
        and len(asked) == 2 * number
        and found["overall"]["value"] == 5
    )
    guided = [messages for messages in asked if "Reference" in messages[1]["content"]]
    assert len(guided) == 2 * sum(
        q["category"] in ("math", "reasoning", "coding") for q in read_jsonl(short)
    )


BAD_FILES = [
    (
        "questions",
        {"question_id": 1, "category": "math", "turns": ["one"]},
        "needs question_id, category and two turns",
    ),
    ("references", {"question_id": 2, "choices": []}, "needs question_id and choices"),
    ("judge_prompts", {"name": "single-v1"}, "has no prompt single-v1"),
    ("judge_prompts", {**JUDGE_PROMPTS[0], "prompt_template": "{nothing}"}, "cannot be filled in"),
]


@pytest.mark.parametrize(("name", "row", "said"), BAD_FILES)
def test_a_file_that_is_not_mt_benchs_ends_in_one_sentence(
    judged_by, tmp_path, model, capsys, name, row, said
):
    url, asked = judged_by(rating)
    args = arguments(mt_bench, *mt_flags(tmp_path, url), models=[model])
    path = tmp_path / f"{name}.jsonl"
    write(
        path, [row, *(other for other in read_jsonl(path) if other.get("name") != row.get("name"))]
    )
    with pytest.raises(SystemExit):
        mt_bench.run(args)
    assert said in capsys.readouterr().err and not asked


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--judge", ""), "--judge is missing"),
        (("--budget", 1), "--budget needs --input_price"),
        (("--base_url", "localhost"), "no address of a server"),
    ],
)
def test_flags_that_cannot_be_end_in_one_sentence_before_anything_runs(
    judged_by, tmp_path, capsys, flags, said
):
    url, asked = judged_by(the_better)
    with pytest.raises(SystemExit):
        rate(tmp_path, url, ["right"], ["wrong"], *flags)
    assert said in capsys.readouterr().err and not asked
