"""The scripts as a user runs them: every stage in short, what they write, and bad input."""

import json
import random
from pathlib import Path

import pytest
from forking import output, python, refusal, result_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_rm
from t2g import supervised
from t2g.feedback import Feedback, quoted
from t2g.log import METRICS, read_jsonl
from t2g.notes import write_whole
from t2g.policy import latest_checkpoint
from t2g.tasks import toy

pytestmark = pytest.mark.usefixtures("posts")
MAIN_JOB = Path(__file__).parents[2] / "train_ppo.py"


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """Every stage of the toy, a few steps each."""
    root = tmp_path_factory.mktemp("toy")
    short = "--max_steps 3 --per_device_train_batch_size 8"
    output(f"train_sft {short} --output_dir {root}/sft")
    output(f"annotate --num_samples 24 --out {root}/annotations.jsonl")
    output(f"train_rm {short} --output_dir {root}/rm")
    flags = "--max_steps 2 --per_device_train_batch_size 4 --eval_samples 8 --critique_length 20"
    (root / "stdout").write_text(python(MAIN_JOB, *flags.split(), "--output_dir", root / "ppo"))
    return root


@pytest.fixture(scope="module")
def rule_run(toy_run):
    """The main job with the rule as the critic."""
    flags = "--critic rule --max_steps 2 --per_device_train_batch_size 4 --eval_samples 4"
    output(f"train_ppo {flags} --output_dir {toy_run}/ppo_rule")
    return toy_run / "ppo_rule"


def test_the_main_job_ends_with_its_result_as_json(toy_run):
    result = result_of((toy_run / "stdout").read_text())
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
    supervised = {"loss", "tokens", "validation_loss"}
    optional = {name for name in METRICS if name.startswith("shift_")} - {"shift_rest"}
    unlogged = set(METRICS) - supervised - optional - set(lines[0])
    assert not unlogged, "metrics that nothing logs"
    assert lines[0]["kl"] == 0 and lines[0]["first_ratio_error"] < 1e-4


NOTE = {
    "prompt": "p", "response": "Ana is 27, lives in Porto.", "critique": "The age is 41.",
    "good_spans": [" Porto"], "poor_spans": [{"text": "27", "severity": 0.5}],
}  # fmt: skip


@pytest.mark.parametrize("no_critique", [False, True])
def test_the_reward_model_learns_the_feedback_with_or_without_critique(tmp_path, no_critique):
    write_whole(tmp_path / "notes.jsonl", [NOTE])
    [(prompt, response, z)] = train_rm.read_targets(tmp_path / "notes.jsonl", no_critique)
    assert (prompt, response) == (NOTE["prompt"], NOTE["response"])
    critique = "" if no_critique else NOTE["critique"]
    assert Feedback.parse(z) == Feedback(critique, NOTE["good_spans"], NOTE["poor_spans"])


def test_annotations_have_the_agreed_fields_and_the_severities_of_the_rule_if_asked(toy_run):
    feedback = toy.critique(toy.make_example(random.Random(0)), "Someone is now 99, you know.")
    severities = {quoted(quote) for quote in feedback.poor}
    assert severities == {("Someone", 0.5), (" 99", 1.0), (", you know", 0.3)}
    paths = f"--policy {toy_run}/sft --out {toy_run}/severe.jsonl"
    output(f"annotate --num_samples 24 --severity {paths}")
    severe, plain = (read_jsonl(toy_run / f"{name}.jsonl") for name in ("severe", "annotations"))
    assert len({record["id"] for record in plain}) == 24
    fields = "id prompt response critique good_spans poor_spans status reason"
    for a, b in zip(severe, plain, strict=True):
        assert set(b) == set(fields.split())
        assert Feedback("", a["good_spans"], a["poor_spans"]).plain().poor == b["poor_spans"]


def test_everything_is_evaluated(toy_run, rule_run, tmp_path):
    runs = [str(toy_run / "sft"), str(toy_run / "ppo")]
    assert list(result_of(output("eval policy --eval_samples 8", *runs))) == runs
    rm = f"eval rm {toy_run}/rm --eval_samples 8 --critique_length 20 --policy {toy_run}/sft"
    card = result_of(output(rm))
    assert set(card) >= {"good", "poor", "json_valid", "verbatim"}
    assert card == result_of(output(f"{rm} --temperature 1.0"))
    assert card != result_of(output(f"{rm} --temperature 0.01"))
    page = tmp_path / "both.html"
    printed = output(f"eval page {toy_run}/ppo {rule_run} --out {page}")
    assert result_of(printed) == {"page": str(page)} and "critic rm" in page.read_text()


def test_the_summarize_task_runs_on_a_file(toy_run, tmp_path):
    """The same scripts on another task, with its rule as the critic."""
    rows = []
    for age in range(20, 32):
        text = f"Ana, {age}, lives in Porto and plans to learn chess."
        rows.append({"text": text, "summary": f"Ana is {age}."})
    write_whole(tmp_path / "posts.jsonl", rows)
    task = "--task summarize --critic rule --source_field text --reference_field summary"
    short = "--max_steps 1 --response_length 12 --per_device_train_batch_size 2 --eval_samples 1"
    paths = f"--data {tmp_path}/posts.jsonl --policy {toy_run}/sft --output_dir {tmp_path}/ppo"
    result = result_of(output(f"train_ppo {task} {short} {paths}"))
    assert {"invented", "rouge_l"} <= set(result["after"])


@pytest.mark.slow
def test_the_main_job_from_scratch(tmp_path):
    """Every stage in full takes minutes; held-out summaries become fully right."""
    result = result_of(python(MAIN_JOB, "--output_dir", tmp_path / "ppo"))
    assert set(result["seconds"]) == {"sft", "annotate", "rm", "ppo"}
    assert result["before"]["perfect"] <= 0.05 and result["after"]["perfect"] >= 0.5


# ---- bad input: one sentence, exit code 2 ------------------------------------------------------
BAD_FLAGS = {  # command: what the sentence names
    "train_ppo --max_steps 0": "--max_steps",
    "train_ppo --learning_rat 1": "--learning_rat",
    "train_ppo --lam 2": "between 0 and 1",
    "train_ppo --task toi": "toi",
    "train_ppo --data a.jsonl": "--task",
    "train_ppo --data \udcff.jsonl": "not UTF-8",
    "train_ppo --task qa --critic rule": "no rule",
    "train_ppo --critic rule --policy none.gguf": "none.gguf",
    "train_sft --max_length -1": "--max_length",
    "train_sft --weight_decay 0 --max_length -1": "--max_length",
    "annotate --max_retries -1": "between 0 and 1000",
    "annotate --out notes.jsonl.gz": "gzipped",
    "annotate --model m --severity": "--severity",
    "annotate --responses a.jsonl --policy p": "--policy",
    "annotate --responses a.jsonl --out a.jsonl": "--out",
    "annotate --model m --budget 1": "--input_price",
    "annotate --critic openai": "--model",
    "annotate --model m": "OPENAI_API_KEY",
    "annotate --model m --base_url localhost:8000": "--base_url",
    "annotate --responses nowhere --model m --base_url http://localhost/v1": "nowhere",
    "eval rm --task qa": "has no rule",
    "eval rm a.jsonl": "--annotations",
    "eval rm a.jsonl --annotations none.jsonl": "none.jsonl",
    "eval --policy anything": "name policies as arguments",
    "train_ppo --kl_target 6 --kl_coef 0": "--kl_coef",
    "train_ppo --kl_target 6 --kl_horizon 10": "--kl_horizon",
}


@pytest.mark.parametrize("command", BAD_FLAGS)
def test_bad_flags(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert BAD_FLAGS[command] in refusal(command)


def test_unusable_data_folders_and_policies(toy_run, tmp_path):
    ppo, sft = f"train_ppo --critic rule --output_dir {tmp_path}/ppo", toy_run / "sft"
    (tmp_path / "a.jsonl").write_text("")
    summarize = f"{ppo} --policy {sft} --task summarize"
    assert "--data" in refusal(summarize)
    assert "list of objects" in refusal(f"{summarize} --data {tmp_path}/a.jsonl")
    assert "No such file" in refusal(f"{summarize} --data {tmp_path}/b.jsonl")
    assert not (tmp_path / "ppo").exists()
    assert "is not a run" in refusal(f"{ppo} --policy {sft} --output_dir {tmp_path}")
    assert (tmp_path / "a.jsonl").is_file()
    assert "context of 512" in refusal(f"{ppo} --policy {sft} --response_length 500")
    folder = latest_checkpoint(sft)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    assert "no EOS token" in refusal(f"{ppo} --policy {tmp_path}/model")


BARE_TASK = """
from t2g.tasks import Example
METRICS = {}
load = lambda args: ([Example("a", "", {})], [Example("b", "", {})])
score = lambda example, response: {}
"""


def test_a_task_without_references_or_a_rule(toy_run, tmp_path):
    (tmp_path / "bare.py").write_text(BARE_TASK)
    task, start = f"--task {tmp_path}/bare.py", toy_run / "sft"
    training = f"train_sft {task} --model {start} --output_dir {tmp_path}/sft"
    assert "no references" in refusal(training)
    assert "no rule" in refusal(f"annotate {task} --policy {start} --out {tmp_path}/notes.jsonl")


def test_the_rows_of_a_file_are_learnt_in_an_order_of_the_seed(toy_run, tmp_path, monkeypatch):
    """A file may be sorted, and a run may take fewer steps than it has rows."""
    task = BARE_TASK.replace('[Example("a", "", {})]', '[Example(c, c, {}) for c in "abcdefgh"]')
    (tmp_path / "letters.py").write_text(task)
    orders = []

    def finetune(model, tokenizer, pairs, *rest, **options):
        orders.append([prompt for prompt, _ in pairs])

    monkeypatch.setattr(supervised, "finetune", finetune)
    for seed in (0, 0, 1):
        output(f"train_sft --task {tmp_path}/letters.py --model {toy_run}/sft --seed {seed}")
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == sorted(orders[0])
    assert list("abcdefgh") not in orders


USELESS = [
    ([1], "line 1 of"),
    (NOTE | {"good_spans": "d"}, "good_spans"),
    ({"status": "failed"}, "no record whose status is ok"),
]


@pytest.mark.parametrize(("record", "problem"), USELESS)
def test_useless_annotations(toy_run, tmp_path, record, problem):
    notes = tmp_path / "notes.jsonl"
    notes.write_text(json.dumps(record))
    training = f"train_rm --model {toy_run}/sft --output_dir {tmp_path}/rm"
    assert problem in refusal(f"{training} --annotations {notes}")
    assert "notes.jsonl" in refusal(f"annotate --out {notes}")
    assert notes.read_text() == json.dumps(record)
