"""The core stands alone: arrows of imports go one way, and extras can be deleted."""

import ast
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from forking import python

ROOT = Path(__file__).parents[2]
STAGES = ("train_sft.py", "annotate.py", "train_rm.py", "train_ppo.py", "eval.py")
CORE = [*(ROOT / name for name in STAGES), *sorted((ROOT / "t2g").rglob("*.py"))]


def imported_by(path) -> set[Path]:
    """The files of the core that a file imports, anywhere in it; extras as their folder."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            place = ROOT / name.replace(".", "/")
            files = (place.with_suffix(".py"), place / "__init__.py")
            found |= {file for file in files if file in CORE}
            found |= {ROOT / "extras"} if name.startswith("extras") else set()
    return found - {path}


ARROWS = {path: imported_by(path) for path in CORE}


def test_the_core_imports_nothing_of_extras_and_the_maths_nothing_but_feedback():
    assert not [path for path, imports in ARROWS.items() if ROOT / "extras" in imports]
    assert not ARROWS[ROOT / "t2g" / "ppo.py"]
    maths = {ROOT / "t2g" / "feedback.py", ROOT / "t2g" / "quotes.py"}
    assert ARROWS[ROOT / "t2g" / "align.py"] == maths and not ARROWS[ROOT / "t2g" / "quotes.py"]
    stages = {path for imports in ARROWS.values() for path in imports if path.parent == ROOT}
    assert not stages, "nothing imports a script"


@pytest.mark.parametrize("script", STAGES)
def test_every_stage_ends_with_friendly_errors(script):
    assert "\n@cli.friendly_errors()\ndef main():" in (ROOT / script).read_text()


def test_there_is_no_circle_of_imports():
    left = {path: set(imports) for path, imports in ARROWS.items()}
    while leaves := {path for path, imports in left.items() if not imports}:
        left = {path: x - leaves for path, x in left.items() if path not in leaves}
    assert not left, sorted(str(path.relative_to(ROOT)) for path in left)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A copy of the repository without extras, recipes and their tests."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    if not files:
        pytest.skip("not a git clone")
    folder = tmp_path_factory.mktemp("alone")
    for name in files.splitlines():
        is_extra = name.startswith(("extras/", "recipes/", "tests/extras/"))
        if not is_extra and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(folder, *command):
    return python(*command, cwd=folder, env=os.environ | {"PYTHONPATH": ""})


@pytest.mark.parametrize("how", ["--collect-only", pytest.param("-q", marks=pytest.mark.slow)])
def test_without_extras_the_tests_of_the_core_can_be_imported_and_pass(alone, how):
    house = "--ignore=tests/core/test_house.py"
    run(alone, "-m", "pytest", how, "-p", "no:cacheprovider", house, "tests/core")


def test_without_extras_a_short_main_job_runs(alone):
    short = "--max_steps 2 --per_device_train_batch_size 4 --output_dir runs/toy"
    run(alone, "train_sft.py", *f"{short}/sft".split())
    few = "--critic rule --eval_samples 2 --response_length 8"
    printed = run(alone, "train_ppo.py", *f"{few} {short}/ppo".split())
    assert "using the starting policy" in printed and (alone / "runs/toy/ppo/page.html").is_file()
