"""Answers for other people's judges, verdicts of a judge behind a server, and ARC's task."""

import json
import re
from pathlib import Path

import pytest
import yaml
from annotating import write
from forking import output, result_of, run
from jinja2 import Environment

from extras.benchmarks import arc, win_rate
from t2g import policy, server
from t2g.log import read_jsonl
from t2g.rollout import respond

SHOWN = re.compile(r"### Prompt\n(.*)\n\n### Response A\n(.*)\n\n### Response B\n(.*)\n")


@pytest.fixture
def judge(monkeypatch, tmp_path):
    """judge(decide, a, b) compares answers to the prompts 0, 1, ...

    It returns the result, what was printed, and the questions to the server.

    decide(request, prompt, first, second) is the server: it returns a text or raises.
    """
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")

    def start(decide, a, b, *flags):
        questions, files = [], []

        async def ask(client, **request):
            shown = SHOWN.search(request["messages"][0]["content"]).groups()
            questions.append(shown)
            return server.Answer(decide(request, *shown))

        monkeypatch.setattr(server, "ask", ask)
        for name, texts in (("A", a), ("B", b)):
            rows = [{"instruction": f"Ask {i}.", "output": text} for i, text in enumerate(texts)]
            files.append(write(tmp_path / f"{name}.jsonl", rows))
        more = ("--base_url", "http://judge/v1", "--out", tmp_path / "verdicts.jsonl")
        command = "extras.benchmarks.win_rate --judge j"
        code, printed = run(command, [*files, *more, *flags])
        return None if code else result_of(printed), printed, questions

    return start


def the_better(request, prompt, first, second):
    """A perfect judge: the response that says "right" wins."""
    if ("right" in first) == ("right" in second):
        return "[[tie]]"
    return "[[A]]" if "right" in first else "[[B]]"


def test_a_perfect_judge_gives_the_share_of_better_answers_and_ties_count_a_half(judge):
    a, b = ["right"] * 6 + ["wrong"] * 4, ["wrong"] * 7 + ["right"] * 3
    found, _, questions = judge(the_better, a, b)
    rate = found["scores"]["A"]["win_rate"]
    assert rate["value"] == pytest.approx(6.5 / 10) and rate["low"] < 0.65 < rate["high"]
    assert found["prompts"] == 10 and found["ties"] == pytest.approx(0.1)
    assert found["inconsistent"] == 0 and found["first_position"] == 0.5
    orders = {(f"Ask {i}.", *pair) for i in range(10) for pair in ((a[i], b[i]), (b[i], a[i]))}
    assert set(questions) == orders and len(questions) == 20


def test_a_judge_that_always_prefers_the_first_answer_gives_a_half(judge):
    found, *_ = judge(lambda *_: "[[A]]", ["right"] * 8, ["wrong"] * 8)
    assert found["scores"]["A"]["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert found["first_position"] == 1 and found["inconsistent"] == 1 and found["ties"] == 0


def test_the_same_command_resumes_and_asks_again_for_what_could_not_be_read(judge):
    """The first judge gives no verdict on prompt 0, and the server no answer on prompt 1."""

    def decide(request, prompt, first, second):
        if prompt == "Ask 1.":
            raise server.NoAnswer("the connection to the server failed")
        if prompt == "Ask 0.":
            return "[[A]] or [[B]]?"
        return the_better(request, prompt, first, second)

    a, b = ["right"] * 4, ["wrong"] * 4
    found, *_ = judge(decide, a, b)
    assert found["unreadable"] == 4 and found["prompts"] == 2
    found, _, questions = judge(the_better, a, b)
    assert found["unreadable"] == 0 and found["prompts"] == 4
    assert {prompt for prompt, *_ in questions} == {"Ask 0.", "Ask 1."} and len(questions) == 4
    assert not judge(the_better, a, b)[2]


def test_a_refused_key_ends_the_run_and_keeps_the_verdicts(judge, tmp_path):
    left = [True] * 5

    def decide(*question):
        if not left:
            raise server.Stop("the server answered with status 401")
        left.pop()
        return the_better(*question)

    _, printed, _ = judge(decide, ["right"] * 5, ["wrong"] * 5, "--concurrency", 1)
    assert "status 401" in printed and "resumes" in printed
    assert len(read_jsonl(tmp_path / "verdicts.jsonl")) == 5
    found, _, questions = judge(the_better, ["right"] * 5, ["wrong"] * 5)
    assert found["scores"]["A"]["win_rate"]["value"] == 1 and len(questions) == 5


def test_a_server_that_never_answers_ends_the_run(judge):
    def decide(*_):
        raise server.NoAnswer("the server did not answer in time")

    _, printed, questions = judge(decide, ["right"] * 50, ["wrong"] * 50)
    assert "10 times in succession" in printed and len(questions) < 60


def test_a_model_that_takes_no_temperature_can_judge(judge):
    def decide(request, *shown):
        if "temperature" in request:
            raise server.Refused(400, "temperature")
        return the_better(request, *shown)

    found, *_ = judge(decide, ["right"], ["wrong"])
    assert found["scores"]["A"]["win_rate"]["value"] == 1


def test_other_answers_need_another_file_and_prompts_must_be_shared(judge):
    judge(the_better, ["right"], ["wrong"])
    assert "another --out" in judge(the_better, ["right too"], ["wrong"])[1]
    assert "1 that only one file answers" in judge(the_better, ["right"], ["wrong", "wrong"])[1]
    assert "must hold a list" in judge(the_better, [], ["wrong"])[1]
    assert "needs output" in judge(the_better, [None], ["wrong"])[1]
    assert "--base_url" in judge(the_better, ["right"], ["wrong"], "--base_url", "localhost")[1]


ANSWERS = "extras.benchmarks.answers"


def test_answers_to_alpaca_eval(tmp_path, untrained):
    rows = [{"instruction": "Go.", "dataset": "d"}, {"instruction": "No."}]
    questions = write(tmp_path / "eval.jsonl", rows)
    output(f"{ANSWERS} {untrained} {tmp_path}/tiny.json --prompts {questions} --response_length 5")
    tokenizer, loaded = policy.load(untrained)
    texts, _ = respond(loaded, tokenizer, ["Go.", "No."], 5, temperature=0)
    expected = [row | {"output": text, "generator": "tiny"} for row, text in zip(rows, texts)]
    assert json.loads((tmp_path / "tiny.json").read_text()) == expected


@pytest.mark.usefixtures("posts")
def test_answers_to_held_out_prompts_can_be_judged(tmp_path, untrained):
    output(f"{ANSWERS} {untrained} {tmp_path}/out.json --eval_samples 3 --response_length 4")
    assert len(win_rate.read_answers(str(tmp_path / "out.json"))) == 3


def test_answers_to_mt_bench_see_the_turns_before(tmp_path, untrained):
    """As gen_judgment.py reads them; the second answer follows the first turn and its answer."""
    turns = ["My name is Ana.", "I live in Porto."]
    question = {"question_id": 81, "category": "math", "turns": turns}
    questions = write(tmp_path / "question.jsonl", [question])
    output(f"{ANSWERS} {untrained} {tmp_path}/tiny.jsonl --prompts {questions} --response_length 6")
    [row] = read_jsonl(tmp_path / "tiny.jsonl")
    assert (row["question_id"], row["model_id"]) == (81, "tiny") and row["answer_id"]
    [choice] = row["choices"]
    contents = [turns[0], choice["turns"][0], turns[1]]
    roles = ("user", "assistant", "user")
    chat = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    tokenizer, loaded = policy.load(untrained)
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    batch = tokenizer([text], add_special_tokens=False, return_tensors="pt")
    ids = loaded.generate(**batch, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert choice["index"] == 0 and choice["turns"][1] == expected.strip()


HUB = {"question": "2 + 2?", "choices": {"text": ["3", "4"], "label": ["1", "2"]}, "answerKey": "2"}
PLAIN = {"query": "Question: 2 + 2?", "choices": ["3", "4"], "gold": 1}


@pytest.mark.parametrize("row", [HUB, PLAIN])
def test_both_forms_of_arc_are_the_same_question(row):
    files = [Path(arc.__file__).with_name(f"arc_{name}.yaml") for name in ("local", "letters")]
    local, letters = (yaml.safe_load(file.read_text()) for file in files)

    def rendered(field):
        tasks = (local, local | letters)
        return [Environment().from_string(task[field]).render(row) for task in tasks]

    options = "Question: 2 + 2?\nA. 3\nB. 4\nAnswer:"
    assert rendered("doc_to_text") == ["Question: 2 + 2?\nAnswer:", options]
    assert rendered("doc_to_choice") == ["['3', '4']", "['A', 'B']"]
    assert rendered("doc_to_target") == ["1", "1"]


def test_arc_by_the_harness(tmp_path, untrained):
    pytest.importorskip("lm_eval")
    file = write(tmp_path / "arc.jsonl", [PLAIN, PLAIN])
    result = result_of(output(f"extras.benchmarks.arc {untrained} --data {file} --letters"))
    found = result["scores"][str(untrained)]
    assert found["acc"]["value"] in (0, 1) and found["acc_norm"]["value"] == found["acc"]["value"]
