"""The scripts as a user runs them: all stages in short, what they write, and bad input."""

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
from t2g.feedback import Feedback, quoted
from t2g.log import METRICS, read_jsonl
from t2g.policy import latest_checkpoint
from t2g.rollout import Rollout
from t2g.tasks import toy

pytestmark = pytest.mark.usefixtures("posts")
ROOT = Path(__file__).parents[2]
SCRIPTS = ("train_sft", "annotate", "train_rm", "train_ppo", "eval")


def run(command, **paths):
    """Runs a command such as "train_sft --max_steps 3" in this process and returns its output."""
    script, *flags = words(command, paths)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [f"{script}.py", *flags])
        importlib.import_module(script).main()
    return printed.getvalue()


def words(command, paths):
    """The words of a command, and each of paths as a flag: policy=PATH as --policy=PATH."""
    flags = [f"--{name}={path}" for name, path in paths.items()]
    return [*command.split(), *flags]


def last_json(output):
    return json.loads(output.splitlines()[-1])


def run_as_a_user(command, **paths):
    """The same in a process of its own."""
    script, *flags = words(command, paths)
    line = [sys.executable, ROOT / f"{script}.py", *flags]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """Every stage of the toy, a few steps each."""
    root = tmp_path_factory.mktemp("toy")
    short = "--max_steps 3 --per_device_train_batch_size 8"
    run(f"train_sft {short}", output_dir=root / "sft")
    run("annotate --num_samples 24", out=root / "annotations.jsonl")
    run(f"train_rm {short}", output_dir=root / "rm")
    flags = "--max_steps 2 --per_device_train_batch_size 4 --eval_samples 8 --critique_length 20"
    printed = run_as_a_user(f"train_ppo {flags}", output_dir=root / "ppo")
    (root / "stdout").write_text(printed)
    return root


@pytest.fixture(scope="module")
def rule_run(toy_run):
    """The main job with the rule as the critic."""
    flags = "--critic rule --max_steps 2 --per_device_train_batch_size 4 --eval_samples 4"
    run(f"train_ppo {flags}", output_dir=toy_run / "ppo_rule")
    return toy_run / "ppo_rule"


def test_the_main_job_ends_with_its_result_as_json(toy_run):
    result = last_json((toy_run / "stdout").read_text())
    assert set(result) == {"before", "after", "seconds", "page"}
    scores = {"coverage", "poor", "perfect", "coverage_greedy"}
    assert set(result["before"]) == set(result["after"]) >= scores
    assert result["seconds"]["ppo"] > 0 and Path(result["page"]).is_file()
    assert json.loads((toy_run / "ppo" / "result.json").read_text()) == result


def test_a_run_writes_its_config_and_a_line_of_known_metrics_per_step(rule_run):
    config = json.loads((rule_run / "config.json").read_text())
    assert config["kl_coef"] == toy.DEFAULTS["train_ppo"]["kl_coef"]
    lines = read_jsonl(rule_run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert set(line) <= set(METRICS) | set(toy.METRICS)
    supervised = {"loss", "tokens", "validation_loss"}
    if_any = {name for name in METRICS if name.startswith("shift_")} - {"shift_rest"}
    unlogged = set(METRICS) - supervised - if_any - set(lines[0])
    assert not unlogged, "metrics that nothing logs"
    assert lines[0]["kl"] == 0 and lines[0]["first_ratio_error"] < 1e-4


def test_checkpoints_load_as_plain_models(toy_run):
    for stage in ("sft", "rm", "ppo"):
        folder = latest_checkpoint(toy_run / stage)
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        message = [{"role": "user", "content": "Hi."}]
        batch = tokenizer.apply_chat_template(message, return_tensors="pt", return_dict=True)
        assert torch.isfinite(model(batch["input_ids"]).logits).all()


def test_annotations_have_the_agreed_fields(toy_run):
    records = read_jsonl(toy_run / "annotations.jsonl")
    assert len(records) == len({record["id"] for record in records}) == 24
    fields = "id prompt response critique good_spans poor_spans status reason"
    assert set(records[0]) == set(fields.split())


def test_an_earlier_run_is_moved_aside_and_not_overwritten(toy_run):
    for steps in (1, 2):
        flags = f"--max_steps {steps} --per_device_train_batch_size 8"
        run(f"train_sft {flags}", output_dir=toy_run / "sft_again")
    assert len(read_jsonl(toy_run / "sft_again.1" / "metrics.jsonl")) == 1
    assert len(read_jsonl(toy_run / "sft_again" / "metrics.jsonl")) == 2


def test_the_same_seed_gives_the_same_metrics(toy_run):
    """Two runs with one seed agree in everything but seconds and memory."""
    flags = "--critic rule --max_steps 2 --per_device_train_batch_size 4 --eval_samples 4 --seed 3"
    runs = []
    for name in ("a", "b"):
        paths = {"policy": toy_run / "sft", "output_dir": toy_run / name}
        run(f"train_ppo {flags} --response_length 16", **paths)
        last = read_jsonl(toy_run / name / "metrics.jsonl")[-1]
        runs.append({n: x for n, x in last.items() if not n.startswith(("seconds", "peak"))})
    assert runs[0] == runs[1]


NOTE = {
    "prompt": "p",
    "response": "Ana is 27, lives in Porto, misses a son",
    "critique": "The age is 41.",
    "good_spans": [" Porto"],
    "poor_spans": [{"text": "27", "severity": 0.5}],
}


def test_the_reward_model_learns_the_feedback_with_or_without_critique(tmp_path):
    (tmp_path / "notes.jsonl").write_text(json.dumps(NOTE))
    for no_critique, critique in ((False, NOTE["critique"]), (True, "")):
        [target] = train_rm.read_targets(tmp_path / "notes.jsonl", no_critique)
        prompt, response, z = target
        assert (prompt, response) == (NOTE["prompt"], NOTE["response"])
        assert Feedback.parse(z) == Feedback(critique, NOTE["good_spans"], NOTE["poor_spans"])


def test_span_weights_reach_the_rewards(tokenizers):
    tokenizer = tokenizers["byte_level"]
    response = torch.tensor([tokenizer.encode(NOTE["response"], add_special_tokens=False)])
    mask, texts = torch.ones_like(response, dtype=torch.bool), [NOTE["response"]]
    rollout = Rollout(response[:, :0], mask[:, :0], response, mask, mask.any(1), texts)
    feedback = [Feedback(NOTE["critique"], NOTE["good_spans"], NOTE["poor_spans"])]

    def delta(weights):
        args = argparse.Namespace(span_weights=weights)
        rewards, quotes = train_ppo.token_rewards(tokenizer, rollout, feedback, args)
        assert quotes["exact"] == 2
        return rewards

    plain = delta("uniform")
    assert set(plain.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(delta("severity"), plain.where(plain > 0, plain / 2))
    assert (delta("first") == 1).sum() == 1 < (plain == 1).sum()


def test_the_toy_s_rule_gives_severities_and_annotations_leave_them_out_unless_asked(toy_run):
    example = toy.make_example(random.Random(0))
    feedback = toy.critique(example, "Someone is 99, you know.")
    severities = {quoted(quote) for quote in feedback.poor}
    assert severities == {("Someone", 0.5), (" 99", 1.0), (", you know", 0.3)}
    paths = {"policy": toy_run / "sft", "out": toy_run / "severe.jsonl"}
    run("annotate --num_samples 24 --severity", **paths)
    severe, plain = (read_jsonl(toy_run / f"{name}.jsonl") for name in ("severe", "annotations"))
    for a, b in zip(severe, plain, strict=True):
        assert Feedback("", a["good_spans"], a["poor_spans"]).plain().poor == b["poor_spans"]


def test_one_page_compares_runs(toy_run, rule_run, tmp_path):
    page = tmp_path / "both.html"
    printed = run(f"eval page {toy_run / 'ppo'} {rule_run}", out=page)
    assert last_json(printed) == {"page": str(page)} and "critic rm" in page.read_text()


def test_policies_and_reward_models_are_evaluated(toy_run):
    runs = [str(toy_run / "sft"), str(toy_run / "ppo")]
    assert list(last_json(run(f"eval policy {' '.join(runs)} --eval_samples 8"))) == runs
    flags = f"{toy_run / 'rm'} --eval_samples 8 --critique_length 20"
    card = last_json(run(f"eval rm {flags}", policy=toy_run / "sft"))
    assert set(card) >= {"good", "poor", "json_valid", "verbatim"}


def test_an_interval_needs_two_runs(refuse, toy_run):
    ppo = toy_run / "ppo"
    assert "two runs" in refuse(f"eval seeds {ppo}")
    assert last_json(run(f"eval seeds {ppo} {ppo}"))["coverage"]["after"]["seeds"] == 2


def test_the_summarize_task_runs_on_a_file(toy_run, tmp_path):
    """The same scripts on another task, with the program as the critic."""
    rows = []
    for age in range(20, 32):
        text = f"Ana, {age}, lives in Porto and plans to learn chess."
        rows.append({"text": text, "summary": f"Ana is {age}."})
    (tmp_path / "posts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = "--task summarize --critic rule --source_field text --reference_field summary"
    short = "--max_steps 1 --response_length 12 --per_device_train_batch_size 2 --eval_samples 1"
    paths = {"data": tmp_path / "posts.jsonl", "output_dir": tmp_path / "ppo"}
    result = last_json(run(f"train_ppo {task} {short}", policy=toy_run / "sft", **paths))
    assert {"invented", "rouge_l"} <= set(result["after"])


@pytest.mark.slow
def test_the_main_job_from_scratch(tmp_path):
    """Every stage in full takes minutes; held-out summaries become fully right."""
    result = last_json(run_as_a_user("train_ppo", output_dir=tmp_path / "ppo"))
    assert set(result["seconds"]) == {"sft", "annotate", "rm", "ppo"}
    assert result["before"]["perfect"] <= 0.05 and result["after"]["perfect"] >= 0.35


# ---- bad input: one sentence, exit code 2 ------------------------------------------------------


@pytest.fixture
def refuse(capsys):
    """refuse(command, **paths) expects exit code 2 and returns the one sentence that is printed."""

    def run_and_fail(command, **paths):
        with pytest.raises(SystemExit) as stopped:
            run(command, **paths)
        assert stopped.value.code == 2
        (sentence,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        return sentence

    return run_and_fail


def test_bad_flags(refuse):
    assert "--max_steps" in refuse("train_ppo --max_steps 0")
    assert "--learning_rat" in refuse("train_ppo --learning_rat 1")
    assert "between 0 and 1" in refuse("train_ppo --lam 2")
    assert "toi" in refuse("train_ppo --task toi")
    assert "--max_length" in refuse("train_sft --max_length -1")


def test_missing_or_unusable_data(refuse, toy_run, tmp_path):
    paths = {"policy": toy_run / "sft", "output_dir": tmp_path / "out"}
    (tmp_path / "empty.jsonl").write_text("")
    command = "train_ppo --task summarize --critic rule"
    assert "--data" in refuse(command, **paths)
    assert "there is no file" in refuse(command, data=tmp_path / "nowhere.jsonl", **paths)
    assert "no examples" in refuse(command, data=tmp_path / "empty.jsonl", **paths)
    assert not (tmp_path / "out").exists()


def test_a_policy_without_chat_template_or_eos(refuse, toy_run, tmp_path):
    folder = latest_checkpoint(toy_run / "sft")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "model")
    paths = {"policy": tmp_path / "model", "output_dir": tmp_path / "out"}
    for attribute, name in (("chat_template", "chat template"), ("eos_token", "EOS token")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        setattr(tokenizer, attribute, None)
        tokenizer.save_pretrained(tmp_path / "model")
        assert f"no {name}" in refuse("train_ppo --critic rule", **paths)
        (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)


def test_annotations_of_no_use(refuse, toy_run, tmp_path):
    notes = tmp_path / "notes.jsonl"
    paths = {"model": toy_run / "sft", "output_dir": tmp_path / "rm", "annotations": notes}
    for line, named in (
        ([1], "line 1 of"),
        (NOTE | {"good_spans": "d"}, "good_spans"),
        ({"status": "failed"}, "no training pairs"),
    ):
        notes.write_text(json.dumps(line))
        assert named in refuse("train_rm", **paths)
    assert "notes.jsonl" in refuse("annotate", out=notes) and notes.read_text() == json.dumps(line)


def test_a_folder_that_is_not_a_run_is_left_alone(refuse, toy_run, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    paths = {"policy": toy_run / "sft", "output_dir": tmp_path}
    assert "is not a run" in refuse("train_ppo --critic rule", **paths)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_policy_that_does_not_exist_or_has_too_little_context(refuse, toy_run, tmp_path):
    command = "train_ppo --critic rule"
    assert str(tmp_path) in refuse(command, policy=tmp_path)
    assert "none.gguf" in refuse(command, policy=tmp_path / "none.gguf")
    paths = {"policy": toy_run / "sft", "output_dir": tmp_path / "out"}
    assert "context of 512" in refuse(f"{command} --response_length 500", **paths)


def test_several_processes_are_refused(refuse, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refuse("train_sft")


def test_every_flag_of_the_core_is_read():
    files = [ROOT / f"{name}.py" for name in SCRIPTS] + list((ROOT / "t2g").rglob("*.py"))
    source = "".join(path.read_text() for path in files)
    flags = set(re.findall(r'add\(\s*"--(\w+)"', source))
    assert len(flags) > 60
    data_flags = {"source_field", "reference_field"}  # read by getattr in summarize.py
    unread = {flag for flag in flags - data_flags if not re.search(rf"args\.{flag}\b", source)}
    assert not unread, "flags that nothing reads"
