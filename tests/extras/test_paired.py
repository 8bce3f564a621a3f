"""Runs of two settings are compared seed by seed."""

import json

import pytest

from extras.speed import paired


def make_run(folder, seed, perfect):
    """A folder as train_ppo.py leaves it."""
    folder.mkdir()
    steps = [{"step": step, "shift_poor": -perfect * step} for step in (1, 2, 3)]
    result = {when: {"perfect": perfect} for when in ("before", "after")}
    config = {"task": "toy", "seed": seed, "output_dir": str(folder)}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    for name in ("samples", "heldout"):
        (folder / f"{name}.jsonl").touch()
    return str(folder)


def test_runs_are_compared_seed_by_seed(tmp_path, monkeypatch, capsys):
    ours = [make_run(tmp_path / f"a{seed}", seed, 0.5 + seed / 10) for seed in range(3)]
    theirs = [make_run(tmp_path / f"b{seed}", seed, 0.3) for seed in range(3)]
    monkeypatch.setattr("sys.argv", ["paired", *ours, "--against", *theirs, "--steps", "2"])
    paired.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    difference = result["perfect"]["difference"]
    assert difference["mean"] == pytest.approx(0.3)
    assert difference["low"] < 0.3 < difference["high"]
    assert result["shift_poor"]["runs"]["mean"] == pytest.approx(-0.6 * 1.5)
