"""Killed at any moment and run again, a run ends as one that was never stopped, bit for bit."""

import copy
import errno
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forking import forked
from forking import run as run_script
from safetensors.torch import load_file, save_file

import train_ppo
from t2g import checkpoint, policy
from t2g.log import read_jsonl
from t2g.run import BAD_STEPS, Run
from t2g.tasks import toy

pytestmark = pytest.mark.usefixtures("posts")
STEPS = 6
FLAGS = (
    "--critic", "rule", "--max_steps", STEPS, "--per_device_train_batch_size", 2,
    "--eval_samples", 2, "--num_ppo_epochs", 2, "--response_length", 12, "--save_steps", 2,
    "--kl_target", 0.5, "--kl_horizon", 20, "--save_total_limit", 9, "--value_learning_rate", 0.01,
)  # fmt: skip


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def start(folder):
    """The folder of a small starting policy."""
    return folder / "model"


@pytest.fixture
def flags(start, tmp_path):
    """The flags of a run in tmp_path/ppo, an empty folder, as a run leaves it that dies at once."""
    (tmp_path / "ppo").mkdir()
    return [*FLAGS, "--policy", start, "--output_dir", tmp_path / "ppo"]


def run(*flags):
    """Runs train_ppo.py in the process of the test. Returns its exit code, and what it printed."""
    return run_script("train_ppo", flags)


def output_of(folder) -> tuple:
    """Metrics without those of the clock and of memory, samples, and weights."""
    rows = read_jsonl(folder / "metrics.jsonl")
    rows = [{k: row[k] for k in row if "seconds" not in k and "memory" not in k} for row in rows]
    samples = (folder / "samples.jsonl").read_text()
    last = policy.latest_checkpoint(folder)
    files = ("model.safetensors", "value_head/value_head.safetensors")
    return rows, samples, [(last / name).read_bytes() for name in files]


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "ppo"
    assert run(*FLAGS, "--policy", start, "--output_dir", folder)[0] == 0
    return folder


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


def test_held_out_prompts_are_shown_before_the_first_update_and_after_each(whole):
    rows = [row for row in read_jsonl(whole / "samples.jsonl") if row["heldout"]]
    kl = {row["step"]: [token["kl"] for token in row["tokens"]] for row in rows}
    assert sorted(kl) == list(range(STEPS + 1))
    assert set(kl[0]) == {0} and any(kl[STEPS]), "policy and reference are one at the start"


def test_by_default_a_step_changes_v_by_a_fifth_for_states_of_ones(model, tokenizer, tmp_path):
    args = SimpleNamespace(learning_rate=1e-6, value_learning_rate=None, kl_coef=0.1)
    args.output_dir, args.max_steps, args.tensorboard = tmp_path, 1, False
    actor = policy.Policy(copy.deepcopy(model))
    run = Run(args, toy, tokenizer, actor, [], [], tmp_path)
    ones = torch.ones(1, 1, actor.value_head.in_features)
    for _ in run.steps():
        actor.values(ones, torch.ones(1, 1, dtype=torch.bool)).sum().backward()
        run.optimizer.step()
    assert actor.value_head(ones).item() == pytest.approx(-0.2, rel=0.1)  # and the bias a little


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
    code, printed = run(*flags)
    assert code == 0 and "resuming after step" in printed
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
        assert run(*flags)[0] == 143
    assert run(*flags)[0] == 0 and output_of(flags[-1]) == output_of(whole)
    assert handlers == [signal.SIG_DFL] * 3, "all is saved, so SIGTERM may end the process at once"


def test_a_named_checkpoint_is_gone_back_to_once(whole, flags, tmp_path, monkeypatch):
    """Later checkpoints are moved aside. The same command, after a kill, resumes what it began."""
    folder = tmp_path / "ppo"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    code, printed = run(*flags, "--resume", tmp_path / "elsewhere" / "checkpoint-4")
    assert code == 2 and "no checkpoint of --output_dir" in printed
    flags += ["--resume", folder / "checkpoint-4", "--save_steps", 1]
    updates = iter([train_ppo.update, interrupt])
    with monkeypatch.context() as patch:
        patch.setattr(train_ppo, "update", lambda *batch: next(updates)(*batch))
        assert run(*flags)[0] == 130
    assert (folder / "left-1" / "checkpoint-6").is_dir()
    code, printed = run(*flags)
    assert code == 0 and "resuming after step 5" in printed
    assert not (folder / "left-2").exists() and output_of(folder) == output_of(whole)
    more = [*flags, "--resume", folder / "checkpoint-6", "--max_steps"]
    code, printed = run(*more, 4)
    assert code == 2 and "raise it" in printed and output_of(folder) == output_of(whole)
    assert run(*more, 7)[0] == 0
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        (("--learning_rate", 1e-7), "another learning_rate"),
        (("--gradient_accumulation_steps", 2), "another batch_size"),
        (("--resume", "none"), "moved to"),
    ],
)
def test_other_flags_or_none_begin_anew(stopped, flags, other, shown):
    code, printed = run(*flags, *other, "--max_steps", 1)
    assert code == 0 and shown in printed and "resuming" not in printed
    aside = stopped.with_name("ppo.1")
    assert f"moved to {aside}" in printed and (aside / "checkpoint-4").is_dir()


@pytest.mark.parametrize(
    "other",
    [
        ("--gradient_checkpointing", "--save_steps", 3, "--save_total_limit", 5),
        ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2),
    ],
)
def test_flags_that_do_not_change_the_training_may_differ(stopped, flags, whole, other):
    code, printed = run(*flags, *other)
    assert code == 0 and "resuming after step 4" in printed and "moved to" not in printed
    for ours, theirs in zip(output_of(stopped)[0], output_of(whole)[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_a_path_may_be_spelt_differently_and_the_run_may_be_moved(
    stopped, start, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    stopped.rename(tmp_path / "moved")
    code, printed = run(*FLAGS, "--policy", f"{start}/", "--output_dir", "moved/")
    assert code == 0 and "resuming after step 4" in printed


def test_another_kl_coef_is_used_and_the_old_flags_are_kept(stopped, flags):
    other = ["--resume", stopped / "checkpoint-4", "--kl_coef", 0.5, "--save_total_limit", 1]
    assert run(*flags, *other)[0] == 0
    assert read_jsonl(stopped / "metrics.jsonl")[4]["kl_coef"] == 0.5
    assert [path.name for path in policy.checkpoints(stopped)] == ["checkpoint-6"]
    assert json.loads((stopped / "left-1" / "config.json").read_text())["kl_coef"] == 0.15


@pytest.mark.parametrize("changed", [{"prompt": "another"}, {"reference": "another"}, None])
def test_other_data_are_refused_unless_a_checkpoint_is_named(stopped, flags, monkeypatch, changed):
    """Other references too, for a critic may read them. None: a row was taken out of the data."""
    (first, *rest), heldout = toy.load(SimpleNamespace(seed=0))
    rows = [first._replace(**changed), *rest] if changed else rest
    monkeypatch.setattr(toy, "load", lambda args: (list(rows), heldout[:2]))
    code, printed = run(*flags)
    assert code == 2 and "other data" in printed and "--resume none" in printed
    code, printed = run(*flags, "--resume", stopped / "checkpoint-4")
    assert code == 0 and "goes on with the new ones" in printed


def lose_a_row_of_each_weight(file):
    tensors = load_file(file).items()
    save_file({name: x[:1].clone() if x.ndim else x for name, x in tensors}, file)


def test_only_a_restart_of_the_launch_that_began_a_run_takes_it_for_its_own(
    whole, flags, tmp_path, monkeypatch
):
    folder, aside = flags[-1], tmp_path / "ppo.1"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run(*flags)[0] == 0 and not aside.exists(), "the run had finished"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"launcher": 0}))
    assert run(*flags)[0] == 0 and aside.exists(), "the run of another launch is moved aside"
    assert output_of(folder) == output_of(whole)


def test_a_policy_in_the_folder_of_the_run_is_refused_before_anything_moves(whole):
    code, printed = run(*FLAGS, "--policy", whole, "--output_dir", whole)
    assert code == 2 and "choose another --output_dir" in printed
    assert (whole / "result.json").is_file() and not whole.with_name("ppo.1").exists()


def test_data_have_the_same_hash_in_each_process():
    def data(*words):
        own = SimpleNamespace(words=set(words))
        return [("p", "r", {"words": set(words), "object": object(), (1, 2): own})]

    one, other = data(0, 8), data(8, 0)
    assert str(one) != str(other) and checkpoint.hash_of(one) == checkpoint.hash_of(other)
    assert checkpoint.hash_of(one) != checkpoint.hash_of(data(0, 9))


STATE = "checkpoint-4/state"
DAMAGES = [  # a file of a run, and what happens to it
    ("config.json", lambda file: file.write_text("{")),
    ("metrics.jsonl", lambda file: file.write_text("{\n" + file.read_text())),
    (f"{STATE}/meta.json", lambda file: file.unlink()),
    (f"{STATE}/0-of-1.safetensors", lambda file: file.unlink()),
    (f"{STATE}/0-of-1.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-100])),
    (f"{STATE}/0-of-1.safetensors", lose_a_row_of_each_weight),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_file_is_refused_and_nothing_is_lost(stopped, flags, name, damage):
    damage(stopped / name)
    metrics = (stopped / "metrics.jsonl").read_text()
    code, printed = run(*flags)
    assert code == 2 and printed.count("error:") == 1 and "move" in printed
    assert "/" in name or f"{name} is damaged" in printed
    assert "Traceback" not in printed and (stopped / "metrics.jsonl").read_text() == metrics


@pytest.mark.parametrize(("name", "damage"), DAMAGES[2:5])
def test_a_run_goes_on_from_the_checkpoint_before_one_that_is_moved_away_as_told(
    stopped, flags, whole, tmp_path, name, damage
):
    damage(stopped / name)
    told = re.search(r"; move (\S+) away", run(*flags)[1])[1]
    Path(told).rename(tmp_path / "damaged")
    code, printed = run(*flags)
    assert (
        code == 0 and "resuming after step 2" in printed and output_of(stopped) == output_of(whole)
    )


def test_a_full_disk_ends_the_run_with_a_sentence_and_loses_nothing(
    stopped, flags, whole, tmp_path
):
    process = forked("train_ppo", flags, file_size=90_000, errors=tmp_path / "errors")
    process.join()
    printed = (tmp_path / "errors").read_text()
    assert process.exitcode == 2 and "free some space" in printed and "Traceback" not in printed
    assert policy.latest_checkpoint(stopped).name == "checkpoint-4"
    assert run(*flags)[0] == 0 and output_of(stopped) == output_of(whole)


def test_a_file_system_without_locks_or_fsync_is_warned_of(flags, monkeypatch):
    def lacking(number):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", lambda *_: lacking(errno.ENOLCK))
    monkeypatch.setattr(os, "fsync", lambda *_: lacking(errno.EINVAL))
    with pytest.warns(UserWarning, match="this file system has no") as given:
        assert run(*flags, "--max_steps", 1)[0] == 0
    texts = {str(warning.message).split(":")[0] for warning in given}
    assert {f"this file system has no {what}" for what in ("locks", "fsync")} <= texts


@pytest.fixture
def break_gradients(monkeypatch):
    """break_gradients(steps) makes gradients of these steps nan; a step has four minibatches."""
    calls, honest = [], train_ppo.policy_loss

    def break_gradients(steps):
        def loss(*args):
            calls.append(len(calls) // 4 + 1)
            value, stats = honest(*args)
            return value * (float("nan") if calls[-1] in steps else 1), stats

        monkeypatch.setattr(train_ppo, "policy_loss", loss)

    return break_gradients


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(
    flags, tmp_path, break_gradients
):
    break_gradients({2})
    assert run(*flags, "--save_steps", 1)[0] == 0
    rows = read_jsonl(tmp_path / "ppo" / "metrics.jsonl")
    assert [row["skipped_updates"] for row in rows] == [0, 4, 0, 0, 0, 0]
    files = [tmp_path / "ppo" / f"checkpoint-{n}" / "model.safetensors" for n in (1, 2, 3)]
    one, two, three = map(load_file, files)
    assert all(one[name].equal(two[name]) for name in one)
    assert not all(two[name].equal(three[name]) for name in one)


@pytest.mark.parametrize(("first", "skipped"), [("1.0", 2), ("None", 4)])
def test_a_minibatch_without_a_readable_critique_changes_nothing_and_is_counted(
    flags, tmp_path, first, skipped
):
    """One response of a step is readable, so one of the two minibatches of each epoch is empty."""
    critic = f"critic = lambda task, args: lambda *both: [{first}, None, None, None]"
    (tmp_path / "critic.py").write_text(critic)
    few = ("--critic", tmp_path / "critic.py", "--max_steps", 1, "--save_steps", 1)
    assert run(*flags, *few)[0] == 0
    assert read_jsonl(tmp_path / "ppo" / "metrics.jsonl")[0]["skipped_updates"] == skipped
    [state] = (tmp_path / "ppo" / "checkpoint-1" / "state").glob("*.safetensors")
    assert load_file(state).get("optimizer.0.0.step", 0) == 4 - skipped


def test_a_run_without_readable_critiques_goes_on(flags, tmp_path):
    """More steps than a run without finite gradients may have."""
    (tmp_path / "critic.py").write_text("critic = lambda *_: lambda *both: [None] * 4")
    assert run(*flags, "--critic", tmp_path / "critic.py", "--max_steps", BAD_STEPS + 1)[0] == 0


def test_gradients_that_stay_not_finite_end_the_run(flags, tmp_path, break_gradients):
    break_gradients(set(range(2, 99)))
    code, printed = run(*flags, "--save_steps", 1)
    assert code == 2 and "no finite gradient" in printed and "--learning_rate" in printed
    assert policy.latest_checkpoint(tmp_path / "ppo").name == "checkpoint-5"


def test_adapters_are_saved_as_peft_does_and_resumed(flags, start, tmp_path):
    flags += ["--lora_r", 4, "--max_steps", 4]
    assert run(*flags)[0] == 0
    last = tmp_path / "ppo" / "checkpoint-4"
    assert (last / "adapter_config.json").is_file() and not (last / "model.safetensors").exists()
    base, trained = (policy.load(path)[1].state_dict() for path in (start, tmp_path / "ppo"))
    changed = {name for name, weights in trained.items() if not weights.equal(base[name])}
    assert changed and all("proj" in name for name in changed), "linear layers of blocks alone"

    shutil.copytree(tmp_path / "ppo", tmp_path / "again")
    again = ["--output_dir", tmp_path / "again", "--resume", tmp_path / "again" / "checkpoint-2"]
    assert run(*flags, *again)[0] == 0
    file = "checkpoint-4/adapter_model.safetensors"
    assert (tmp_path / "ppo" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def torchrun(processes, flags, *options):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes]
    command = map(str, [*launch, *options, train_ppo.__file__, *flags])
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(list(command), **pipes)


@pytest.mark.slow
def test_a_dead_process_is_restarted_and_the_number_of_processes_may_change(start, tmp_path):
    flags = [*FLAGS, "--policy", start, "--num_mini_batches", 1, "--save_steps", 1, "--output_dir"]
    folders = {name: tmp_path / name for name in ("whole", "killed", "one")}
    whole = torchrun(2, [*flags, folders["whole"]])
    assert whole.wait() == 0, whole.stdout.read()[-3000:]
    killed = torchrun(2, [*flags, folders["killed"]], "--max_restarts", 1)
    while not (folders["killed"] / "checkpoint-2").is_dir():
        time.sleep(0.05)
        assert killed.poll() is None, killed.stdout.read()[-3000:]
    children = subprocess.run(["pgrep", "-P", str(killed.pid)], capture_output=True, text=True)
    os.kill(max(map(int, children.stdout.split())), signal.SIGKILL)
    printed = killed.communicate()[0]
    assert killed.returncode == 0 and "resuming after step" in printed, printed[-3000:]
    assert output_of(folders["killed"]) == output_of(folders["whole"])

    shutil.copytree(folders["whole"], folders["one"])
    code, printed = run(*flags, folders["one"], "--resume", folders["one"] / "checkpoint-3")
    assert code == 0 and "resuming after step 3" in printed, "one process resumes what two wrote"
    rows = [read_jsonl(folders[name] / "metrics.jsonl") for name in ("one", "whole")]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4, 5, 6] and rows[0][:3] == rows[1][:3]
