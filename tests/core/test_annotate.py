"""Annotation by a server that fails in many ways: nothing is lost, paid twice or trusted."""

import gzip
import json
import os
import random
import signal
import time

import pytest
from annotating import flags, requests, texts, write
from fault_server import FAULTS, TEXT_FAULTS, annotation
from forking import forked

from t2g import annotator, server
from t2g.feedback import FeedbackError
from t2g.log import read_jsonl
from t2g.notes import Notes, read_responses

NOWHERE = "http://127.0.0.1:9/v1"


@pytest.fixture
def annotate(call, tmp_path):
    """annotate(url, records, *flags) returns the exit code, the output and the records written."""

    def run(url, records, *more):
        code, printed = call(*flags(url, tmp_path, records, *more))
        out = tmp_path / "out.jsonl"
        return code, printed, read_jsonl(out) if out.exists() else []

    return run


# ---- failures ----------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [150, pytest.param(500, marks=pytest.mark.slow)])
def test_three_kills_and_a_failing_server_lose_nothing_and_repeat_nothing(serve, tmp_path, count):
    """30% of the requests fail, in all ways. No record that was written is asked about again."""
    records, rng, kills = texts(count), random.Random(0), []
    url, log = serve(rate=0.3)
    arguments = flags(url, tmp_path, records, "--max_retries", 8, "--task", "summarize")
    out, ids = tmp_path / "out.jsonl", {record["response"]: record["id"] for record in records}
    for wanted in sorted(rng.sample(range(20, count - 20), 3)):
        process = forked("annotate", arguments, errors=os.devnull)
        while not out.exists() or out.read_bytes().count(b"\n") < wanted:
            assert process.is_alive(), "the program ended before the kill"
            time.sleep(0.005)
        process.kill()
        process.join()
        time.sleep(0.05)  # until the server has logged the last request
        lines = out.read_bytes().split(b"\n")[:-1]
        kills.append(({json.loads(line)["id"] for line in lines}, len(log())))
        assert wanted <= len(kills[-1][0]) == len(lines) < count
    process = forked("annotate", arguments)
    process.join()
    written = read_jsonl(out)
    assert process.exitcode == 0
    assert sorted(record["id"] for record in written) == sorted(ids.values())
    for kept, before in kills:
        assert not kept & {ids[line["response"]] for line in requests(log()[before:])}
    assert {line["fault"] for line in requests(log())} == {None, *FAULTS}
    answers = [line for line in log() if line["what"] == "answer"]
    assert count <= len(answers) <= count + 3 * 32, "only requests on their way are paid twice"
    for record in written:
        valid = annotation(record["response"])
        assert record["status"] == "ok" and {key: record[key] for key in valid} == valid


@pytest.mark.parametrize("fault", TEXT_FAULTS)
def test_the_annotator_is_told_its_fault_and_the_record_fails_with_it(serve, annotate, fault):
    url, log = serve(rate=1, faults=[fault])
    _, _, [record] = annotate(url, texts(1), "--max_retries", 2)
    first, second, third = (line["asked"]["messages"] for line in requests(log()))
    assert len(first) == 1 and len(second) == len(third) == 3 and second[0] == first[0]
    assert TEXT_FAULTS[fault] in second[2]["content"] and TEXT_FAULTS[fault] in record["reason"]
    assert record["usage"] == {"prompt_tokens": 300, "completion_tokens": 150}
    fields = ("status", "critique", "good_spans", "poor_spans")
    assert [record[field] for field in fields] == ["failed", "", [], []]


def test_retry_failed_asks_about_failed_records_only_and_the_later_counts(serve, annotate):
    url, log = serve(poison="end3.")
    before = annotate(url, texts(6), "--max_retries", 1)[2]
    [failed] = [record for record in before if record["status"] == "failed"]
    assert failed["id"] == "r3" and "500" in failed["reason"] and len(before) == 6
    url, log = serve()
    assert annotate(url, texts(6))[2] == before and not log()
    for _ in range(2):
        _, printed, after = annotate(url, texts(6), "--retry_failed")
        assert len(requests(log())) == 1 and after[:6] == before and "0 failed" in printed
        assert (after[6]["id"], after[6]["status"]) == ("r3", "ok") and len(after) == 7


@pytest.mark.parametrize("status", [None, 500, 401, 404])
def test_a_server_that_never_answers_ends_the_run_and_no_record_fails(serve, annotate, status):
    """The body of a server's error contains the key; call() checks the output for it."""
    url, log = serve(status=status) if status else (NOWHERE, list)
    code, printed, written = annotate(url, texts(100), "--max_retries", 1)
    assert code == 2 and str(status or "connection") in printed and not written
    assert ("10 records in a row" in printed) == (status in (None, 500))
    assert len(log()) <= (2 * (32 + 10) if status == 500 else 32)
    assert not any(text["response"] in printed for text in texts(100))
    code, printed, written = annotate(url, texts(1), "--max_retries", 1)
    assert code == 2 and "check the address" in printed and not written


USUAL = {"max_tokens", "temperature"}
REFUSED = [  # options that the server refuses, and what the requests then have
    (["json_schema"], {"type": "json_object"}, USUAL),
    (["response_format"], None, USUAL),
    (["max_tokens"], annotator.JSON_SCHEMA, {"max_completion_tokens"}),
    (["temperature", "response_format"], None, {"max_completion_tokens"}),
]


@pytest.mark.parametrize(("refuses", "form", "options"), REFUSED)
def test_refused_options_are_dropped_for_all_records(serve, annotate, refuses, form, options):
    url, log = serve(refuses=refuses)
    _, printed, _ = annotate(url, texts(6), "--concurrency", 1)
    assert printed.count("refuses some options") == 1 and "0 failed" in printed
    asked = [line["asked"] for line in requests(log())]
    assert len(asked) <= 6 + 5 and asked[0]["response_format"] == annotator.JSON_SCHEMA
    for request in asked[-6:]:
        assert request.get("response_format") == form
        assert set(request) - {"model", "messages", "response_format"} == options


# ---- money -------------------------------------------------------------------------------------
PRICES = ("--input_price", 1, "--output_price", 2, "--max_tokens", 60)


def test_a_budget_is_never_exceeded_and_a_larger_one_continues(serve, annotate):
    """An answer costs 100 + 50 tokens, 0.0002; a request at most about 2000 + 60, 0.002.

    So requests must wait for the answers to earlier ones, or the run would end much too early.
    """
    url, log = serve(usage=[100, 50], seconds=0.02)
    code, printed, written = annotate(url, texts(60), *PRICES, "--budget", 0.008)
    assert code == 0 and f"{60 - len(written)} records are left" in printed
    assert 0.004 < len(written) * 0.0002 <= 0.008 and len(requests(log())) == len(written)
    annotate(url, texts(60), *PRICES, "--budget", 0.008)
    assert len(requests(log())) == len(written), "earlier runs count"
    _, printed, _ = annotate(url, texts(60), *PRICES, "--budget", 1)
    assert "60 records, 0 failed, 9000 tokens, 0.0120 spent" in printed
    assert len(requests(log())) == 60


def test_a_budget_holds_if_every_answer_is_as_long_as_possible(serve, annotate):
    url, log = serve(usage=[3000, 60], seconds=0.02)
    price = ("--output_price", 100, "--max_tokens", 60, "--budget", 0.1)
    assert len(annotate(url, texts(60), *price)[2]) == 16 == len(requests(log()))  # 0.006 each


def test_an_answer_without_plausible_usage_costs_the_worst_case(serve, annotate):
    url, _ = serve(usage=["7", None])
    usage = annotate(url, texts(1), "--max_tokens", 60)[2][0]["usage"]
    assert usage["completion_tokens"] == 60 and usage["prompt_tokens"] > 1000
    for count in [10**400, -1, True, "7", None, float("inf"), 2e9]:
        usage = {"prompt_tokens": 3.0, "completion_tokens": count}
        body = {"choices": [{"message": {"content": ""}}], "usage": usage}
        assert server.read(json.dumps(body).encode()).tokens is None
    usage["completion_tokens"] = 4
    assert server.read(json.dumps(body).encode()).tokens == (3, 4)


def test_a_server_may_write_its_text_in_parts():
    parts = [{"type": "thinking", "text": "Hm."}, {"type": "text", "text": "Yes."}]
    for content, text in ((parts, "Yes."), ("Yes.", "Yes."), (None, ""), (5, None), ([5], None)):
        answer = server.read(json.dumps({"choices": [{"message": {"content": content}}]}).encode())
        assert (answer and answer.text) == text


# ---- the file ----------------------------------------------------------------------------------
@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_half_written_last_line_is_cut_off_and_asked_again(serve, annotate, tmp_path, cut):
    """Without its line break alone, a line is complete."""
    url, log = serve()
    annotate(url, texts(3))
    out, count = tmp_path / "out.jsonl", len(log())
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:2]) + lines[2][:cut])
    _, printed, _ = annotate(url, texts(3))
    assert ("half-written" in printed) == (cut != -1)
    assert sorted(out.read_text().splitlines(keepends=True)) == sorted(lines)
    assert len(log()) == count + 2 * (cut != -1)


def test_a_file_of_other_records_or_of_another_process_is_refused(serve, call, annotate, tmp_path):
    url, log = serve()
    written, asked = annotate(url, texts(2))[2], len(log())
    code, printed, after = annotate(url, [{**texts(2)[0], "response": "another one"}])
    assert code == 2 and "another prompt or response" in printed and after == written
    with Notes(tmp_path / "out.jsonl"):
        assert "another process" in annotate(url, texts(2))[1]
    write(tmp_path / "out.jsonl", [{"text": "a"}])
    assert "no id" in annotate(url, texts(2))[1] and len(log()) == asked
    for content in (json.dumps([{"id": "a"}], indent=1).encode(), b"notes", gzip.compress(b"{}")):
        (tmp_path / "out.jsonl").write_bytes(content)
        code, printed = call(*flags(url, tmp_path, texts(2)))
        assert code == 2 and "not a file of annotations" in printed
        assert (tmp_path / "out.jsonl").read_bytes() == content


def test_a_full_disk_ends_the_run_and_the_next_run_continues(serve, annotate, tmp_path):
    (url, _), errors = serve(), tmp_path / "errors"
    given = flags(url, tmp_path, texts(20))
    process = forked("annotate", given, file_size=3000, errors=errors)
    process.join()
    assert process.exitcode == 2 and "free some space" in errors.read_text()
    _, printed, written = annotate(url, texts(20))
    assert "half-written" in printed and len(written) == 20


@pytest.fixture
def interruptible():
    """SIGINT, which background jobs ignore, raises KeyboardInterrupt during the test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_and_the_same_command_continues(serve, annotate, monkeypatch):
    url, log = serve(seconds=0.1)
    add = Notes.add

    def interrupted(notes, record):
        add(notes, record)
        if len(notes.records) == 8:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Notes, "add", interrupted)
    code, printed, written = annotate(url, texts(40), "--concurrency", 4)
    before, responses = len(log()), {record["response"] for record in written}
    assert code == 130 and "same command" in printed and 8 <= len(written) < 40
    code, _, written = annotate(url, texts(40))
    assert code == 0 and len(written) == 40
    assert not {line["response"] for line in requests(log()[before:])} & responses


def test_invalid_responses_are_refused(tmp_path, refused):
    record = {"id": "1", "prompt": "p", "response": "r"}
    faults = {
        "no records": [],
        "no id": [record | {"id": 1.5}],
        "the id of an earlier one": [record | {"id": i} for i in (1, "1")],
        "no prompt": [{"id": "1", "response": "r"}],
    }
    for fault, records in faults.items():
        assert fault in refused(read_responses, write(tmp_path / "in.jsonl", records))


def test_other_fields_are_kept_and_those_of_an_earlier_annotator_are_not(serve, annotate):
    url, log = serve()
    old = {"critique": "old", "kinds": ["old"], "usage": {"prompt_tokens": 7}}
    new = {"test_log": "FAILED: 1 != 2", "extra": [1]}
    _, _, [record] = annotate(url, [{**texts(1)[0], **old, **new}])
    assert record["extra"] == [1] and "kinds" not in record and record["critique"] != "old"
    assert record["usage"] == {"prompt_tokens": 100, "completion_tokens": 50}
    asked = requests(log())[0]["asked"]["messages"][0]["content"]
    assert "### Log of the unit tests\nFAILED: 1 != 2" in asked


# ---- valid and invalid answers -----------------------------------------------------------------
ANSWER = {"reasoning": "r", "critique": " It is 41. ", "good_spans": [], "poor_spans": []}
RESPONSE = "Ana  is 27, “Porto” and 27."


def read(text="", **fields):
    return annotator.read_annotation(text or json.dumps(ANSWER | fields), RESPONSE, 2)


def test_quotes_are_spelled_as_in_the_response():
    fields = read(good_spans=["ana is 27", '"Porto"'], poor_spans=["27"])
    assert fields["good_spans"] == ["Ana  is 27", "“Porto”"] and fields["poor_spans"] == ["27"]
    assert list(fields) == list(ANSWER) and fields["critique"] == "It is 41."


def test_text_around_the_json_is_ignored():
    assert read(f"Here it is:\n```json\n{json.dumps(ANSWER)}\n```") == read()
    tag = {**ANSWER, "critique": "It closes </think> too late."}
    for thoughts in ("", "<think>so</think>", "<think>{so}</think>"):
        assert read(thoughts + json.dumps(tag))["critique"] == tag["critique"]


INVALID = [
    *[dict(good_spans=quotes) for quotes in (["Ana is 28"], [" "], None)],
    *[dict(poor_spans=quotes) for quotes in (["27"] * 3, [{"text": "27", "severity": 1}])],
    *[dict(critique="  "), dict(critique=["a"]), dict(reasoning=None)],
    *[dict(text=text) for text in ("{", "[]", "}{", "{" * 9999 + "}", "null", "no {json}")],
]


@pytest.mark.parametrize("fields", INVALID)
def test_invalid_answers_are_refused_without_words_of_the_response(fields):
    with pytest.raises(FeedbackError) as fault:
        read(**fields)
    assert "Ana" not in str(fault.value)


def test_lone_surrogates_in_an_answer_stop_nothing(serve, annotate):
    for answer in ("\ud83d", json.dumps(ANSWER | {"reasoning": "\ud83d"})):
        url, _ = serve(answer=answer)
        assert "1 failed" in annotate(url, texts(1), "--max_retries", 1)[1]
