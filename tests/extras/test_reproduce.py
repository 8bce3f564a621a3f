"""reproduce.py with a stand-in for the scripts: what is run, in which order, what a second call does, and the table it makes."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import extras.reproduce as reproduce
from extras import table
from t2g import adapters
from t2g.metrics import interval

STAND_IN = """
import json, sys, time
from pathlib import Path
kind, out, seed, level = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
with open(out.parent.parent / "calls", "a") as file:
    file.write(f"{kind} {out.name} {seed}\\n")
if kind == "fail" and not (out.parent.parent / "mended").exists():
    sys.exit("it broke")
if kind == "train":
    assert (out.parent / "sft").is_dir()
    steps = [{"step": n, "good": level * min(n, 10) / 10, "seconds_rollout": 1.0, "seconds_critique": 2.0, "seconds_score": 0.5,
              "seconds_update": 3.0,
              "kl": level * n, "prompt_tokens": 6, "response_tokens": 4, "critique_tokens": 5, "update_tokens": 40}
             for n in range(1, 21)]
    out.mkdir(parents=True)
    out.joinpath("metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in steps))
    out.joinpath("config.json").write_text(json.dumps({"critic": "rm", "reward_model": None, "batch_size": 2}))
    print("\\r 1%", file=sys.stderr)
elif kind == "stage":
    out.mkdir(parents=True)
elif kind == "measure":
    print("some words")
    print(json.dumps({str(out): {"good": level + seed / 100, "bad": 1 - level}}))
"""
TABLE = """
title = "A table"
jobs = 2
metrics = ["good", "bad"]
main = "good"
main_title = "good answers"
against = "b"
curves = ["a", "b", "c"]
measure = "{stand_in} measure {{out}} {{seed}} 0.5"
[stages.sft]
run = "{stand_in} stage {{root}}/sft {{seed}} 0"
[stages.rm]
needs = ["sft"]
learned = true
run = "{stand_in} stage {{root}}/rm {{seed}} 0"
[quick]
[sweep]
stand_in = "more"
"""
ROWS = {
    "01_a": 'title = "A"\nneeds = ["sft", "rm"]\nlearning_rate = 3.0\nsweep = true\nrun = "{stand_in} train {{out}} {{seed}} 0.9"\n'
    'measure = "{stand_in} measure {{out}} {{seed}} 0.8"',
    "02_b": 'title = "B"\nneeds = ["sft"]\nrun = "{stand_in} train {{out}} {{seed}} 0.6"',
    "03_c": 'title = "C"\nneeds = ["sft"]\nmeasure = "{stand_in} measure {{root}}/sft {{seed}} 0.1"',
}


@pytest.fixture
def recipe(tmp_path):
    folder = tmp_path / "recipe"
    folder.mkdir()
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    for name, text in {"table": TABLE, **ROWS}.items():
        (folder / f"{name}.toml").write_text(text.format(stand_in=tmp_path / "stand_in.py"))
    return folder


@pytest.fixture
def run(tmp_path, recipe, monkeypatch, capsys):
    """run(*flags) -> the printed result as an object, and the calls of the stand-in so far."""

    def call(*flags):
        out = ["--output_dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "--recipe", str(recipe), *out, *flags])
        reproduce.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1]), (
            tmp_path / "out" / "calls"
        ).read_text().splitlines()

    return call


def test_each_stage_is_run_once_a_seed_before_the_rows_that_need_it_and_the_table_has_every_row(
    run, tmp_path
):
    result, calls = run()
    assert list(result["rows"]) == ["a", "b", "c"]
    assert result["rows"]["a"]["good"] == pytest.approx(
        {"mean": 0.81, "low": 0.785, "high": 0.835, "seeds": 3}, abs=1e-3
    )
    assert result["rows"]["a"]["good, less b"] == pytest.approx(
        {"mean": 0.3, "low": 0.3, "high": 0.3, "seeds": 3}
    )
    assert result["rows"]["c"]["good"]["mean"] == pytest.approx(0.11)
    assert "steps_to_90_percent" not in result["rows"]["c"], "what is not trained has no steps"
    assert result["rows"]["a"]["kl"]["mean"] == pytest.approx(0.9 * 18)
    assert result["rows"]["a"]["good of rollouts, less b at equal KL"]["mean"] == pytest.approx(
        0.3, abs=0.01
    )
    assert set(result["stages"]) == {"sft", "rm"} and result["stages"]["rm"]["seeds"] == 3
    for seed in range(3):
        assert calls.count(f"stage sft {seed}") == calls.count(f"stage rm {seed}") == 1
        assert (
            calls.index(f"stage sft {seed}")
            < calls.index(f"stage rm {seed}")
            < calls.index(f"train a {seed}")
        )
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == result
    printed = (tmp_path / "out" / "table.md").read_text()
    assert (
        "| A | 0.81 [" in printed
        and "| good, difference to B | kl | good in rollouts at equal KL, difference to B |"
        in printed
    )
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10000


def test_a_second_call_runs_nothing_again_and_a_new_row_or_seed_only_what_is_missing(run):
    first, calls = run("--rows", "b", "--seeds", "0", "1")
    again, same = run("--rows", "b", "--seeds", "0", "1")
    assert again == first and same == calls
    _, more = run("--seeds", "0", "1")
    assert set(more) - set(calls) == {
        f"{what} {seed}"
        for what in ("stage rm", "train a", "measure a", "measure sft")
        for seed in (0, 1)
    }


def test_what_fails_is_named_and_the_rest_is_done_and_the_next_call_goes_on(
    run, recipe, tmp_path, capsys
):
    (recipe / "02_b.toml").write_text(
        (recipe / "02_b.toml").read_text().replace(" train ", " fail ")
    )
    with pytest.raises(SystemExit):
        run("--seeds", "0", "1")
    printed = capsys.readouterr()
    assert "b of seed 0 failed: see " in printed.out
    assert re.search("error: b of seed (0, b of seed 1|1, b of seed 0) failed", printed.err)
    calls = (tmp_path / "out" / "calls").read_text().splitlines()
    assert "measure a 1" in calls and "measure b 0" not in calls
    assert "it broke" in (tmp_path / "out" / "seed-0" / "b.log").read_text()
    (tmp_path / "out" / "mended").touch()
    result, more = run("--seeds", "0", "1")
    assert set(result["rows"]) == {"a", "b", "c"} and more.count("measure a 0") == 1


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("table", "[quick]", "", "has no [quick]"),
        ("table", 'against = "b"', "", "table.toml has no against"),
        ("01_a", 'title = "A"', "", "rows without a title"),
        ("table", "[stages.sft]", "[stages.a]", "names a row and a stage"),
        ("02_b", 'title = "B"', "title =", "is no TOML"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_told_before_anything_runs(
    run, recipe, name, old, new, said, capsys
):
    text = (recipe / f"{name}.toml").read_text()
    (recipe / f"{name}.toml").write_text(text.replace(old, new))
    with pytest.raises(SystemExit):
        run("--quick")
    assert said in capsys.readouterr().err


def test_where_less_is_better_there_are_no_steps_to_a_best_and_a_row_may_be_held_against_its_own(
    run, recipe, tmp_path
):
    (recipe / "table.toml").write_text(
        (recipe / "table.toml")
        .read_text()
        .replace('main = "good"', 'main = "good"\nbetter = "lower"')
    )
    (recipe / "01_a.toml").write_text((recipe / "01_a.toml").read_text() + '\nagainst = "c"')
    rows = run("--seeds", "0", "1")[0]["rows"]
    assert "| A (differences to C) | 0.8" in (tmp_path / "out" / "table.md").read_text()
    assert not any(metric.startswith("steps") for row in rows.values() for metric in row)
    assert rows["a"]["good, less c"]["mean"] == pytest.approx(0.7) and rows["c"]["good, less b"][
        "mean"
    ] == pytest.approx(-0.4)


def test_a_row_whose_command_has_changed_is_not_taken_for_done(run, recipe, capsys):
    run("--rows", "c", "--seeds", "0")
    (recipe / "03_c.toml").write_text((recipe / "03_c.toml").read_text().replace("0.1", "0.2"))
    with pytest.raises(SystemExit):
        run("--rows", "c", "--seeds", "0")
    assert "was made by other commands" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rows", "z"], "there is no row z; the rows are a, b, c"),
        (["--quick", "--rows"], "expected"),
    ],
)
def test_bad_flags_are_one_sentence(run, flags, said, capsys):
    with pytest.raises(SystemExit):
        run(*flags)
    assert said in capsys.readouterr().err


def test_a_sweep_tries_a_third_and_three_times_of_each_learning_rate(recipe):
    table_, rows = reproduce.read_recipe(str(recipe), None, "sweep")
    assert {name: round(row["learning_rate"], 3) for name, row in rows.items()} == {
        "a x 0.33": 1.0,
        "a x 1": 3.0,
        "a x 3": 9.0,
    }
    [sft, rm, job] = reproduce.jobs_of(table_, {"a x 3": rows["a x 3"]}, 3, Path("out"), "sweep")
    assert (sft.name, rm.name, job.needs) == (
        "sft",
        "rm",
        ["sft", "rm"],
    ) and "out/seed-3/a_x_3" in job.commands[0]
    assert all(line.endswith(" more") for line in (*sft.commands, *rm.commands, *job.commands))


def test_the_ledger_counts_two_flops_a_weight_and_token_read_and_six_trained(run, tmp_path):
    run("--rows", "b", "--seeds", "0")
    root = tmp_path / "out" / "seed-0"
    for run_name, weights in (("b", (10, 10)), ("rm", (5, 10))):
        (root / run_name / "checkpoint-20").mkdir(parents=True)
        save_file(
            {"w": torch.zeros(weights)}, root / run_name / "checkpoint-20" / "model.safetensors"
        )
    parts = table.read_cell(root, "b", "good")["ledger"]
    read = 20 * 2 * (6 + 4)
    assert parts["rollout"] == {"seconds": 20.0, "tokens": read, "flops": 2 * 100 * read}
    assert parts["critique"] == {
        "seconds": 40.0,
        "tokens": read + 20 * 2 * 5,
        "flops": 2 * 50 * (read + 200),
    }
    assert parts["update"] == {
        "seconds": 70.0,
        "tokens": 2 * read + 20 * 40,
        "flops": 4 * 100 * read + 6 * 100 * 800,
    }


def test_steps_are_counted_on_the_smoothed_curve():
    curve = table.smooth([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    assert curve[4] == 0 and curve[5] == pytest.approx(0.2) and curve[9] == 1
    assert table.first(curve, 0.9) == 10 and table.first(curve, 2) is None


def test_at_equal_kl_a_run_is_read_where_it_had_gone_as_far_as_the_other_at_its_end():
    far, near = (
        {"kl": [0, 2, 4, 8], "curve": [0.0, 0.5, 0.8, 0.9]},
        {"kl": [0, 1, 3, 2], "curve": [0.0, 0.1, 0.2, 0.3]},
    )
    assert table.gain_at_equal_kl(far, near) == pytest.approx(0.65 - 0.3)
    assert table.gain_at_equal_kl(near, far) == pytest.approx(0.3 - 0.65)


def test_of_one_seed_there_is_a_mean_and_no_interval():
    assert interval([0.5]) == {"mean": 0.5, "low": None, "high": None, "seeds": 1, "values": [0.5]}
    assert (
        table.shown(interval([0.5]), 2, 1) == "0.50" and table.shown(interval([]), 2, 3) == "never"
    )


def test_a_dry_run_prints_the_commands_and_runs_none(run, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "reproduce.py",
            "--recipe",
            str(recipe),
            "--dry_run",
            "--output_dir",
            str(tmp_path / "out"),
        ],
    )
    reproduce.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["# A table", "# sft of seed 0"] and lines[-1].endswith(
        f"measure {tmp_path}/out/seed-0/sft 0 0.1"
    )
    assert not (tmp_path / "out").exists()


CURVE = {"curve": [0.1, 0.4, 0.5], "scores": {"good": 0.5}}
POINT = {"curve": [], "scores": {"good": 0.2}}


@pytest.mark.parametrize(
    ("against", "found", "panels"),
    [
        ("b", {"a": [CURVE] * 2, "b": [CURVE] * 2, "c": [POINT] * 2}, [["A", "B"], ["A", "B"], []]),
        ("c", {"a": [CURVE], "b": [CURVE], "c": [POINT]}, [["A"], ["A", "B"], []]),
        (None, {"a": [CURVE], "b": [CURVE]}, [["A"], ["A", "B"]]),
        ("b", {"a": [CURVE]}, [["A"], ["A"]]),
        ("b", {"c": [POINT]}, [[], [], []]),
        ("b", {"of no curve": [POINT]}, [[], []]),
    ],
)
def test_the_left_panel_has_the_first_row_and_the_one_it_is_held_against_the_right_one_all(
    against, found, panels, monkeypatch
):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    recipe = {
        "main": "good",
        "main_title": "good answers",
        "curves": ["a", "b", "c"],
        "against": against,
    }
    table.plot("curves.png", found, recipe, {name: {"title": name.upper()} for name in found})
    [figure] = drawn
    assert [sorted(text.get_text() for text in axes.texts) for axes in figure.axes] == panels
    assert [len(axes.lines) for axes in figure.axes[:2]] == [len(names) for names in panels[:2]]
    assert len(figure.axes[0].collections) == len(panels[0]) and not figure.axes[1].collections, (
        "bands on the left alone"
    )
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert figure.axes[0].get_ylabel() == "good answers\nin training rollouts, mean of 5"


def test_names_at_the_ends_of_curves_keep_their_order_and_do_not_overlap():
    moved = table.apart({"low": 0.0, "b": 0.52, "c": 0.5, "a": 0.55}, gap=0.1)
    assert list(moved) == ["low", "c", "b", "a"] and moved["low"] == 0
    assert [moved["c"], moved["b"], moved["a"]] == pytest.approx(
        [0.1 * n + 0.4233 for n in range(3)], abs=1e-3
    )


def flags_of(source) -> set[str]:
    return set(re.findall(r"""["'](--\w+)["']""", source))


def files_of(line) -> list[Path]:
    """The files with the flags of a command: its script, the package of its module, its critic."""
    module = re.search(r"-m ([\w.]+)", line)
    package = reproduce.HERE.joinpath(*module[1].split(".")[:-1]).glob("*.py") if module else []
    return [*package, *(reproduce.HERE / word for word in line.split() if word.endswith(".py"))]


def test_every_recipe_in_the_repository_can_be_read_and_names_stages_and_scripts_that_exist():
    for folder in sorted((reproduce.HERE / "recipes").iterdir()):
        recipe, rows = reproduce.read_recipe(str(folder), None, "")
        jobs = reproduce.jobs_of(recipe, rows, 0, Path("out"), "")
        assert {need for job in jobs for need in job.needs} <= {job.name for job in jobs}
        known = flags_of(
            "".join(path.read_text() for path in (reproduce.HERE / "t2g").rglob("*.py"))
        )
        for line in (line for job in jobs for line in job.commands):
            flags = set(re.findall(r"(--\w+)", line)) - {"--nproc_per_node"}
            assert flags <= known | flags_of("".join(map(Path.read_text, files_of(line)))), line
        assert set(recipe["curves"]) <= set(rows) and recipe["against"] in rows


def test_the_ledger_counts_the_model_under_an_adapter(model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    under = sum(weights.numel() for weights in model.parameters())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapter = adapters.added(base, SimpleNamespace(lora_r=4, lora_alpha=32.0))
    adapter.save_pretrained(tmp_path / "run" / "checkpoint-1")
    beside = sum(weights.numel() for weights in adapter.parameters() if weights.requires_grad)
    assert table.parameters(tmp_path / "base") == under and 0 < beside < under
    assert table.parameters(tmp_path / "run") == under + beside
