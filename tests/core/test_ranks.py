"""The other stages in two processes: the steps of one process, shared samples, a killed run."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from annotating import annotated
from forking import TORCHRUN, in_two, output, python, result_of, run_ranks
from safetensors.torch import load_file
from test_resume import FLAGS, output_of, train
from toys import distance

import train_ppo
from t2g import checkpoint, dist
from t2g.feedback import Feedback
from t2g.log import read_jsonl
from t2g.notes import write_whole

TRAINED = ("--max_steps", 5, "--per_device_train_batch_size", 2, "--eval_steps", 2)
TRAINED += ("--save_steps", 2, "--learning_rate", 1e-4, "--validation_share", 0.25)


@pytest.fixture(scope="module")
def folder(folder):
    """The module's folder, with sixteen annotations."""
    notes = []
    for i in range(16):
        feedback = Feedback("No." * (i % 4), ["It"], ["blue"])
        notes.append(annotated(f"Which of the {i}?", f"It is {'so ' * (i % 5)}blue.", feedback))
    write_whole(folder / "notes.jsonl", notes)
    return folder


def train_rm(folder, name, *flags, prepare=None):
    """Trains a reward model in two processes. Returns its folder, the exit codes and the errors."""
    where = "--model", folder / "model", "--annotations", folder / "notes.jsonl"
    flags = (*where, *TRAINED, *flags, "--output_dir", folder / name)
    return folder / name, *in_two("train_rm", flags, prepare)


def result(folder):
    """The metrics of each step without seconds, and the weights of a run."""
    rows = read_jsonl(folder / "metrics.jsonl")
    rows = [{name: x for name, x in row.items() if "seconds" not in name} for row in rows]
    [saved] = folder.glob("checkpoint-*")
    assert not list(folder.glob("state*")) and not list(folder.glob("best*"))
    return rows, load_file(saved / "model.safetensors")


@pytest.mark.parametrize("flags", [(), ("--lora_r", 2, "--gradient_checkpointing")])
def test_two_processes_train_as_one(folder, flags):
    name = f"rm{len(flags)}"
    two, codes, errors = train_rm(folder, name, *flags)
    assert codes == [0, 0], errors
    where = "--model", folder / "model", "--annotations", folder / "notes.jsonl"
    one = folder / f"{name}-one"
    whole = *where, *TRAINED, *flags, "--gradient_accumulation_steps", 2, "--output_dir", one
    output("train_rm", *whole)
    (ours, weights), (theirs, sharded) = result(one), result(two)
    for row, other in zip(ours, theirs, strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-6)
    start = load_file(folder / "model" / "model.safetensors")
    moved, apart = (distance(weights, other) for other in (start, sharded))
    assert apart < 0.01 * moved


def killed_after_its_first_state(rank):
    ours = checkpoint.replace

    def replace(folder, name, *state, **reached):
        ours(folder, name, *state, **reached)
        if name == "state":
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.replace = replace


def test_a_killed_run_of_two_processes_resumes_to_the_same_bits(folder):
    whole, *_ = train_rm(folder, "whole")
    killed, codes, _ = train_rm(folder, "killed", prepare=killed_after_its_first_state)
    assert codes == [-9, -9] and (killed / "state-2").is_dir()
    resumed, codes, _ = train_rm(folder, "killed")
    assert codes == [0, 0] and resumed == killed
    (rows, weights), (others, same) = result(whole), result(resumed)
    assert rows == others
    torch.testing.assert_close(same, weights, atol=0, rtol=0)


def test_samples_are_shared_out_and_written_once(folder):
    toy = "--policy", str(folder / "model"), "--response_length", "8"
    notes = folder / "annotations.jsonl"
    annotate = "annotate.py", *toy, "--num_samples", "7", "--out", str(notes)
    measure = "eval.py", "policy", toy[1], *toy[2:], "--eval_samples", "5"
    python(*TORCHRUN, *annotate)
    ids = [record["id"] for record in read_jsonl(notes)]
    assert ids == [str(i) for i in range(7)]
    scores = result_of(python(*TORCHRUN, *measure))[toy[1]]
    alone = result_of(output("eval", *measure[1:]))[toy[1]]
    assert scores.keys() == alone.keys()
    greedy = [name for name in alone if name.endswith("_greedy")]
    assert [scores[name] for name in greedy] == pytest.approx([alone[name] for name in greedy])


def draw(file):
    file.with_suffix(f".{dist.rank()}").write_text(str(torch.rand(1).item()))


def test_ranks_sample_independently(folder):
    assert run_ranks(draw, folder / "drawn") == [0, 0]
    assert (folder / "drawn.0").read_text() != (folder / "drawn.1").read_text()


def launched(flags, *options):
    command = [sys.executable, *TORCHRUN, *options, train_ppo.__file__, *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*map(str, command)], **pipes)


@pytest.mark.slow
def test_a_dead_process_is_restarted_and_the_number_of_processes_may_change(folder, tmp_path):
    flags = [*FLAGS, "--policy", folder / "model", "--num_mini_batches", 1, "--save_steps", 1]
    flags.append("--output_dir")
    folders = {name: tmp_path / name for name in ("whole", "killed", "one")}
    whole = launched([*flags, folders["whole"]])
    assert whole.wait() == 0, whole.stdout.read()[-3000:]
    killed = launched([*flags, folders["killed"]], "--max_restarts", 1)
    while not (folders["killed"] / "checkpoint-2").is_dir():
        time.sleep(0.05)
        assert killed.poll() is None, killed.stdout.read()[-3000:]
    children = subprocess.run(["pgrep", "-P", str(killed.pid)], capture_output=True, text=True)
    os.kill(max(map(int, children.stdout.split())), signal.SIGKILL)
    printed = killed.communicate()[0]
    assert killed.returncode == 0 and "resuming after step" in printed, printed[-3000:]
    assert output_of(folders["killed"]) == output_of(folders["whole"])

    shutil.copytree(folders["whole"], folders["one"])
    printed = train(*flags, folders["one"], "--resume", folders["one"] / "checkpoint-3")
    assert "resuming after step 3" in printed, "one process resumes what two wrote"
    rows = [read_jsonl(folders[name] / "metrics.jsonl") for name in ("one", "whole")]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4, 5, 6] and rows[0][:3] == rows[1][:3]
