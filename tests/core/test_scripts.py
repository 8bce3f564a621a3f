"""The scripts as a stranger runs them: all stages in short, what they write, and one clear sentence for bad input."""

import argparse
import contextlib
import importlib
import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_ppo
import train_rm
from t2g.feedback import Feedback, quoted, reward_prompt
from t2g.log import METRICS, read_jsonl
from t2g.policy import latest_checkpoint
from t2g.rollout import Rollout
from t2g.tasks import toy

pytestmark = pytest.mark.usefixtures("posts")
ROOT = Path(__file__).parents[2]
SCRIPTS = (
    "train_sft",
    "annotate",
    "train_rm",
    "train_ppo",
    "eval",
)


def run(script, *flags):
    """What a script prints, run in this process, for Python takes seconds to start."""
    before, sys.argv, printed = sys.argv, [f"{script}.py", *map(str, flags)], io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            importlib.import_module(script).main()
    finally:
        sys.argv = before
    return printed.getvalue()


def run_as_a_stranger(script, *flags):
    done = subprocess.run(
        [sys.executable, ROOT / f"{script}.py", *map(str, flags)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """Every stage of the toy, a few steps each."""
    root = tmp_path_factory.mktemp("toy")
    short = ("--max_steps", 3, "--per_device_train_batch_size", 8)
    run("train_sft", *short, "--output_dir", root / "sft")
    run("annotate", "--num_samples", 24, "--out", root / "annotations.jsonl")
    run("train_rm", *short, "--output_dir", root / "rm")
    flags = (
        "--max_steps",
        2,
        "--per_device_train_batch_size",
        4,
        "--eval_samples",
        8,
        "--critique_length",
        20,
    )
    root.joinpath("stdout").write_text(
        run_as_a_stranger("train_ppo", "--output_dir", root / "ppo", *flags)
    )
    return root


def test_the_main_job_ends_with_its_result_as_json(toy_run):
    result = json.loads((toy_run / "stdout").read_text().splitlines()[-1])
    assert set(result) == {"before", "after", "seconds", "page"}
    assert (
        set(result["before"])
        == set(result["after"])
        >= {"coverage", "poor", "perfect", "coverage_greedy"}
    )
    assert result["seconds"]["ppo"] > 0 and Path(result["page"]).is_file()
    assert json.loads((toy_run / "ppo" / "result.json").read_text()) == result


@pytest.fixture(scope="module")
def rule_run(toy_run):
    """The same with the rule as the critic."""
    flags = (
        "--critic",
        "rule",
        "--max_steps",
        2,
        "--per_device_train_batch_size",
        4,
        "--eval_samples",
        4,
    )
    run("train_ppo", "--output_dir", toy_run / "ppo_rule", *flags)
    return toy_run / "ppo_rule"


def test_a_run_writes_its_config_and_a_line_of_known_metrics_a_step(rule_run):
    assert (
        json.loads((rule_run / "config.json").read_text())["kl_coef"]
        == toy.DEFAULTS["train_ppo"]["kl_coef"]
    )
    lines = read_jsonl(rule_run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert set(line) <= set(METRICS) | set(toy.METRICS)
    supervised = {"loss", "tokens", "padding", "validation_loss"}
    others = {
        "pairs",
        "texts",
        "pair_margin",
        "pair_accuracy",
        "validation_r2",
        "validation_rank",
        "divergence",
        "too_long",
        "teacher_tokens",
    }
    if_any = {name for name in METRICS if name.startswith("shift_")}
    assert (
        set(METRICS) - supervised - others - if_any <= set(lines[0]) and "shift_rest" in lines[0]
    ), "a metric that nothing logs"
    assert lines[0]["kl"] == 0 and lines[0]["first_ratio_error"] < 1e-4


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_checkpoints_load_as_plain_models(toy_run, stage):
    folder = latest_checkpoint(toy_run / stage)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi."}], return_tensors="pt", return_dict=True
    )["input_ids"]
    assert torch.isfinite(model(ids).logits).all()


def test_annotations_have_the_agreed_fields(toy_run):
    records = [
        json.loads(line) for line in (toy_run / "annotations.jsonl").read_text().splitlines()
    ]
    assert len(records) == len({r["id"] for r in records}) == 24
    assert set(records[0]) == {
        "id",
        "prompt",
        "response",
        "critique",
        "good_spans",
        "poor_spans",
        "status",
        "reason",
    }


def test_an_earlier_run_is_moved_aside_and_not_overwritten(toy_run):
    old = (toy_run / "sft" / "metrics.jsonl").read_text()
    for steps in (1, 2):
        run(
            "train_sft",
            "--max_steps",
            steps,
            "--per_device_train_batch_size",
            8,
            "--output_dir",
            toy_run / "sft_again",
        )
    assert len((toy_run / "sft_again.1" / "metrics.jsonl").read_text().splitlines()) == 1
    assert (toy_run / "sft" / "metrics.jsonl").read_text() == old


def test_same_seed_same_metrics(toy_run):
    """Two runs with one seed agree in everything but seconds and memory."""
    flags = (
        "--critic",
        "rule",
        "--max_steps",
        2,
        "--per_device_train_batch_size",
        4,
        "--eval_samples",
        4,
        "--seed",
        3,
    )
    flags += ("--response_length", 16)
    lines = []
    for name in ("a", "b"):
        run("train_ppo", "--policy", toy_run / "sft", "--output_dir", toy_run / name, *flags)
        rows = [
            json.loads(line) for line in (toy_run / name / "metrics.jsonl").read_text().splitlines()
        ]
        lines.append(
            [
                {k: v for k, v in row.items() if not k.startswith(("seconds", "peak"))}
                for row in rows
            ]
        )
    assert lines[0] == lines[1]


NOTE = {
    "prompt": "p",
    "response": "Ana is 27, lives in Porto, misses a son",
    "critique": "The age is 41.",
    "good_spans": [" Porto"],
    "poor_spans": [{"text": "27", "severity": 0.5}],
}


def learnt(tmp_path, **flags):
    """What the reward model would learn to write for NOTE."""
    (tmp_path / "notes.jsonl").write_text(json.dumps(NOTE))
    [(prompt, z)] = train_rm.read_pairs(tmp_path / "notes.jsonl", **flags)
    assert prompt == reward_prompt(NOTE["prompt"], NOTE["response"])
    return Feedback.parse(z)


def test_the_reward_model_may_learn_to_write_no_critique(tmp_path):
    assert learnt(tmp_path) == Feedback(NOTE["critique"], NOTE["good_spans"], NOTE["poor_spans"])
    assert learnt(tmp_path, no_critique=True) == Feedback(
        "", NOTE["good_spans"], NOTE["poor_spans"]
    )


def test_flags_of_weights_reach_the_rewards(tokenizers):
    tokenizer = tokenizers["byte_level"]
    response = torch.tensor([tokenizer.encode(NOTE["response"], add_special_tokens=False)])
    mask = torch.ones_like(response, dtype=torch.bool)
    rollout = Rollout(
        response[:, :0], mask[:, :0], response, mask, torch.ones(1).bool(), [NOTE["response"]]
    )
    said = [Feedback(NOTE["critique"], NOTE["good_spans"], NOTE["poor_spans"])]

    def delta(**flags):
        args = argparse.Namespace(**{"span_weights": "uniform"} | flags)
        rewards, quotes = train_ppo.token_rewards(tokenizer, rollout, said, args)
        assert quotes["exact"] == 2
        return rewards

    plain = delta()
    assert set(plain.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(delta(span_weights="severity"), plain.where(plain > 0, plain / 2))
    assert (delta(span_weights="first") == 1).sum() == 1 < (plain == 1).sum()


def test_the_critic_of_the_toy_says_how_bad_a_fault_is_and_annotations_leave_it_out_unless_asked(
    toy_run,
):
    example = toy.make_example(random.Random(0))
    said = toy.critique(example, toy.VAGUE["name"] + " is 99, you know.")
    assert {quoted(quote) for quote in said.poor} == {
        ("Someone", 0.5),
        (" 99", 1.0),
        (", you know", 0.3),
    }
    run(
        "annotate",
        "--policy",
        toy_run / "sft",
        "--num_samples",
        24,
        "--out",
        toy_run / "severe.jsonl",
        "--severity",
    )
    severe, plain = (read_jsonl(toy_run / f"{name}.jsonl") for name in ("severe", "annotations"))
    assert [Feedback("", r["good_spans"], r["poor_spans"]).plain().poor for r in severe] == [
        r["poor_spans"] for r in plain
    ]


def test_one_page_compares_runs(toy_run, rule_run, tmp_path):
    out = run("eval", "page", toy_run / "ppo", rule_run, "--out", tmp_path / "both.html")
    assert json.loads(out.splitlines()[-1]) == {"page": str(tmp_path / "both.html")}
    assert "critic rm" in (tmp_path / "both.html").read_text()


def test_evaluation_of_policies_and_reward_model(toy_run):
    rows = json.loads(
        run("eval", "policy", toy_run / "sft", toy_run / "ppo", "--eval_samples", 8).splitlines()[
            -1
        ]
    )
    assert list(rows) == [str(toy_run / "sft"), str(toy_run / "ppo")]
    card = run(
        "eval",
        "rm",
        toy_run / "rm",
        "--policy",
        toy_run / "sft",
        "--eval_samples",
        8,
        "--critique_length",
        20,
    )
    assert set(json.loads(card.splitlines()[-1])) >= {"good", "poor", "json_valid", "verbatim"}


def test_the_summarize_task_runs_on_a_file_of_real_looking_text(toy_run, tmp_path):
    """The same scripts, another task: source and reference fields of a .jsonl file, the program as critic."""
    rows = [
        {
            "text": f"Ana, {age}, lives in Porto and plans to learn chess.",
            "summary": f"Ana is {age}.",
        }
        for age in range(20, 32)
    ]
    (tmp_path / "posts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = (
        "--task",
        "summarize",
        "--data",
        tmp_path / "posts.jsonl",
        "--source_field",
        "text",
        "--reference_field",
        "summary",
    )
    short = (
        "--max_steps",
        1,
        "--response_length",
        12,
        "--per_device_train_batch_size",
        2,
        "--eval_samples",
        1,
    )
    out = run(
        "train_ppo",
        *data,
        "--policy",
        toy_run / "sft",
        "--critic",
        "rule",
        "--output_dir",
        tmp_path / "ppo",
        *short,
    )
    assert {"invented", "rouge_l"} <= set(json.loads(out.splitlines()[-1])["after"])


@pytest.mark.slow
def test_the_main_job_from_nothing(tmp_path):
    """Every stage in full, each made by the one that needs it: minutes. Held-out summaries become fully right."""
    result = json.loads(
        run_as_a_stranger("train_ppo", "--output_dir", tmp_path / "ppo").splitlines()[-1]
    )
    assert set(result["seconds"]) == {"sft", "annotate", "rm", "ppo"}
    assert result["before"]["perfect"] <= 0.05 and result["after"]["perfect"] >= 0.35


# ---- bad input: one sentence, exit code 2 ------------------------------------------------------------------------------


@pytest.fixture
def refuse(monkeypatch, capsys):
    """Runs a script's main() in this process, expects exit code 2, and returns its one sentence."""

    def run_and_fail(script, *flags):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(script).main()
        assert stopped.value.code == 2
        (sentence,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        return sentence

    return run_and_fail


def test_bad_flags(refuse):
    assert "--max_steps" in refuse("train_ppo", "--max_steps", "0")
    assert "--learning_rat" in refuse("train_ppo", "--learning_rat", "1")
    assert "between 0 and 1" in refuse("train_ppo", "--lam", "2")
    assert "no task 'toi'" in refuse("train_ppo", "--task", "toi")
    assert "these are of none" in refuse("eval", "page")


def test_missing_or_unusable_data(refuse, toy_run, tmp_path):
    task = (
        "--task",
        "summarize",
        "--policy",
        toy_run / "sft",
        "--critic",
        "rule",
        "--output_dir",
        tmp_path / "out",
    )
    empty, broken, fields = (
        tmp_path / "empty.jsonl",
        tmp_path / "broken.json",
        tmp_path / "fields.jsonl",
    )
    empty.write_text("")
    broken.write_text("[{")
    fields.write_text('{"text": "a"}\n')
    assert "needs --data" in refuse("train_ppo", *task)
    assert "there is no file" in refuse("train_ppo", *task, "--data", tmp_path / "nowhere.jsonl")
    assert "holds no example" in refuse("train_ppo", *task, "--data", empty)
    assert "is no .json file" in refuse("train_ppo", *task, "--data", broken)
    assert "has no field 'article'; it has text" in refuse("train_ppo", *task, "--data", fields)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("attribute", "name"), [("chat_template", "chat template"), ("eos_token", "EOS token")]
)
def test_a_policy_without_chat_template_or_eos(refuse, toy_run, tmp_path, attribute, name):
    (folder,) = (toy_run / "sft").glob("checkpoint-*")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    setattr(tokenizer, attribute, None)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ("--critic", "rule", "--output_dir", tmp_path / "out", "--policy", tmp_path / "model")
    assert f"has no {name}" in refuse("train_ppo", *flags)


def test_annotations_that_are_none(refuse, toy_run, tmp_path):
    flags = (
        "--model",
        toy_run / "sft",
        "--output_dir",
        tmp_path / "rm",
        "--annotations",
        tmp_path / "notes.jsonl",
    )
    for text, sentence in (
        ("[1]\n", "line 1 of"),
        (
            '{"prompt": "a", "response": "b", "critique": "c", "good_spans": "d"}\n',
            "no usable good_spans, poor_spans",
        ),
        ('{"status": "failed"}\n', "the data set is empty"),
    ):
        (tmp_path / "notes.jsonl").write_text(text)
        assert sentence in refuse("train_rm", *flags)
    assert "exists already" in refuse("annotate", "--out", tmp_path / "notes.jsonl")


def test_a_folder_that_is_no_run_is_left_alone(refuse, toy_run, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    flags = ("--critic", "rule", "--policy", toy_run / "sft", "--output_dir", tmp_path)
    assert "holds something that is not a run" in refuse("train_ppo", *flags)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_interval_needs_two_runs(refuse, toy_run):
    assert "two runs" in refuse("eval", "seeds", toy_run / "ppo")
    table = json.loads(run("eval", "seeds", toy_run / "ppo", toy_run / "ppo").splitlines()[-1])
    assert table["coverage"]["after"]["seeds"] == 2


def test_a_policy_that_is_nowhere(refuse, tmp_path):
    assert "holds no model" in refuse("train_ppo", "--critic", "rule", "--policy", tmp_path)
    assert "there is no file" in refuse(
        "train_ppo", "--critic", "rule", "--policy", tmp_path / "none.gguf"
    )


def test_a_prompt_longer_than_the_context(refuse, toy_run, tmp_path):
    flags = (
        "--critic",
        "rule",
        "--policy",
        toy_run / "sft",
        "--output_dir",
        tmp_path / "out",
        "--response_length",
    )
    assert "do not fit the model's context of 512" in refuse("train_ppo", *flags, 500)


def test_several_processes_are_refused(refuse, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refuse("train_sft")


# ---- the command line and the README keep their word ---------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_explained_and_read(script):
    source = (ROOT / f"{script}.py").read_text()
    library = "".join(path.read_text() for path in (ROOT / "t2g").rglob("*.py"))
    scripts = "".join((ROOT / f"{name}.py").read_text() for name in SCRIPTS)
    for flags, readers in ((source, source + library), (library, scripts + library)):
        flags = re.findall(r'add\(\s*"--(\w+)"', flags)
        assert flags
        for flag in flags:
            assert re.search(rf"args\.{flag}\b", readers), f"nothing reads --{flag}"
    for call in re.findall(r"add\(\s*\"[^\n]*(?:\n\s+[^\n]*)*?\n?\s*\)\n", source):
        assert "help=" in call, call


def test_the_core_stays_small():
    core = [
        "train_ppo.py",
        *(f"t2g/{name}.py" for name in ("feedback", "align", "ppo", "policy", "rollout")),
    ]
    assert sum(len((ROOT / path).read_text().splitlines()) for path in core) <= 1200
