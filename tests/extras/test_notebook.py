"""examples/tour.ipynb runs from its first cell to its last, and stores no output."""

import subprocess
import sys
from pathlib import Path

import pytest

from t2g.log import read_json

INSTALL = "the notebook needs Jupyter: pip install -r extras/requirements.txt"
nbformat = pytest.importorskip("nbformat", reason=INSTALL)
nbclient = pytest.importorskip("nbclient", reason=INSTALL)
pytest.importorskip("ipykernel", reason=INSTALL)

ROOT = Path(__file__).parents[2]
RUNS = {"span": "span", "scalar": "scalar", "noisy": "span"}  # and their --reward
SHORT = """
SFT_FLAGS = "--max_steps 1 --per_device_train_batch_size 4"
PPO_FLAGS = f"{SFT_FLAGS} --eval_samples 2 --response_length 8"
"""


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)


def by_id(notebook) -> dict:
    return {cell.id: cell for cell in notebook.cells}


def output(cell, kind="text/plain") -> str:
    return "\n".join(out.data[kind] for out in cell.outputs if kind in out.get("data", {}))


@pytest.mark.parametrize("length", ["short", pytest.param("full", marks=pytest.mark.slow)])
def test_it_runs_from_its_first_cell_to_its_last(notebook, tmp_path, length):
    cells = by_id(notebook)
    cells["settings"].source += SHORT * (length == "short") + f"\nRUNS = {str(tmp_path)!r}"
    if length == "short":  # the scripts in the kernel's own process, which has imported torch
        for cell in notebook.cells:
            cell.source = cell.source.replace("!{sys.executable} ", "%run ")
    where = {"metadata": {"path": str(ROOT / "examples")}}
    nbclient.NotebookClient(notebook, timeout=3600, resources=where).execute()

    assert output(cells["six_lines"]) == "tensor([ 0.,  0., -1.,  0.,  0.,  0.,  1.,  0.])"
    assert "<th>change</th>" in output(cells["tensors"], "text/html")
    assert "<iframe" in output(cells["page"], "text/html")
    for name in ("curve", "change_reward", "change_noise"):
        assert output(cells[name], "image/png")
    for run, reward in RUNS.items():
        assert read_json(tmp_path / run / "config.json")["reward"] == reward
    if length == "full":
        result = read_json(tmp_path / "span" / "result.json")
        assert result["after"]["perfect"] > result["before"]["perfect"] + 0.2


def test_it_stores_no_output_and_shows_the_six_lines_of_the_readme(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in filter(None, by_id(notebook)["six_lines"].source.splitlines()):
        assert f">>> {line}" in readme


def test_its_first_cell_says_in_one_sentence_that_there_is_no_checkout(notebook, tmp_path):
    command = [sys.executable, "-c", by_id(notebook)["setup"].source]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and done.stderr.startswith("Set REPOSITORY") and not done.stdout
