"""An error on one rank ends all of them: the others would wait for it in a collective."""

import errno
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from forking import exit_codes, in_two, run_ranks, started
from safetensors import SafetensorError
from tqdm import tqdm

import train_ppo
from t2g import dist, torchrun
from t2g.cli import fail, friendly_errors
from t2g.log import write_text

SECONDS = 30  # within which all ranks are gone
FLAGS = (
    "--critic", "rule", "--max_steps", 3, "--per_device_train_batch_size", 2, "--eval_samples", 2,
    "--response_length", 8, "--num_mini_batches", 1,
)  # fmt: skip


check = train_ppo.check_first_ratio
CAUSES = {  # what fails, by the name that train_ppo.py calls it; the rank (0 logs); the sentence
    "sample": (lambda *_, **__: fail("it exceeds the context"), 1, "it exceeds the context"),
    "check_first_ratio": (lambda *_: check(1.0, bf16=False), 1, "first ratio of a step must be 1"),
    "shift": (lambda *_: {"shift_good": math.nan}, 0, "no finite shift_good in step 1"),
}


def break_one(name, rank):
    failing, failing_rank, _ = CAUSES[name]
    if rank == failing_rank:
        setattr(train_ppo, name, failing)


@pytest.mark.parametrize("cause", CAUSES)
def test_whatever_one_rank_dies_of_both_are_gone_and_say_why(cause, folder, tmp_path):
    flags = [*FLAGS, "--policy", folder / "model", "--output_dir", tmp_path / "ppo"]
    codes, printed = in_two("train_ppo", flags, partial(break_one, cause), SECONDS)
    assert codes in ([1, 1], [2, 2]), "all ranks end, with the exit code of the one that failed"
    assert CAUSES[cause][2] in "".join(printed)
    assert sum("Traceback" in text for text in printed) <= 1, "the other rank adds none"


def first_fails():
    with torchrun.session(run_first=partial(fail, "an earlier stage failed")):
        pass


def one_is_killed():
    """Rank 0, which holds the store, dies without a word while rank 1 is in no collective."""
    with torchrun.session():
        if dist.rank() == 0:
            os._exit(9)
        time.sleep(2 * SECONDS)


def all_is_well():
    threads = threading.active_count()
    with torchrun.session():
        time.sleep(dist.rank())
    assert threading.active_count() == threads, "a thread in the store would abort Python's end"


@pytest.mark.parametrize(
    "function, codes", [(first_fails, [2, 2]), (one_is_killed, [9, 1]), (all_is_well, [0, 0])]
)
def test_ranks_end_together(function, codes):
    assert run_ranks(function, seconds=SECONDS, joined=False) == codes


def test_in_bf16_first_ratios_far_from_1_are_a_warning_given_once():
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("default")
        for error in (0.06, 0.07, float("nan")):
            train_ppo.check_first_ratio(error, bf16=True)
    assert len(given) == 1 and "first_ratio_error" in str(given[0].message)


FULL = "No space left on device"
ERRORS = [
    (KeyboardInterrupt(), 130, "the same command resumes"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "--per_device_train_batch_size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory"),
    (OSError(errno.ENOSPC, FULL), 2, "free some space"),
    (SafetensorError("I/O error: File too large (os error 27)"), 2, "free some space"),
    (Exception(f"{FULL} (os error 28)"), 2, "free some space"),  # tokenizers'
    (PermissionError(errno.EACCES, "denied", "a/b"), 2, "a/b cannot be used (denied)"),
]


@pytest.mark.parametrize(("error", "code", "shown"), ERRORS)
def test_what_may_befall_any_stage_ends_it_with_a_sentence(error, code, shown, capsys):
    with pytest.raises(SystemExit) as stopped, friendly_errors():
        raise error
    assert stopped.value.code == code and shown in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "a"), SafetensorError("b"), ValueError()])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), friendly_errors():
        raise error


@pytest.mark.parametrize("script", ["train_sft", "annotate", "train_rm", "train_ppo", "eval"])
def test_ctrl_c_during_the_imports_leaves_no_traceback(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    path = Path(__file__).parents[2] / f"{script}.py"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted")


def test_a_sentence_starts_a_new_line_below_a_progress_bar(capsys):
    with pytest.raises(SystemExit):
        for _ in tqdm(range(3)):
            fail("a sentence")
    assert "\nerror: a sentence\n" in capsys.readouterr().err


def print_to_nobody():
    read, write = os.pipe()
    os.close(read)
    sys.stdout = open(write, "w")
    with friendly_errors():
        print("a result")


def test_a_script_whose_reader_has_ended_ends_quietly():
    assert exit_codes([started(print_to_nobody)], SECONDS) == [-signal.SIGPIPE]


def test_files_are_written_through_links_and_into_devices(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for text in ("a", "b"):
        write_text(tmp_path / "link", text)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "b"
    (tmp_path / "null").symlink_to("/dev/null")
    write_text(tmp_path / "null", "a")
    assert (tmp_path / "null").is_char_device()
