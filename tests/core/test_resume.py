"""Killed at any moment and run again, a run ends as one that was never stopped, bit for bit."""

import errno
import fcntl
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from forking import forked, output, refusal, run
from safetensors.torch import load_file, save_file

import train_ppo
from t2g import checkpoint, policy
from t2g.log import read_jsonl
from t2g.tasks import toy

pytestmark = pytest.mark.usefixtures("posts")
STEPS = 6
FLAGS = (
    "--critic", "rule", "--max_steps", STEPS, "--per_device_train_batch_size", 2,
    "--eval_samples", 2, "--num_ppo_epochs", 2, "--response_length", 12, "--save_steps", 2,
    "--kl_target", 0.5, "--kl_horizon", 20, "--save_total_limit", 9, "--value_learning_rate", 0.01,
)  # fmt: skip


@pytest.fixture
def flags(folder, tmp_path):
    """The flags of a run in tmp_path/ppo, an empty folder, as a run leaves it that dies at once."""
    (tmp_path / "ppo").mkdir()
    return [*FLAGS, "--policy", folder / "model", "--output_dir", tmp_path / "ppo"]


def train(*flags):
    """What train_ppo.py, which must succeed, prints in the process of the test."""
    return output("train_ppo", *flags)


def output_of(folder) -> tuple:
    """Metrics without those of the clock and of memory, samples, and weights."""
    rows = read_jsonl(folder / "metrics.jsonl")
    rows = [{k: row[k] for k in row if "seconds" not in k and "memory" not in k} for row in rows]
    samples = (folder / "samples.jsonl").read_text()
    last = policy.latest_checkpoint(folder)
    files = ("model.safetensors", "value_head/value_head.safetensors")
    return rows, samples, [(last / name).read_bytes() for name in files]


@pytest.fixture(scope="module")
def whole(folder):
    """The folder of a run that was never stopped."""
    train(*FLAGS, "--policy", folder / "model", "--output_dir", folder / "ppo")
    return folder / "ppo"


@pytest.fixture
def stopped(whole, flags):
    """The folder of the same run, stopped before its last checkpoint."""
    folder = flags[-1]
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"output_dir": str(folder)}))
    return folder


@pytest.mark.parametrize("times", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(flags, whole, tmp_path, times):
    rng, kills = random.Random(1), 0
    length = sum(row["seconds"] for row in read_jsonl(whole / "metrics.jsonl")) + 2
    for _ in range(40):
        process = forked("train_ppo", flags)
        process.join(rng.uniform(0.3, length) if kills < times else None)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        elif kills >= times:
            break
        else:  # it finished before it was killed
            assert process.exitcode == 0 and output_of(tmp_path / "ppo") == output_of(whole)
            shutil.rmtree(tmp_path / "ppo")
    assert kills == times and process.exitcode == 0
    assert output_of(tmp_path / "ppo") == output_of(whole)


def test_sigterm_saves_and_stops(flags, whole, tmp_path):
    flags += ["--save_steps", 1000]
    process, metrics = forked("train_ppo", flags), tmp_path / "ppo" / "metrics.jsonl"
    while not metrics.is_file() or not read_jsonl(metrics):
        time.sleep(0.01)
    process.terminate()
    process.join()
    assert process.exitcode == 143 and policy.latest_checkpoint(tmp_path / "ppo")
    assert "resuming after step" in train(*flags)
    assert output_of(tmp_path / "ppo") == output_of(whole)


def test_sigterm_in_the_last_save_or_measurement_ends_the_run(flags, whole, monkeypatch):
    handlers, save, evaluate = [], checkpoint.save_checkpoint, train_ppo.evaluate

    def save_and_receive(*args):
        save(*args)
        if args[-1]["step"] == STEPS:
            signal.raise_signal(signal.SIGTERM)

    def note_handler(*args, **options):
        handlers.append(signal.getsignal(signal.SIGTERM))
        return evaluate(*args, **options)

    monkeypatch.setattr(train_ppo, "evaluate", note_handler)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save_and_receive)
        assert run("train_ppo", flags)[0] == 143
    train(*flags)
    assert output_of(flags[-1]) == output_of(whole)
    assert handlers == [signal.SIG_DFL] * 3, "all is saved, so SIGTERM may end the process at once"


def test_a_named_checkpoint_is_gone_back_to_once(whole, flags, tmp_path, monkeypatch):
    """Later checkpoints are moved aside. The same command, after a kill, resumes what it began."""
    folder = tmp_path / "ppo"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    elsewhere = tmp_path / "elsewhere" / "checkpoint-4"
    assert "no checkpoint of" in refusal("train_ppo", *flags, "--resume", elsewhere)
    flags += ["--resume", folder / "checkpoint-4", "--save_steps", 1]
    updates = mock.Mock(side_effect=[mock.DEFAULT, KeyboardInterrupt], wraps=train_ppo.update)
    with monkeypatch.context() as patch:
        patch.setattr(train_ppo, "update", updates)
        assert run("train_ppo", flags)[0] == 130
    assert (folder / "left-1" / "checkpoint-6").is_dir()
    assert "resuming after step 5" in train(*flags)
    assert not (folder / "left-2").exists() and output_of(folder) == output_of(whole)
    more = [*flags, "--resume", folder / "checkpoint-6", "--max_steps"]
    assert "raise it" in refusal("train_ppo", *more, 4) and output_of(folder) == output_of(whole)
    train(*more, 7)
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


OTHER = [
    (("--learning_rate", 1e-7), "another learning_rate"),
    (("--gradient_accumulation_steps", 2), "another batch_size"),
    (("--resume", "none"), "moved to"),
]


@pytest.mark.parametrize(("other", "shown"), OTHER)
def test_other_flags_or_none_begin_anew(stopped, flags, other, shown):
    printed = train(*flags, *other, "--max_steps", 1)
    assert shown in printed and "resuming" not in printed
    aside = stopped.with_name("ppo.1")
    assert f"moved to {aside}" in printed and (aside / "checkpoint-4").is_dir()


ALIKE = [
    ("--gradient_checkpointing", "--save_steps", 3, "--save_total_limit", 5),
    ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2),
]


@pytest.mark.parametrize("other", ALIKE)
def test_flags_that_do_not_change_the_training_may_differ(stopped, flags, whole, other):
    printed = train(*flags, *other)
    assert "resuming after step 4" in printed and "moved to" not in printed
    for ours, theirs in zip(output_of(stopped)[0], output_of(whole)[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_paths_may_be_spelt_differently_and_a_run_moved(stopped, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stopped.rename(tmp_path / "moved")
    printed = train(*FLAGS, "--policy", f"{folder}/model/", "--output_dir", "moved/")
    assert "resuming after step 4" in printed


def test_another_kl_coef_is_used_and_the_old_flags_are_kept(stopped, flags):
    other = ["--resume", stopped / "checkpoint-4", "--kl_coef", 0.5, "--save_total_limit", 1]
    train(*flags, *other)
    assert read_jsonl(stopped / "metrics.jsonl")[4]["kl_coef"] == 0.5
    assert [path.name for path in policy.checkpoints(stopped)] == ["checkpoint-6"]
    assert json.loads((stopped / "left-1" / "config.json").read_text())["kl_coef"] == 0.15


@pytest.mark.parametrize("changed", [{"prompt": "another"}, {"reference": "another"}, None])
def test_other_data_are_refused_unless_a_checkpoint_is_named(stopped, flags, monkeypatch, changed):
    """Other references too, for a critic may read them. None: a row was taken out of the data."""
    (first, *rest), heldout = toy.load(SimpleNamespace(seed=0))
    rows = [first._replace(**changed), *rest] if changed else rest
    monkeypatch.setattr(toy, "load", lambda args: (list(rows), heldout[:2]))
    sentence = refusal("train_ppo", *flags)
    assert "other data" in sentence and "--resume none" in sentence
    assert "goes on with the new ones" in train(*flags, "--resume", stopped / "checkpoint-4")


def lose_a_row_of_each_weight(file):
    tensors = load_file(file).items()
    save_file({name: x[:1].clone() if x.ndim else x for name, x in tensors}, file)


def test_only_a_restart_takes_a_finished_run_for_its_own(whole, flags, tmp_path, monkeypatch):
    folder, aside = flags[-1], tmp_path / "ppo.1"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(*flags)
    assert not aside.exists(), "the run had finished"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"launcher": 0}))
    train(*flags)
    assert aside.exists(), "the run of another launch is moved aside"
    assert output_of(folder) == output_of(whole)


def test_a_policy_in_the_folder_of_the_run_is_refused_before_anything_moves(whole):
    where = "--policy", whole, "--output_dir", whole
    assert "choose another --output_dir" in refusal("train_ppo", *FLAGS, *where)
    assert (whole / "result.json").is_file() and not whole.with_name("ppo.1").exists()


STATE = "checkpoint-4/state"
DAMAGES = [  # a file of a run, what happens to it, and whether an earlier checkpoint is resumed
    ("config.json", lambda file: file.write_text("{"), False),
    ("metrics.jsonl", lambda file: file.write_text("{\n" + file.read_text()), False),
    (f"{STATE}/0-of-1.safetensors", lose_a_row_of_each_weight, False),
    (f"{STATE}/0-of-1.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-100]), True),
    (f"{STATE}/0-of-1.safetensors", lambda file: file.unlink(), True),
    (f"{STATE}/meta.json", lambda file: file.unlink(), True),
]


@pytest.mark.parametrize(("name", "damage", "goes_on"), DAMAGES)
def test_a_damaged_file_is_refused(stopped, flags, whole, tmp_path, name, damage, goes_on):
    """If it belongs to a checkpoint, the run goes on without it when it is moved away as told."""
    damage(stopped / name)
    metrics = (stopped / "metrics.jsonl").read_text()
    sentence = refusal("train_ppo", *flags)
    assert "move" in sentence and ("/" in name or f"{name} is damaged" in sentence)
    assert (stopped / "metrics.jsonl").read_text() == metrics
    if goes_on:
        Path(re.search(r"; move (\S+) away", sentence)[1]).rename(tmp_path / "damaged")
        assert "resuming after step 2" in train(*flags)
        assert output_of(stopped) == output_of(whole)


def test_a_full_disk_ends_the_run_and_loses_nothing(stopped, flags, whole, tmp_path):
    process = forked("train_ppo", flags, file_size=90_000, errors=tmp_path / "errors")
    process.join()
    printed = (tmp_path / "errors").read_text()
    assert process.exitcode == 2 and "free some space" in printed and "Traceback" not in printed
    assert policy.latest_checkpoint(stopped).name == "checkpoint-4"
    train(*flags)
    assert output_of(stopped) == output_of(whole)


def test_a_file_system_without_locks_or_fsync_is_warned_of(flags, monkeypatch):
    def lacking(number):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", lambda *_: lacking(errno.ENOLCK))
    monkeypatch.setattr(os, "fsync", lambda *_: lacking(errno.EINVAL))
    with pytest.warns(UserWarning, match="this file system has no") as given:
        train(*flags, "--max_steps", 1)
    texts = {str(warning.message).split(":")[0] for warning in given}
    assert {f"this file system has no {what}" for what in ("locks", "fsync")} <= texts


def test_adapters_are_saved_as_peft_does_and_resumed(flags, folder, tmp_path):
    flags += ["--lora_r", 4, "--max_steps", 4]
    train(*flags)
    last = tmp_path / "ppo" / "checkpoint-4"
    assert (last / "adapter_config.json").is_file() and not (last / "model.safetensors").exists()
    folders = folder / "model", tmp_path / "ppo"
    base, trained = (policy.load(path)[1].state_dict() for path in folders)
    changed = {name for name, weights in trained.items() if not weights.equal(base[name])}
    assert changed and all("proj" in name for name in changed), "linear layers of blocks alone"

    shutil.copytree(tmp_path / "ppo", tmp_path / "again")
    again = ["--output_dir", tmp_path / "again", "--resume", tmp_path / "again" / "checkpoint-2"]
    train(*flags, *again)
    file = "checkpoint-4/adapter_model.safetensors"
    assert (tmp_path / "ppo" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
