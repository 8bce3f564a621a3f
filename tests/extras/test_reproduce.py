"""The runner of recipes, with a stand-in for the scripts: what runs, in which order, and its table."""

import json
import re
from types import SimpleNamespace

import forking
import pytest
from forking import output, refusal, result_of
from scipy.stats import ttest_1samp
from transformers import AutoModelForCausalLM

from extras import ledger, table
from extras.interval import interval
from t2g import adapters

STAND_IN = """
import json, sys
from pathlib import Path
kind, out, seed, level = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
with open(out.parent.parent / "calls", "a") as file:
    file.write(f"{kind} {out.name} {seed}\\n")
if kind == "fail" and not (out.parent.parent / "mended").exists():
    sys.exit("it broke")
if kind == "train":
    assert (out.parent / "sft").is_dir()
    costs = dict(seconds_rollout=1, seconds_critique=2, seconds_score=0.5, seconds_update=3)
    costs |= dict(prompt_tokens=6, response_tokens=4, critique_tokens=5, update_tokens=40)
    steps = [{"step": n, "good": level * min(n, 10) / 10, "kl": level * n, **costs}
             for n in range(1, 21)]
    for n, row in enumerate(steps, 1):
        row["shift_good"] = level / n if n < 11 else 9.0
    steps[2]["shift_poor"] = -level
    del steps[4]["shift_good"]
    out.mkdir(parents=True)
    out.joinpath("metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in steps))
    config = {"critic": "rm", "reward_model": None, "batch_size": 2}
    out.joinpath("config.json").write_text(json.dumps(config))
elif kind == "stage":
    out.mkdir(parents=True)
elif kind == "measure":
    print("some words")
    print(json.dumps({str(out): {"good": level + seed / 100, "bad": 1 - level}}))
"""
RECIPE = """
title = "A table"
jobs = 2
metrics = ["good", "bad"]
main = "good"
main_title = "good answers"
against = "b"
curves = ["a", "b", "c"]
measure = "{script} measure {out} {seed} 0.5"
[words]
script = "STAND_IN"
train = "{script} train {out} {seed}"
[stages.sft]
run = "{script} stage {root}/sft {seed} 0"
[stages.rm]
needs = ["sft"]
run = "{script} stage {root}/rm {seed} 0"
[rows.a]
title = "A"
needs = ["sft", "rm"]
learning_rate = 0.3
run = "{train} 0.9 {learning_rate}"
measure = "{script} measure {out} {seed} 0.8"
[rows.b]
title = "B"
needs = ["sft"]
run = "{train} 0.6"
[rows.c]
title = "C"
needs = ["sft"]
measure = "{script} measure {root}/sft {seed} 0.1"
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "parameters", lambda run: {"a": 100, "b": 100, "rm": 50}[run.name])
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace("STAND_IN", str(tmp_path / "stand_in.py")))
    return path


@pytest.fixture
def command(tmp_path, recipe):
    return f"extras.reproduce --recipe {recipe} --output_dir {tmp_path}/out"


@pytest.fixture
def run(tmp_path, command):
    """run(flags) -> the printed result as an object, and the calls of the stand-in so far."""

    def call(flags=""):
        result = result_of(output(f"{command} {flags}"))
        return result, (tmp_path / "out" / "calls").read_text().splitlines()

    return call


def test_each_stage_runs_once_a_seed_before_the_rows_that_need_it(run, tmp_path):
    result, calls = run()
    for seed in range(3):
        sft, rm = f"stage sft {seed}", f"stage rm {seed}"
        assert calls.count(sft) == calls.count(rm) == 1
        assert calls.index(sft) < calls.index(rm) < calls.index(f"train a {seed}")
    rows = result["rows"]
    assert rows["a"]["good"]["values"] == pytest.approx([0.8, 0.81, 0.82])
    assert rows["a"]["difference"]["mean"] == pytest.approx(0.3)
    assert rows["a"]["difference"]["low"] == pytest.approx(0.3), "paired by seed"
    assert rows["c"]["good"]["mean"] == pytest.approx(0.11) and "difference" not in rows["b"]
    assert rows["a"]["kl"]["mean"] == pytest.approx(0.9 * 18), "the mean of the last five steps"
    assert rows["a"]["difference_at_equal_kl"]["mean"] == pytest.approx(0.3, abs=0.01)
    assert rows["a"]["rollouts_to_rival"]["values"] == [9, 9, 9], "the mean of five is 0.9 * 0.7"
    early = sum(1 / n for n in range(1, 11) if n != 5) / 9  # a step without good tokens has none
    assert rows["b"]["shift_good"]["mean"] == pytest.approx(0.6 * early)
    assert rows["a"]["shift_good_difference"]["mean"] == pytest.approx(0.3 * early)
    assert rows["a"]["shift_poor"]["mean"] == pytest.approx(-0.9)
    assert "shift_rest" not in rows["a"] and "shift_good_difference" not in rows["b"]
    assert "rollouts_to_rival" not in rows["c"], "what is not trained has no rollouts"
    assert set(result["stages"]) == {"sft", "rm"} and result["stages"]["rm"]["seeds"] == 3
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == result
    printed = (tmp_path / "out" / "table.md").read_text()
    assert "| A | 0.81 [" in printed and "| good, difference to B | kl |" in printed
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10000


def test_a_second_call_runs_what_is_missing(run):
    first, calls = run("--rows b --seeds 0 1")
    again, same = run("--rows b --seeds 0 1")
    assert again == first and same == calls
    _, more = run("--seeds 0 1")
    new = ("stage rm", "train a", "measure a", "measure sft")
    assert set(more) - set(calls) == {f"{what} {seed}" for what in new for seed in (0, 1)}


def test_a_failure_is_named_and_the_next_call_goes_on(run, command, recipe, tmp_path):
    whole = recipe.read_text()
    recipe.write_text(whole.replace('run = "{train} 0.6"', 'run = "{script} fail {out} {seed} 0"'))
    code, printed = forking.run(f"{command} --seeds 0 1")
    assert code == 2 and "b of seed 0 failed: see " in printed
    assert re.search("error: b of seed (0, b of seed 1|1, b of seed 0) failed", printed)
    calls = (tmp_path / "out" / "calls").read_text().splitlines()
    assert "measure a 1" in calls and "measure b 0" not in calls
    assert "it broke" in (tmp_path / "out" / "seed-0" / "b.log").read_text()
    recipe.write_text(whole)
    result, more = run("--seeds 0 1")
    assert set(result["rows"]) == {"a", "b", "c"} and more.count("measure a 0") == 1


def test_what_failed_to_be_measured_is_not_trained_again(run, command, recipe):
    whole = recipe.read_text()
    broken = 'run = "{train} 0.6"\nmeasure = "-c 1/0"'
    recipe.write_text(whole.replace('run = "{train} 0.6"', broken))
    assert "b of seed 0 failed: see " in forking.run(f"{command} --rows b --seeds 0")[1]
    recipe.write_text(whole)
    _, calls = run("--rows b --seeds 0")
    assert calls.count("train b 0") == calls.count("measure b 0") == 1


REFUSED = [  # what is replaced in the recipe by what, the flags, and what the sentence says
    ('main = "good"', "", "", "has no main"),
    ('title = "A"\n', "", "", "rows without a title"),
    ("[stages.sft]", "[stages.a]", "", "names a row and a stage"),
    ('title = "B"', "title =", "", "is no TOML"),
    ("jobs = 2", 'also_at_equal_kl = ["words"]', "--seeds 0", "seed-0/a logs no words"),
    ("jobs = 2", "", "--rows z", "no row z; the rows are a, b, c"),
    ("jobs = 2", "", "--recipe tois", "the recipes are"),
]


@pytest.mark.parametrize(("old", "new", "flags", "error"), REFUSED)
def test_a_recipe_that_cannot_run_is_refused(command, recipe, old, new, flags, error):
    recipe.write_text(recipe.read_text().replace(old, new))
    assert error in refusal(f"{command} {flags}")


def test_a_row_may_be_compared_with_another_row(run, recipe, tmp_path):
    recipe.write_text(recipe.read_text().replace('title = "A"', 'title = "A"\nagainst = "c"'))
    rows = run("--seeds 0 1")[0]["rows"]
    assert "| A (differences to C) | 0.8" in (tmp_path / "out" / "table.md").read_text()
    assert rows["a"]["difference"]["mean"] == pytest.approx(0.7)
    assert rows["c"]["difference"]["mean"] == pytest.approx(-0.4)


def test_other_commands_than_before_are_refused(command, recipe):
    output(f"{command} --rows a b --seeds 0")
    recipe.write_text(recipe.read_text().replace("{out} {seed}", "{out} 1{seed}"))
    assert "of seed 0 in" in refusal(f"{command} --rows a --seeds 0")


def test_a_dry_run_prints_the_commands_and_runs_none(command, tmp_path):
    lines = output(f"{command} --dry_run").splitlines()
    assert lines[:2] == ["# A table", "# sft of seed 0"]
    assert lines[6].endswith(f"train {tmp_path}/out/seed-0/a 0 0.9 0.3")
    assert lines[-1].endswith(f"measure {tmp_path}/out/seed-0/sft 0 0.1")
    assert not (tmp_path / "out").exists()


# ---- the table ---------------------------------------------------------------------------------
def test_the_ledger_counts_two_flops_per_weight_and_token_read_and_six_trained(run, tmp_path):
    run("--rows b --seeds 0")
    costs = table.read_cell(tmp_path / "out" / "seed-0", "b", "good")["ledger"]
    read, judged, trained = 20 * 2 * (6 + 4), 20 * 2 * (6 + 4 + 5), 20 * 40
    expected = {
        "rollout": (20.0, read, 2 * 100 * read),
        "critique": (40.0, judged, 2 * 50 * judged),
        "update": (70.0, 2 * read + trained, 4 * 100 * read + 6 * 100 * trained),
    }
    for part, values in expected.items():
        assert tuple(costs[part, unit] for unit in ledger.UNITS) == values


def test_the_ledger_counts_the_model_under_an_adapter(model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    under = sum(weights.numel() for weights in model.parameters())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapter = adapters.added(base, SimpleNamespace(lora_r=4, lora_alpha=32.0))
    adapter.save_pretrained(tmp_path / "run" / "checkpoint-1")
    for path in (tmp_path / "base", tmp_path / "run"):
        assert ledger.parameters(path) == under


def test_at_equal_kl_a_run_is_read_where_it_had_gone_as_far_as_the_other():
    far = {"kl": [0, 2, 4, 8], "curve": [0.0, 0.5, 0.8, 0.9]}
    near = {"kl": [0, 1, 3, 2], "curve": [0.0, 0.1, 0.2, 0.3]}
    assert table.gain_at_equal_kl(far, near) == pytest.approx(0.65 - 0.2)
    assert table.gain_at_equal_kl(near, far) == pytest.approx(0.2 - 0.65)


def test_rollouts_to_the_rival_s_end_say_how_many_seeds_reach_it():
    cells = {name: [] for name in "ab"}
    for ours in ([0.9, 0.4, 0.2], [0.9, 0.6, 0.5]):  # of this metric less is better
        for name, curve in (("a", ours), ("b", [0.8, 0.6, 0.4])):
            cell = dict(scores={"bad": curve[-1]}, seconds=1, ledger={}, kl=[0, 1, 2], shifts={})
            cells[name].append(cell | {"curve": curve})
    recipe = {"main": "bad", "metrics": ["bad"], "against": "b", "lower_is_better": True}
    rows = {name: {"title": name.upper()} for name in cells}
    result = {"rows": table.summarise(cells, recipe, rows), "stages": {}, "commits": []}
    assert result["rows"]["a"]["rollouts_to_rival"]["values"] == [2]
    assert "| reached by 1 of 2 seeds |" in table.markdown(result, recipe, rows)
    better = table.summarise(cells, recipe | {"lower_is_better": False}, rows)
    assert better["a"]["rollouts_to_rival"]["values"] == [1, 1], "a rival that got worse is reached"


@pytest.mark.parametrize("without", [0, 1])
def test_a_metric_that_a_seed_lacks_is_left_out_and_named(without, capsys):
    def cell(**scores):
        return dict(scores=scores, curve=[], shifts={}, ledger={}, seconds=1)

    cells = {name: [cell(good=1.0, perplexity=9.0) for _ in range(2)] for name in "ab"}
    del cells["a"][without]["scores"]["perplexity"]
    rows = {"a": {"against": "b"}, "b": {"against": "a"}}
    by_good = table.summarise(cells, {"main": "good"}, rows)
    assert "perplexity" not in by_good["a"] and by_good["a"]["good"]["values"] == [1.0, 1.0]
    assert by_good["a"]["difference"]["values"] == [0.0, 0.0]
    assert "a: not every seed has a perplexity" in capsys.readouterr().out
    by_perplexity = table.summarise(cells, {"main": "perplexity"}, rows)
    assert all("difference" not in row for row in by_perplexity.values())


def test_curves_can_be_drawn_of_any_rows(tmp_path):
    curve = {"curve": [0.1, 0.4, 0.5], "scores": {"good": 0.5}}
    point = {"curve": [], "scores": {"good": 0.2}}
    recipe = {"main": "good", "main_title": "good answers", "against": "b"}
    rows = {name: {"title": name.upper()} for name in "abc"}
    for cells in ({"a": [curve] * 2, "b": [curve] * 2, "c": [point] * 2}, {"c": [point]}, {}):
        table.plot(tmp_path / "curves.png", cells, recipe | {"curves": ["a", "b", "c"]}, rows)
        assert (tmp_path / "curves.png").stat().st_size > 1000


def test_an_interval_is_student_s_and_needs_two_runs():
    row = interval([0.2, 0.5, 0.3])
    expected = ttest_1samp(row["values"], 0).confidence_interval(0.95)
    assert (row["low"], row["high"]) == pytest.approx(tuple(expected))
    one = {"mean": 0.5, "low": None, "high": None, "seeds": 1, "values": [0.5]}
    assert interval([0.5]) == one
