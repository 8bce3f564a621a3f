"""Killed at any moment and started again, a run ends as one that never stopped: the same metrics, the same weights, bit for bit."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forking import forked, main
from safetensors.torch import load_file

import train_ppo
from t2g import checkpoint, policy
from t2g.log import read_jsonl

pytestmark = pytest.mark.usefixtures("posts")
STEPS = 6
FLAGS = (
    "--critic", "rule", "--max_steps", STEPS, "--per_device_train_batch_size", 2, "--num_ppo_epochs", 2, "--response_length", 12,
    "--eval_samples", 2, "--save_steps", 2, "--kl_target", 0.5, "--kl_horizon", 20,
)  # fmt: skip


@pytest.fixture(scope="module")
def start(model, tokenizer, tmp_path_factory):
    """A small starting policy in a folder."""
    folder = tmp_path_factory.mktemp("start") / "sft"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(flags):
    """train_ppo.py in the process of the test: its exit code, and what it printed."""
    before, printed, errors = sys.argv, io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            main("train_ppo", flags)
    except SystemExit as stopped:
        code = stopped.code or 0
    finally:
        sys.argv = before
    return code, printed.getvalue() + errors.getvalue()


def what_it_left(folder) -> tuple[list, dict, dict]:
    """Metrics without what a clock or the memory says, samples, and weights."""
    rows = [
        {k: v for k, v in row.items() if "seconds" not in k and "memory" not in k}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]
    last = policy.latest_checkpoint(folder)
    weights = {
        name: (last / name).read_bytes()
        for name in ("model.safetensors", "value_head/value_head.safetensors")
    }
    return (
        rows,
        {name: (folder / name).read_text() for name in ("samples.jsonl", "heldout.jsonl")},
        weights,
    )


@pytest.fixture(scope="module")
def never_stopped(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "ppo"
    assert run((*FLAGS, "--policy", start, "--output_dir", folder))[0] == 0
    return folder


def test_held_out_prompts_are_watched_before_the_first_update_and_after_each(never_stopped):
    held_out = [row for row in read_jsonl(never_stopped / "samples.jsonl") if row["heldout"]]
    assert sorted({row["step"] for row in held_out}) == list(range(STEPS + 1))
    for row in held_out:
        assert all(set(token) == {"text", "delta", "kl", "value"} for token in row["tokens"])
    assert {token["kl"] for row in held_out if row["step"] == 0 for token in row["tokens"]} == {
        0
    }, "policy and reference are one"
    assert any(
        token["kl"] > 0 for row in held_out if row["step"] == STEPS for token in row["tokens"]
    )


@pytest.mark.parametrize("times", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(start, never_stopped, tmp_path, times):
    flags, rng, kills = (
        (*FLAGS, "--policy", start, "--output_dir", tmp_path / "ppo"),
        random.Random(1),
        0,
    )
    length = sum(row["seconds"] for row in read_jsonl(never_stopped / "metrics.jsonl")) + 2
    for _ in range(40):
        process = forked("train_ppo", flags)
        process.join(rng.uniform(0.3, length) if kills < times else None)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        elif kills >= times:
            break
        else:  # it was done before its time: from here on anew
            assert process.exitcode == 0 and what_it_left(tmp_path / "ppo") == what_it_left(
                never_stopped
            )
            shutil.rmtree(tmp_path / "ppo")
    assert kills == times and process.exitcode == 0
    assert what_it_left(tmp_path / "ppo") == what_it_left(never_stopped)


def test_sigterm_saves_and_leaves(start, never_stopped, tmp_path):
    flags = (*FLAGS, "--policy", start, "--output_dir", tmp_path / "ppo", "--save_steps", 1000)
    process = forked("train_ppo", flags)
    while not (tmp_path / "ppo" / "metrics.jsonl").is_file() or not read_jsonl(
        tmp_path / "ppo" / "metrics.jsonl"
    ):
        time.sleep(0.01)
    process.terminate()
    process.join()
    assert process.exitcode == 143 and policy.latest_checkpoint(tmp_path / "ppo")
    code, printed = run(flags)
    assert code == 0 and "resuming after step" in printed
    assert what_it_left(tmp_path / "ppo") == what_it_left(never_stopped)


def test_a_finished_run_is_not_gone_on_with(start, never_stopped, tmp_path):
    shutil.copytree(never_stopped, tmp_path / "ppo")
    code, printed = run(
        (
            *FLAGS,
            "--policy",
            start,
            "--output_dir",
            tmp_path / "ppo",
            "--resume",
            "auto",
            "--max_steps",
            1,
        )
    )
    assert code == 0 and "moved to" in printed and (tmp_path / "ppo.1" / "result.json").is_file()


@pytest.fixture
def stopped(never_stopped, tmp_path):
    """The run as it was before its last step, and the flags that it had."""
    shutil.copytree(never_stopped, tmp_path / "ppo")
    (tmp_path / "ppo" / "result.json").unlink()
    shutil.rmtree(tmp_path / "ppo" / f"checkpoint-{STEPS}")
    config = json.loads((tmp_path / "ppo" / "config.json").read_text())
    (tmp_path / "ppo" / "config.json").write_text(
        json.dumps(config | {"output_dir": str(tmp_path / "ppo")})
    )
    return (*FLAGS, "--policy", config["policy"], "--output_dir", tmp_path / "ppo")


def test_only_the_last_checkpoints_are_kept(never_stopped):
    assert [path.name for path in policy.checkpoints(never_stopped)] == [
        "checkpoint-4",
        "checkpoint-6",
    ]
    meta = json.loads((never_stopped / "checkpoint-6" / "state" / "meta.json").read_text())
    assert (
        meta["step"] == 6
        and meta["processes"] == 1
        and meta["config"]["seed"] == 0
        and meta["kl_coef"] != 0.15
    )
    assert set(meta["versions"]) == {"python", "torch", "transformers"}


def test_a_named_checkpoint_is_gone_on_from_whatever_the_flags(stopped, never_stopped):
    folder = Path(stopped[-1])
    code, printed = run((*stopped, "--resume", folder / "checkpoint-4", "--save_total_limit", 9))
    assert code == 0 and "resuming after step 4" in printed
    assert what_it_left(folder) == what_it_left(never_stopped)


def test_later_checkpoints_are_left_aside(never_stopped, start, tmp_path):
    shutil.copytree(never_stopped, tmp_path / "ppo")
    flags = (
        *FLAGS,
        "--policy",
        start,
        "--output_dir",
        tmp_path / "ppo",
        "--resume",
        tmp_path / "ppo" / "checkpoint-4",
    )
    assert run(flags)[0] == 0 and (tmp_path / "ppo" / "left-1" / "checkpoint-6").is_dir()
    assert what_it_left(tmp_path / "ppo") == what_it_left(never_stopped)


@pytest.mark.parametrize("other", [("--learning_rate", 1e-7), ("--resume", "none")])
def test_other_flags_or_none_begin_anew(stopped, other):
    code, printed = run((*stopped, *other, "--max_steps", 1))
    assert code == 0 and "moved to" in printed and "resuming" not in printed


@pytest.mark.parametrize(
    "other",
    [
        ("--gradient_checkpointing",),
        ("--save_steps", 3, "--save_total_limit", 5, "--eval_samples", 1),
        ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2),
    ],
)
def test_what_does_not_change_the_training_may_differ(stopped, other):
    code, printed = run((*stopped, *other))
    assert code == 0 and "resuming after step 4" in printed and "moved to" not in printed


def test_the_place_of_a_run_may_be_spelt_otherwise_or_be_another(stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ppo").rename(tmp_path / "moved")
    code, printed = run((*stopped[:-3], f"{stopped[-3]}/", "--output_dir", "moved/"))
    assert code == 0 and "resuming after step 4" in printed


def test_a_folder_without_anything_is_taken(start, tmp_path):
    """As one is that was killed before its first step."""
    (tmp_path / "ppo").mkdir()
    assert (
        run((*FLAGS, "--policy", start, "--output_dir", tmp_path / "ppo", "--max_steps", 1))[0] == 0
    )


def test_another_batch_begins_anew_and_is_named(stopped):
    code, printed = run((*stopped, "--gradient_accumulation_steps", 2, "--max_steps", 1))
    assert code == 0 and "had another batch_size" in printed and "moved to" in printed


def test_another_kl_coef_is_taken_and_the_flags_of_before_are_kept(stopped):
    folder = Path(stopped[-1])
    assert run((*stopped, "--resume", folder / "checkpoint-4", "--kl_coef", 0.5))[0] == 0
    assert read_jsonl(folder / "metrics.jsonl")[4]["kl_coef"] == 0.5
    assert json.loads((folder / "left-1" / "config.json").read_text())["kl_coef"] == 0.15


@pytest.mark.parametrize("name, damage", [("config.json", '{"a":'), ("metrics.jsonl", '{"st\n')])
def test_a_damaged_file_of_a_run_is_named(stopped, name, damage):
    path = Path(stopped[-1]) / name
    path.write_text(damage + path.read_text())
    code, printed = run(stopped)
    assert code == 2 and f"{name} is damaged" in printed and "--resume none" in printed


def test_ctrl_c_ends_with_a_sentence(start, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_ppo, "sample", interrupted)
    code, printed = run((*FLAGS, "--policy", start, "--output_dir", tmp_path / "ppo"))
    assert code == 130 and "the same command resumes from the last checkpoint" in printed


def test_other_data_are_refused(stopped):
    path = Path(stopped[-1]) / "checkpoint-4" / "state" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_hash": "of others"}))
    code, printed = run(stopped)
    assert code == 2 and "other data" in printed and "--resume none" in printed


@pytest.mark.parametrize("harm", ["truncated", "another model", "no meta", "no state file"])
def test_a_checkpoint_that_is_none_is_refused(stopped, harm):
    state = Path(stopped[-1]) / "checkpoint-4" / "state"
    file = state / checkpoint.state_file(0, 1)
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "another model":
        tensors = load_file(file)
        checkpoint.save_file(
            {
                name: tensor[:1].clone() if tensor.ndim else tensor
                for name, tensor in tensors.items()
            },
            file,
        )
    else:
        (state / "meta.json" if harm == "no meta" else file).unlink()
    code, printed = run(stopped)
    assert (
        code == 2
        and printed.count("error:") == 1
        and "move" in printed
        and "Traceback" not in printed
    )
    assert len(read_jsonl(Path(stopped[-1]) / "metrics.jsonl")) == STEPS, "nothing is lost"


def test_a_resumed_checkpoint_must_be_of_the_run(stopped, tmp_path):
    code, printed = run((*stopped, "--resume", tmp_path / "elsewhere" / "checkpoint-4"))
    assert code == 2 and "no checkpoint of --output_dir" in printed


@pytest.mark.parametrize(
    "file_size, what", [(90_000, "checkpoint-6 cannot be written"), (4_000, "free some space")]
)
def test_a_full_disk_ends_the_run_with_a_sentence_and_keeps_what_there_is(
    stopped, never_stopped, tmp_path, file_size, what
):
    process = forked("train_ppo", stopped, file_size=file_size, errors=tmp_path / "errors")
    process.join()
    printed = (tmp_path / "errors").read_text()
    assert process.exitcode == 2 and what in printed and "Traceback" not in printed
    assert policy.latest_checkpoint(stopped[-1]).name == "checkpoint-4"
    assert run(stopped)[0] == 0 and what_it_left(Path(stopped[-1])) == what_it_left(never_stopped)


def test_out_of_memory_says_what_to_lower(start, tmp_path, monkeypatch):
    monkeypatch.setattr(
        train_ppo, "sample", lambda *_, **__: torch.empty(2**60)
    )  # what PyTorch itself says of too much memory
    code, printed = run((*FLAGS, "--policy", start, "--output_dir", tmp_path / "ppo"))
    assert code == 2 and "out of memory" in printed and "--per_device_train_batch_size" in printed


@pytest.fixture
def gradients(monkeypatch):
    """gradients(steps) makes the gradients of these steps nan; a step has four minibatches."""
    calls, honest = [], train_ppo.policy_loss

    def poison(steps):
        def loss(*args):
            calls.append(len(calls) // 4 + 1)
            value, stats = honest(*args)
            return value * (float("nan") if calls[-1] in steps else 1), stats

        monkeypatch.setattr(train_ppo, "policy_loss", loss)

    return poison


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(start, tmp_path, gradients):
    gradients({2})
    assert (
        run(
            (
                *FLAGS,
                "--policy",
                start,
                "--output_dir",
                tmp_path / "ppo",
                "--save_steps",
                1,
                "--save_total_limit",
                9,
            )
        )[0]
        == 0
    )
    rows = read_jsonl(tmp_path / "ppo" / "metrics.jsonl")
    assert [row["skipped_updates"] for row in rows] == [0, 4, 0, 0, 0, 0]
    one, two, three = (
        load_file(tmp_path / "ppo" / f"checkpoint-{step}" / "model.safetensors")
        for step in (1, 2, 3)
    )
    assert all(one[name].equal(two[name]) for name in one) and not all(
        two[name].equal(three[name]) for name in one
    )


def test_gradients_that_stay_so_end_the_run(start, tmp_path, gradients):
    gradients(set(range(2, 99)))
    code, printed = run(
        (*FLAGS, "--policy", start, "--output_dir", tmp_path / "ppo", "--save_steps", 1)
    )
    assert (
        code == 2
        and "no finite gradient in 5 steps in a row" in printed
        and "--learning_rate" in printed
    )
    assert policy.latest_checkpoint(tmp_path / "ppo").name == "checkpoint-5"


def test_adapters_are_saved_as_peft_does_resumed_and_merged(start, tmp_path):
    flags = (
        *FLAGS,
        "--policy",
        start,
        "--lora_r",
        4,
        "--save_total_limit",
        9,
        "--max_steps",
        4,
        "--save_steps",
        2,
    )
    assert run((*flags, "--output_dir", tmp_path / "ppo"))[0] == 0
    last = tmp_path / "ppo" / "checkpoint-4"
    assert (last / "adapter_config.json").is_file() and not (last / "model.safetensors").exists()
    base, trained = (policy.load(path)[1] for path in (start, tmp_path / "ppo"))
    changed = {
        name
        for name, weights in trained.state_dict().items()
        if not weights.equal(base.state_dict()[name])
    }
    assert changed and all("proj" in name for name in changed), (
        "linear layers of the blocks, and nothing else"
    )

    shutil.copytree(tmp_path / "ppo", tmp_path / "again")
    assert (
        run(
            (
                *flags,
                "--output_dir",
                tmp_path / "again",
                "--resume",
                tmp_path / "again" / "checkpoint-2",
            )
        )[0]
        == 0
    )
    file = "checkpoint-4/adapter_model.safetensors"
    assert (tmp_path / "ppo" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()

    _, plain = policy.load(tmp_path / "ppo")
    assert all(
        weights.equal(trained.state_dict()[name]) for name, weights in plain.state_dict().items()
    )


def launched(processes, flags, *options):
    """train_ppo.py under torchrun."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        processes,
        *options,
        train_ppo.__file__,
        *flags,
    ]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def workers(launcher) -> list[int]:
    children = subprocess.run(
        ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True
    ).stdout.split()
    return sorted(map(int, children))


@pytest.mark.slow
def test_a_dead_process_is_started_again_and_the_number_of_processes_may_change(start, tmp_path):
    flags = (
        *FLAGS,
        "--policy",
        start,
        "--num_mini_batches",
        1,
        "--save_steps",
        1,
        "--save_total_limit",
        9,
    )
    whole = launched(2, (*flags, "--output_dir", tmp_path / "whole"))
    assert whole.wait() == 0, whole.stdout.read()[-3000:]
    killed = launched(2, (*flags, "--output_dir", tmp_path / "killed"), "--max_restarts", 1)
    while not (tmp_path / "killed" / "checkpoint-2").is_dir():
        time.sleep(0.05)
        assert killed.poll() is None, killed.stdout.read()[-3000:]
    os.kill(workers(killed)[-1], signal.SIGKILL)
    printed = killed.communicate()[0]
    assert killed.returncode == 0 and "resuming after step" in printed, printed[-3000:]
    assert what_it_left(tmp_path / "killed") == what_it_left(tmp_path / "whole")

    shutil.copytree(tmp_path / "whole", tmp_path / "one")
    code, printed = run(
        (*flags, "--output_dir", tmp_path / "one", "--resume", tmp_path / "one" / "checkpoint-3")
    )
    assert code == 0 and "resuming after step 3" in printed, "two processes' checkpoint in one"
    rows = read_jsonl(tmp_path / "one" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and rows[:3] == read_jsonl(
        tmp_path / "whole" / "metrics.jsonl"
    )[:3]
