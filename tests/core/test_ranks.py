"""The other stages in two processes: the steps of one process, shared samples, a killed run."""

import os
import signal

import pytest
import torch
from forking import TORCHRUN, exit_codes, output, python, result_of, run_ranks, two_ranks
from safetensors.torch import load_file

from t2g import checkpoint, dist, torchrun
from t2g.log import read_jsonl
from t2g.notes import write_whole

TRAINED = ("--max_steps", 5, "--per_device_train_batch_size", 2, "--eval_steps", 2)
TRAINED += ("--save_steps", 2, "--learning_rate", 1e-4, "--validation_share", 0.25)


@pytest.fixture(scope="module")
def folder(folder):
    """The module's folder, with sixteen annotations."""
    notes = []
    for i in range(16):
        text = f"It is {'so ' * (i % 5)}blue."
        feedback = {"critique": "No." * (i % 4), "good_spans": ["It"], "poor_spans": ["blue"]}
        notes.append({"prompt": f"Which of the {i}?", "response": text, **feedback})
    write_whole(folder / "notes.jsonl", notes)
    return folder


def nothing(rank):
    pass


def train_rm(folder, name, *flags, prepare=nothing):
    """Trains a reward model in two processes. Returns its folder, and the exit codes."""
    errors = [folder / f"{name}.{rank}" for rank in (0, 1)]
    where = "--model", folder / "model", "--annotations", folder / "notes.jsonl"
    flags = (*where, *TRAINED, *flags, "--output_dir", folder / name)
    return folder / name, exit_codes(two_ranks(prepare, flags, errors, script="train_rm"))


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
    two, codes = train_rm(folder, name, *flags)
    assert codes == [0, 0], (folder / f"{name}.0").read_text()[-2000:]
    where = "--model", folder / "model", "--annotations", folder / "notes.jsonl"
    one = folder / f"{name}-one"
    whole = *where, *TRAINED, *flags, "--gradient_accumulation_steps", 2, "--output_dir", one
    output("train_rm", *whole)
    (ours, weights), (theirs, sharded) = result(one), result(two)
    for row, other in zip(ours, theirs, strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-6)
    torch.testing.assert_close(sharded, weights, atol=3e-5, rtol=1e-5)
    start = load_file(folder / "model" / "model.safetensors")
    assert any((weights[name] != start[name]).any() for name in weights)


def killed_after_its_first_state(rank):
    ours = checkpoint.replace

    def replace(folder, name, *state, **reached):
        ours(folder, name, *state, **reached)
        if name == "state":
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.replace = replace


def test_a_killed_run_of_two_processes_resumes_to_the_same_bits(folder):
    whole, _ = train_rm(folder, "whole")
    killed, codes = train_rm(folder, "killed", prepare=killed_after_its_first_state)
    assert codes == [-9, -9] and (killed / "state-2").is_dir()
    resumed, codes = train_rm(folder, "killed")
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
    with torchrun.session():
        file.with_suffix(f".{dist.rank()}").write_text(str(torch.rand(1).item()))


def test_ranks_sample_independently(folder):
    assert run_ranks(draw, folder / "drawn") == [0, 0]
    assert (folder / "drawn.0").read_text() != (folder / "drawn.1").read_text()
