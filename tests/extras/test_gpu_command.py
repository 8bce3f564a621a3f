"""The check of a GPU, rehearsed on a CPU, and done on a GPU where there is one."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from extras.speed import gpu, gpu_agreement, gpu_speed
from extras.speed.synthetic import random_model


@pytest.fixture
def rows():
    """rows is filled by report(): the measured number and whether a check passed, by name."""
    return {}


@pytest.fixture
def report(rows):
    return lambda what, measured, beside="", ok=None: rows.update({what: (measured, ok)})


@pytest.mark.slow
def test_a_rehearsal_runs_every_part(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("sys.argv", ["gpu", "--rehearse", "--out", str(tmp_path)])
    assert gpu.main() is False
    table = (tmp_path / "gpu.md").read_text()
    assert "rehearsal" in table and "failed" not in table and table.count("passed") == 9
    assert "killed and resumed, 12 steps" in table and "tiny, batch 8: peak memory" in table


def test_the_speed_part_measures_each_phase(tmp_path, rows, report):
    gpu_speed.speed(SimpleNamespace(out=tmp_path, rehearse=True), report)
    for phase in ("rollout", "score", "update", "shift"):
        assert rows[f"tiny, batch 8: {phase}, s"][0] > 0


def test_sampling_is_compared_with_a_pass_without_a_cache(tmp_path, rows, report):
    random_model("tiny", tmp_path / "model", initializer_range=0.3)
    gpu_agreement.compare_without_cache(tmp_path, report)
    assert [*rows.values()] == [(1, True)]


def test_a_step_that_differs_fails(rows, report):
    cpu = {"after": torch.ones(9), "move": torch.arange(9.0), "sampled": torch.ones(3)}
    for name, case in {
        "same": cpu,
        "weights": cpu | {"after": torch.ones(9) + 1e-3},
        "tokens": cpu | {"sampled": torch.zeros(3)},
        "bf16": cpu | {"move": -cpu["move"]},
    }.items():
        gpu_agreement.compare_steps(name, case, cpu, report)
    assert [ok for _, ok in rows.values()] == [True, False, False, False]


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no GPU")
def test_this_gpu_takes_the_step_of_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu", "--parts", "agreement", "--out", str(tmp_path)])
    assert gpu.main() is False


def test_without_a_gpu_there_is_one_sentence(monkeypatch, run_main):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no GPU; --rehearse" in run_main(gpu)[1]
