"""Annotation by a server that fails in many ways, by programs and by people: nothing is lost, paid twice or taken on trust."""

import asyncio
import json
import os
import random
import resource
import signal
import threading
import time

import pytest
from annotating import KEY, flags, requests, texts, write
from fault_server import FAULTS, TEXT_FAULTS, annotation
from forking import forked

from t2g import annotator, server
from t2g.feedback import FeedbackError
from t2g.log import read_jsonl
from t2g.notes import Notes, read_responses

# ---- a server that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [200, pytest.param(500, marks=pytest.mark.slow)])
def test_killed_three_times_over_a_failing_server_it_loses_nothing_and_asks_nothing_twice(
    serve, tmp_path, count
):
    """30% faults of all kinds. What stands in --out is never asked again; each record stands there once, and well."""
    records, rng = texts(count), random.Random(0)
    url, log = serve(rate=0.3)
    light = ("--task", "summarize")  # it loads faster than the toy
    arguments = flags(url, tmp_path, records, "--max_retries", 8, *light)
    out, ids, kills = (
        tmp_path / "out.jsonl",
        {record["response"]: record["id"] for record in records},
        [],
    )
    for wanted in sorted(rng.sample(range(20, count - 20), 3)):
        process = forked("annotate", arguments, errors=os.devnull)
        while not out.exists() or out.read_bytes().count(b"\n") < wanted:
            assert process.is_alive(), "it ended before its time"
            time.sleep(0.005)
        process.kill()
        process.join()
        time.sleep(0.05)  # until the server has noted what came last
        whole = out.read_bytes().split(b"\n")[:-1]
        kills.append(({json.loads(line)["id"] for line in whole}, len(log())))
        assert wanted <= len(kills[-1][0]) == len(whole) < count
    process = forked("annotate", arguments, errors=tmp_path / "errors")
    process.join()
    assert process.exitcode == 0, (tmp_path / "errors").read_text()[-3000:]

    stands = read_jsonl(out)
    assert [r["status"] for r in stands] == ["ok"] * count and {r["id"] for r in stands} == set(
        ids.values()
    )
    for there, before in kills:
        assert not there & {ids[line["response"]] for line in requests(log()[before:])}, (
            "asked again"
        )
    assert {line["fault"] for line in requests(log())} == {None, *FAULTS}
    answers = [ids[line["response"]] for line in log() if line["what"] == "answer"]
    assert count <= len(answers) <= count + 3 * 32, (
        "only what was on its way at a kill may be paid twice"
    )
    for record in stands:
        expected = annotation(record["response"])
        assert {name: record[name] for name in expected} == expected


def test_without_a_kill_each_good_answer_is_a_record(serve, tmp_path, call):
    url, log = serve(rate=0.3)
    code, printed = call(*flags(url, tmp_path, texts(150), "--max_retries", 9))
    stands = read_jsonl(tmp_path / "out.jsonl")
    assert code == 0 and "150 records, 0 failed" in printed and len(stands) == 150
    assert sum(line["what"] == "answer" for line in log()) == 150
    assert {line["fault"] for line in requests(log())} == {None, *FAULTS}


@pytest.mark.parametrize("fault", TEXT_FAULTS)
def test_an_answer_of_no_use_is_asked_for_again_with_its_fault_named_and_then_the_record_has_failed(
    serve, tmp_path, call, fault
):
    url, log = serve(rate=1, faults=[fault])
    call(*flags(url, tmp_path, texts(1), "--max_retries", 2))
    first, second, third = (line["asked"]["messages"] for line in requests(log()))
    assert len(first) == 1 and len(second) == len(third) == 3 and second[0] == first[0]
    (record,) = read_jsonl(tmp_path / "out.jsonl")
    said = {
        "no json": "no JSON",
        "too long": "no JSON",
        "no content": "no JSON",
        "wrong quote": "quote 1 of good_spans",
        "wrong types": "a list of texts",
        "length": "cut off",
        "no critique": "critique is empty",
        "many quotes": "holds 9 quotes",
    }[fault]
    assert said in second[2]["content"] and said in record["reason"]
    assert record["status"] == "failed" and record["usage"] == {
        "prompt_tokens": 300,
        "completion_tokens": 150,
    }
    assert (record["critique"], record["good_spans"], record["poor_spans"]) == ("", [], [])


def test_failed_records_are_asked_again_when_told_so_and_replaced(serve, tmp_path, call):
    """A record that the server cannot answer has failed, for it answers the others; the new outcome takes its place."""
    ill, log = serve(poison="end3.")
    call(*flags(ill, tmp_path, texts(6), "--max_retries", 1))
    before = {record["id"]: record for record in read_jsonl(tmp_path / "out.jsonl")}
    assert [id for id, record in before.items() if record["status"] == "failed"] == ["r3"] and len(
        before
    ) == 6
    assert "status 500" in before["r3"]["reason"]
    well, log = serve()
    assert "1 failed" in call(*flags(well, tmp_path, texts(6)))[1] and not log(), (
        "a failed record stays unless told otherwise"
    )
    call(*flags(well, tmp_path, texts(6), "--retry_failed"))
    after = read_jsonl(tmp_path / "out.jsonl")
    assert [line["response"][0] for line in requests(log())] == ["3"]
    assert len(after) == 6 and {record["id"]: record["status"] for record in after} == {
        f"r{n}": "ok" for n in range(6)
    }
    assert [record for record in after if record["id"] != "r3"] == [
        record for id, record in before.items() if id != "r3"
    ]


def test_a_kill_between_a_new_outcome_and_the_end_leaves_both_and_the_later_one_counts(tmp_path):
    old, new = (
        {"id": "a", "prompt": "p", "response": "r", "status": status} for status in ("failed", "ok")
    )
    write(tmp_path / "out.jsonl", [old, new])
    with Notes(tmp_path / "out.jsonl") as notes:
        assert notes.left([{"id": "a", "prompt": "p", "response": "r"}], retry_failed=True) == []
    assert read_jsonl(tmp_path / "out.jsonl") == [new]


def test_a_server_that_is_not_there_ends_the_run_and_writes_nothing(tmp_path, call):
    code, printed = call(*flags("http://127.0.0.1:9/v1", tmp_path, texts(3), "--max_retries", 1))
    assert code == 2 and "the connection to the server failed" in printed
    assert read_jsonl(tmp_path / "out.jsonl") == []


def test_a_server_that_answers_no_more_ends_the_run(serve, tmp_path, call):
    url, _ = serve(status=500)
    code, printed = call(*flags(url, tmp_path, texts(40), "--max_retries", 1))
    assert code == 2 and "status 500, and so for 10 records in succession" in printed
    assert read_jsonl(tmp_path / "out.jsonl") == []


def test_an_answer_that_comes_byte_by_byte_is_waited_for_no_longer_than_the_timeout(
    serve, tmp_path, call
):
    """A byte every 0.1 s, for 20 s, is never late by itself. The client asks again as after any time-out."""
    url, log = serve(trickle=200)
    start = time.perf_counter()
    code, printed = call(*flags(url, tmp_path, texts(1), "--max_retries", 1))
    assert code == 2 and "did not answer in time" in printed and len(requests(log())) == 2
    assert time.perf_counter() - start < 8
    assert "0 failed" in call(*flags(serve(trickle=2)[0], tmp_path, texts(1)))[1]


@pytest.mark.parametrize(
    ("status", "said"), [(401, "does not accept the key"), (403, "forbids"), (404, "no such model")]
)
def test_what_is_hopeless_ends_the_run_at_once_and_the_key_is_never_told(
    serve, tmp_path, call, status, said
):
    """The server sends the key back in its body."""
    url, log = serve(status=status)
    code, printed = call(*flags(url, tmp_path, texts(100), "--concurrency", 4))
    assert code == 2 and said in printed and len(log()) <= 4
    assert KEY not in (tmp_path / "out.jsonl").read_text()
    assert not any(text["response"] in printed or text["prompt"] in printed for text in texts(100))


def test_without_a_key_openai_is_not_asked(tmp_path, call, monkeypatch):
    write(tmp_path / "in.jsonl", texts(1))
    monkeypatch.delenv("OPENAI_API_KEY")
    assert (
        "set OPENAI_API_KEY"
        in call(
            "--responses", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", "--model", "m"
        )[1]
    )
    assert "no address of a server" in call(*flags("localhost:8000", tmp_path, texts(1)))[1]
    assert (
        "--model is missing" in call("--responses", tmp_path / "in.jsonl", "--critic", "openai")[1]
    )


@pytest.mark.parametrize(
    ("settings", "format", "options"),
    [
        (dict(refuses=["json_schema"]), {"type": "json_object"}, {"max_tokens", "temperature"}),
        (dict(refuses=["response_format"], names_them=False), None, {"max_tokens", "temperature"}),
        (dict(refuses=["response_format"]), None, {"max_tokens", "temperature"}),
        (
            dict(refuses=["max_tokens", "temperature"]),
            annotator.JSON_SCHEMA,
            {"max_completion_tokens"},
        ),
    ],
)
def test_options_that_the_server_refuses_are_given_up_once_for_all(
    serve, tmp_path, call, settings, format, options
):
    url, log = serve(**settings)
    _, printed = call(*flags(url, tmp_path, texts(6), "--concurrency", 1))
    assert printed.count("refuses some options") == 1 and "0 failed" in printed
    asked = [line["asked"] for line in requests(log())]
    assert len(asked) <= 6 + 2 and asked[0]["response_format"] == annotator.JSON_SCHEMA
    for request in asked[-6:]:
        assert request.get("response_format") == format
        assert set(request) - {"model", "messages", "response_format"} == options


def test_a_record_that_is_refused_later_costs_the_others_no_option(serve, tmp_path, call):
    """Only before the server has answered at all may its options be at fault."""
    url, log = serve(refuses=["json_schema"])
    meter = server.Meter((0, 0), None, (0, 0))
    args = annotate_args(max_retries=1)
    asking = annotator.Annotator(server.client(url, 5, 0), args, "", meter)
    asking.answered = True
    with pytest.raises(server.Refused):
        asyncio.run(asking.ask([{"role": "user", "content": "### Response\na b"}]))
    assert len(log()) == 1 and asking.options["response_format"] == annotator.JSON_SCHEMA


def annotate_args(**given):
    defaults = dict(model="m", max_tokens=10, annotator_temperature=0.3, max_spans=2, max_retries=1)
    return type("Args", (), defaults | given)


# ---- money -------------------------------------------------------------------------------------------------------------


def test_a_budget_is_never_passed_and_a_larger_one_goes_on(serve, tmp_path, call):
    """Each answer costs 100 + 50 tokens, 0.0002; a request at worst about 2000 + 60."""
    url, log = serve(usage=[100, 50], seconds=0.02)
    prices = ("--input_price", 1, "--output_price", 2, "--max_tokens", 60)
    code, printed = call(*flags(url, tmp_path, texts(60), *prices, "--budget", 0.008))
    stands = read_jsonl(tmp_path / "out.jsonl")
    assert (
        code == 0
        and "could pass the budget" in printed
        and f"{60 - len(stands)} records are left" in printed
    )
    assert 0.004 < len(stands) * 0.0002 <= 0.008 and len(requests(log())) == len(stands)
    assert all(
        record["usage"] == {"prompt_tokens": 100, "completion_tokens": 50} for record in stands
    )

    code, printed = call(*flags(url, tmp_path, texts(60), *prices, "--budget", 0.008))
    assert code == 0 and len(requests(log())) == len(stands), "what earlier runs spent counts"
    code, printed = call(*flags(url, tmp_path, texts(60), *prices, "--budget", 1))
    assert (
        code == 0
        and "60 records, 0 failed, 6000 + 3000 tokens, 0.0120 spent" in printed
        and len(requests(log())) == 60
    )


def test_a_budget_holds_when_every_answer_costs_all_that_it_may(serve, tmp_path, call):
    url, log = serve(
        usage=[3000, 60], seconds=0.02
    )  # more than the bytes of the prompt could ever be tokens
    call(
        *flags(
            url,
            tmp_path,
            texts(60),
            "--input_price",
            0,
            "--output_price",
            100,
            "--max_tokens",
            60,
            "--budget",
            0.1,
        )
    )
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 16 == len(requests(log()))  # 0.006 each


def test_a_request_waits_until_its_worst_case_fits_the_budget():
    meter = server.Meter((1, 1), 1e-3, (0, 0))

    async def go():
        await meter.begin((400, 100))
        await meter.begin((400, 100))
        third = asyncio.create_task(meter.begin((400, 90)))
        await asyncio.sleep(0.01)
        assert not third.done()
        await meter.end((400, 100), (5, 5))
        await asyncio.wait_for(third, 5)
        await meter.end((400, 100), (400, 100))
        await meter.end((400, 90), (1, 1))
        with pytest.raises(server.OverBudget):
            await asyncio.wait_for(meter.begin((400, 100)), 5)

    asyncio.run(go())
    assert meter.tokens == (406, 106)


def test_an_answer_that_cannot_be_read_is_charged_in_full(serve, tmp_path, call):
    url, log = serve(rate=1, faults=["empty body"])
    call(*flags(url, tmp_path, texts(1), "--max_retries", 1, "--max_tokens", 60))
    (record,) = read_jsonl(tmp_path / "out.jsonl")
    assert (
        record["usage"]["completion_tokens"] == 2 * 60
        and record["usage"]["prompt_tokens"] > 2 * 1000
    )
    assert (
        len(requests(log())) == 2
        and record["reason"] == "the server's answer was no chat completion"
    )


@pytest.mark.parametrize(
    "count",
    [pytest.param(10**400, id="huge"), -1, True, 1.5, "7", None, float("nan"), float("inf"), 2e9],
)
def test_a_usage_that_is_none_is_not_believed(count):
    body = {
        "choices": [{"message": {"content": ""}}],
        "usage": {"prompt_tokens": 3.0, "completion_tokens": 4},
    }
    assert server.read(json.dumps(body).encode()).tokens == (3, 4)
    body["usage"]["completion_tokens"] = count
    assert server.read(json.dumps(body).encode()).tokens is None


def test_a_budget_needs_prices(tmp_path, call):
    assert (
        "--budget needs --input_price"
        in call(*flags("http://127.0.0.1:9", tmp_path, texts(1), "--budget", 1))[1]
    )


def test_a_dry_run_shows_a_prompt_and_the_cost_and_asks_nothing(serve, tmp_path, call):
    url, log = serve()
    records = texts(10)
    prices = ("--input_price", 1000, "--output_price", 2000, "--max_tokens", 100)
    code, printed = call(*flags(url, tmp_path, records, "--dry_run", *prices))
    asked = annotator.question(records[0], annotator.CRITERIA, 2)
    assert code == 0 and asked in printed and not log() and not (tmp_path / "out.jsonl").exists()
    tokens = sum(len(annotator.question(r, annotator.CRITERIA, 2)) for r in records) // 4
    assert (
        f"10 records to ask for: about {tokens} tokens" in printed
        and f"{(tokens + 2 * 1000) / 1000:.4f} at most" in printed
    )


# ---- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_half_written_last_line_is_cut_off_and_its_record_asked_again(serve, tmp_path, call, cut):
    """At -1 all of the line but its end stands there: it is whole."""
    url, log = serve()
    call(*flags(url, tmp_path, texts(3)))
    out, count = tmp_path / "out.jsonl", len(log())
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:2]) + lines[2][:cut])
    _, printed = call(*flags(url, tmp_path, texts(3)))
    assert ("half written" in printed) == (cut != -1)
    assert sorted(out.read_text().splitlines()) == sorted("".join(lines).splitlines())
    assert len(log()) == count + 2 * (cut != -1)


def test_a_file_of_other_records_is_refused(serve, tmp_path, call):
    url, log = serve()
    call(*flags(url, tmp_path, texts(2)))
    changed = [{**texts(2)[0], "response": "another one"}, texts(2)[1]]
    stood, asked = (tmp_path / "out.jsonl").read_text(), len(log())
    code, printed = call(*flags(url, tmp_path, changed))
    assert code == 2 and "holds the id r0 with another prompt or response" in printed
    assert (tmp_path / "out.jsonl").read_text() == stood and len(log()) == asked
    write(tmp_path / "out.jsonl", [{"text": "a"}])
    assert "no file of annotations" in call(*flags(url, tmp_path, texts(2)))[1]
    code, printed = call(
        "--responses",
        tmp_path / "in.jsonl",
        "--out",
        tmp_path / "in.jsonl",
        "--model",
        "m",
        "--base_url",
        url,
    )
    assert code == 2 and "--out is the file of --responses" in printed


def test_two_processes_do_not_write_one_file(serve, tmp_path, call):
    url, log = serve()
    with Notes(tmp_path / "out.jsonl"):
        code, printed = call(*flags(url, tmp_path, texts(2)))
    assert code == 2 and "another process is writing" in printed and not log()


def test_a_full_disk_is_told_and_what_stands_there_can_be_gone_on_from(serve, tmp_path, call):
    url, _ = serve()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # bytes a file
    try:
        code, printed = call(*flags(url, tmp_path, texts(20)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and "out.jsonl cannot be written (File too large)" in printed
    assert (
        "half written" in call(*flags(url, tmp_path, texts(20)))[1]
        and len(read_jsonl(tmp_path / "out.jsonl")) == 20
    )
    assert (
        "there is no file"
        in call("--responses", tmp_path / "none", "--out", tmp_path / "none.jsonl", "--model", "m")[
            1
        ]
    )


def test_ctrl_c_stops_and_the_same_command_goes_on(serve, tmp_path, call):
    url, log = serve(seconds=0.1)
    out, arguments = tmp_path / "out.jsonl", flags(url, tmp_path, texts(40), "--concurrency", 4)

    def interrupt():
        while not out.exists() or out.read_bytes().count(b"\n") < 8:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background of a shell is born deaf to it
    threading.Thread(target=interrupt, daemon=True).start()
    code, printed = call(*arguments)
    assert code == 130 and "the same command goes on" in printed
    stood = [record["response"] for record in read_jsonl(out)]
    before = len(log())
    assert 8 <= len(stood) < 40
    assert call(*arguments)[0] == 0 and len(read_jsonl(out)) == 40
    assert not {line["response"] for line in requests(log()[before:])} & set(stood)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([], "holds no record"),
        ([{"id": 1.5, "prompt": "p", "response": "r"}], "record 1 of"),
        ([{"id": i, "prompt": "p", "response": "r"} for i in (1, "1")], "the id of an earlier one"),
        ([{"id": "1", "response": "r"}], "has no prompt"),
        ([{"id": "1", "prompt": "p", "response": "r"}] * 2, "the id of an earlier one"),
        ([{"id": "1", "prompt": "p", "response": "\ud83d"}], "half of a surrogate pair"),
    ],
)
def test_responses_that_are_none(tmp_path, capsys, records, said):
    with pytest.raises(SystemExit):
        read_responses(write(tmp_path / "in.jsonl", records))
    assert said in capsys.readouterr().err


def test_a_whole_number_is_an_id_as_well(tmp_path):
    assert (
        read_responses(write(tmp_path / "in.jsonl", [{"id": 7, "prompt": "p", "response": "r"}]))[
            0
        ]["id"]
        == "7"
    )


def test_a_folder_of_responses_is_no_file(tmp_path, call):
    assert (
        "is a folder"
        in call("--responses", tmp_path, "--out", tmp_path / "out.jsonl", "--model", "m")[1]
    )


@pytest.mark.parametrize(
    "given", [("--severity",), ("--dry_run", "--critic", "rule"), ("--policy", "p")]
)
def test_flags_that_would_do_nothing_are_refused(tmp_path, call, given):
    code, printed = call(*flags("http://127.0.0.1:9", tmp_path, texts(1), *given))
    assert code == 2 and given[0] in printed and not (tmp_path / "out.jsonl").exists()


def test_further_fields_are_kept_and_what_an_earlier_annotator_wrote_is_not(serve, tmp_path, call):
    url, log = serve()
    old = {
        "critique": "old",
        "kinds": ["old"],
        "usage": {"prompt_tokens": 7},
        "test_log": "FAILED: 1 != 2",
        "extra": [1],
    }
    call(*flags(url, tmp_path, [{**texts(1)[0], **old}]))
    (record,) = read_jsonl(tmp_path / "out.jsonl")
    assert record["extra"] == [1] and "kinds" not in record and record["critique"] != "old"
    assert record["usage"] == {"prompt_tokens": 100, "completion_tokens": 50}
    assert (
        "### Log of the unit tests\nFAILED: 1 != 2"
        in requests(log())[0]["asked"]["messages"][0]["content"]
    )


# ---- what an annotator's answer may be -----------------------------------------------------------------------------------

SAID = {"reasoning": "r", "critique": " It is 41. ", "good_spans": [], "poor_spans": []}
RESPONSE = "Ana  is 27, “Porto” and 27."


def read(**fields):
    return annotator.read_annotation(json.dumps(SAID | fields), RESPONSE, 2)


def test_quotes_are_written_as_they_stand_in_the_response():
    said = read(good_spans=["ana is 27", '"Porto"'], poor_spans=["27"])
    assert (
        said["good_spans"] == ["Ana  is 27", "“Porto”"]
        and said["poor_spans"] == ["27"]
        and said["critique"] == "It is 41."
    )
    assert list(said) == ["reasoning", "critique", "good_spans", "poor_spans"]
    fenced = annotator.read_annotation(
        f"Here it is:\n```json\n{json.dumps(SAID)}\n```", RESPONSE, 2
    )
    assert fenced == read()
    assert (
        annotator.read_annotation(f"<think>{{so}}</think>{json.dumps(SAID)}", RESPONSE, 2) == read()
    )
    tag = {**SAID, "critique": "It ends its thoughts with </think> too late."}
    for thoughts in ("", "<think>so</think>", "<think>{so}</think>"):
        assert (
            annotator.read_annotation(thoughts + json.dumps(tag), RESPONSE, 2)["critique"]
            == tag["critique"]
        )


@pytest.mark.parametrize(
    "fields",
    [
        dict(good_spans=["Ana is 28"]),
        dict(good_spans=[" "]),
        dict(poor_spans=["27"] * 3),
        dict(poor_spans=[{"text": "27", "severity": 1}]),
        dict(poor_spans=[27]),
        dict(good_spans=None),
        dict(critique="  "),
        dict(critique=["a"]),
        dict(critique="\ud83d"),
        dict(reasoning=None),
    ],
)
def test_answers_that_are_no_annotation(fields):
    with pytest.raises(FeedbackError) as fault:
        read(**fields)
    assert "Ana" not in str(fault.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "}{", "{" * 9999 + "}", "null", "no {json} at all"]
)
def test_texts_that_are_no_json_object(text):
    with pytest.raises(FeedbackError):
        annotator.read_annotation(text, RESPONSE, 2)


def test_half_a_surrogate_pair_in_the_thoughts_is_let_go():
    assert read(reasoning="\ud83d")["reasoning"] == "?"


def test_half_a_surrogate_pair_in_an_answer_stops_nothing(serve, tmp_path, call):
    url, _ = serve(answer="\ud83d")
    assert "1 failed" in call(*flags(url, tmp_path, texts(1), "--max_retries", 1))[1]
