"""The page of runs: what stands in the file, which runs stand together, and what a browser makes of it."""

import json
import random
import re
import shutil
import subprocess

import pytest

from bench import paired
from t2g.log import write_json
from t2g.report import AGAINST, CURVES, HELDOUT_SHOWN, SHIFTS, write_page
from t2g.tasks import toy

EVIL = "<script>alert(1)</script>"
STEPS, PER_STEP = (1, 2, 4), 2
METRICS = (*SHIFTS, *AGAINST, "shift_rank", *toy.METRICS, *CURVES)
# Every setting of the slider and of the colours, and a pointer over a token.
USE = """for (const option of $("which").options) for (let i = 0; i <= $("slider").max; i++) {
  [$("which").value, $("slider").value] = [option.value, i];
  show();
  document.querySelector(".text span").dispatchEvent(new PointerEvent("pointerenter"));
}"""


def make_run(folder, **settings):
    """A folder as train_ppo.py leaves it. Step 3 had no update, and the last critique could not be read."""
    config = {"argv": [str(folder)], "task": "toy", "critic": "rule", "reward": "span", "seed": 0, "output_dir": str(folder)}
    rng = random.Random(str(settings))
    folder.mkdir()
    write_json(folder / "config.json", config | settings)
    write_json(folder / "result.json", {when: {"perfect": rng.random(), "perfect_greedy": 1.0} for when in ("before", "after")})

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    metrics = [{"step": step, **{name: rng.gauss(0, 1) for name in METRICS}} for step in range(1, 5)]
    del metrics[2]["clipfrac"], metrics[1]["shift_poor_above"]
    write("metrics.jsonl", metrics)
    tokens = [{"text": text, "delta": -1.0, "kl": 0.0, "shift": -0.5} for text in (EVIL, " &amp; 東京", "\u2028")]
    marks = {"critique": EVIL, "good": [EVIL], "poor": [{"text": "severe " + EVIL, "severity": -0.25}]}
    samples = [{"step": step, "prompt": EVIL, "tokens": tokens} | marks for step in STEPS for _ in range(PER_STEP)]
    write("samples.jsonl", [*samples[:-1], {"step": 4, "prompt": "", "tokens": [], "critique": None}])
    write("heldout.jsonl", [{"prompt": f"{i} {EVIL}", "before": EVIL, "after": "fine"} for i in range(9)])
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three seeds of two settings, under names that differ as well."""
    root = tmp_path_factory.mktemp("runs")
    return [make_run(root / f"{reward}-{seed}", reward=reward, seed=seed) for reward in ("span", "scalar") for seed in (0, 1, 2)]


def data_of(runs, path):
    """What the page of these runs, written to path, shows."""
    assert write_page(path, runs) == str(path)
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def test_a_page_is_one_file_that_needs_no_network_and_holds_no_markup_of_models(runs, tmp_path):
    write_page(tmp_path / "page.html", runs)
    text = (tmp_path / "page.html").read_text()
    assert EVIL not in text and "\\u003cscript>alert(1)" in text
    assert set(re.findall(r"https?://[^\s\"]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in text and not re.search(r"\b(src|href)=", text)
    assert len(text.encode()) < 2e6


def test_runs_that_differ_in_seed_and_place_alone_form_a_group(runs, tmp_path):
    data = data_of(runs[::-1], tmp_path / "page.html")
    assert data["title"] == "toy: reward scalar against reward span"
    assert {group["label"]: group["seeds"] for group in data["groups"]} == {"reward scalar": [2, 1, 0], "reward span": [2, 1, 0]}
    for group in data["groups"]:
        assert [point[0] for point in group["curves"]["shift_poor"]] == [1, 2, 3, 4]
        assert [point[0] for point in group["curves"]["clipfrac"]] == [1, 2, 4], "a step at which the runs lack the metric"
        for mean, low, high in [*group["result"]["perfect"], group["means"]["shift_rank"]]:
            assert low < mean < high
        assert group["result"]["perfect_greedy"] == [[1, 1, 1]] * 2
        assert len(group["samples"]) == len(STEPS) * PER_STEP and len(group["heldout"]) == HELDOUT_SHOWN


def test_one_run_has_means_without_intervals_under_its_main_settings(runs, tmp_path):
    data = data_of(runs[:1], tmp_path / "page.html")
    (group,) = data["groups"]
    assert group["label"] == "reward span, critic rule" and data["title"] == f"toy: {group['label']}"
    assert {len(point) for points in group["curves"].values() for point in points} == {2}
    result = json.loads((runs[0] / "result.json").read_text())
    assert group["result"]["perfect"] == [[pytest.approx(result[when]["perfect"], rel=1e-4)] for when in ("before", "after")]


def test_labels_name_what_differs_and_a_setting_that_is_off_is_as_good_as_absent(tmp_path):
    folders = [
        make_run(tmp_path / "a", span_noise=["flip", 0.3], kl_coef=0.1),
        make_run(tmp_path / "b", kl_coef=0.1, bf16=False, policy=str(tmp_path / "sft"), reward_model=str(tmp_path / "rm")),
        make_run(tmp_path / "c", span_noise=None, kl_coef=0.1, seed=1),
        make_run(tmp_path / "d", kl_coef=0.2),
    ]
    labels = [(group["label"], len(group["seeds"])) for group in data_of(folders, tmp_path / "page.html")["groups"]]
    assert labels == [("kl coef 0.1, span noise flip:0.3", 1), ("kl coef 0.1, no span noise", 2), ("kl coef 0.2, no span noise", 1)]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("absent", "{} is no finished run of train_ppo.py: it has no config.json"),
        ("unfinished", "{} is no finished run of train_ppo.py: it has no result.json"),
        ("broken", "{}/config.json is no JSON: .*"),
        ("of another task", "a page needs finished runs of one task, and these are of summarize and toy"),
        ("named twice", "a run is named twice, and an interval needs independent runs"),
        ("a seed twice", "two of the runs have the same settings and the seed 0; an interval needs independent runs"),
        ("without a task", "{} is no finished run of train_ppo.py: its config.json names no task, or .*"),
        ("without steps", "{} is no finished run of train_ppo.py: .* or its metrics.jsonl is empty"),
        ("five settings", "a page shows 4 settings side by side, and these runs have 5"),
        ("none", "a page needs finished runs of one task, and these are of none"),
        ("unwritable", "{} cannot be written .*"),
    ],
)
def test_what_cannot_be_shown_is_one_clear_sentence(runs, wrong, sentence, tmp_path, capsys):
    folder, out = tmp_path / "run", tmp_path / "page.html"
    folders = [*runs[:1], folder]
    if wrong != "absent":
        make_run(folder, task="summarize" if wrong == "of another task" else "toy")
    if wrong == "unfinished":
        (folder / "result.json").unlink()
    elif wrong == "without a task":
        (folder / "config.json").write_text("[1]")
    elif wrong == "without steps":
        (folder / "metrics.jsonl").write_text("")
    elif wrong == "broken":
        (folder / "config.json").write_text('{"task": ')
    elif wrong == "named twice":
        folders = [folder, folder / ".." / "run"]
    elif wrong == "five settings":
        folders = [folder] + [make_run(tmp_path / f"{n}", kl_coef=n) for n in range(1, 5)]
    elif wrong == "none":
        folders = []
    elif wrong == "unwritable":
        folders, out = runs[:1], folder
    with pytest.raises(SystemExit) as stop:
        write_page(out, folders)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and re.fullmatch(f"error: {sentence.format(re.escape(str(folder)))}\n", said), said


def test_runs_are_compared_seed_by_seed(runs, monkeypatch, capsys):
    flags = ["paired", *map(str, runs[:3]), "--against", *map(str, runs[3:]), "--steps", "2"]
    monkeypatch.setattr("sys.argv", flags)
    paired.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    ends = [[json.loads((run / "result.json").read_text())["after"]["perfect"] for run in part] for part in (runs[:3], runs[3:])]
    difference = sum(a - b for a, b in zip(*ends)) / 3
    assert result["perfect"]["difference"]["mean"] == pytest.approx(difference)
    assert result["perfect"]["difference"]["low"] < difference < result["perfect"]["difference"]["high"]
    steps = [[json.loads(line)["shift_poor"] for line in (run / "metrics.jsonl").read_text().splitlines()[:2]] for run in runs[:3]]
    assert result["shift_poor"]["runs"]["mean"] == pytest.approx(sum(map(sum, steps)) / 6)


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH to look at the page with")
@pytest.mark.parametrize("count", [1, 6])
def test_a_browser_shows_it_without_an_error(runs, count, tmp_path):
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    write_page(page, runs[:count])
    page.write_text(page.read_text().replace("</html>", f"<script>{USE}</script></html>"))
    flags = "--headless --no-sandbox --disable-gpu --window-size=1280,2400 --enable-logging=stderr --v=0 --dump-dom".split()
    command = ["chromium", *flags, f"--user-data-dir={tmp_path}/profile", f"--screenshot={picture}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert not re.search("CONSOLE|Uncaught", done.stderr), done.stderr
    groups, lines = (1 if count == 1 else 2), len(SHIFTS) + len(toy.METRICS) + len(CURVES)
    body = done.stdout.split('<script type="application/json"')[0]
    assert body.count('class="panel"') == groups
    assert body.count("<polyline") == groups * lines
    assert body.count("<polygon") == (0 if count == 1 else groups * lines), "a band for each line, where there are several seeds"
    assert EVIL not in body and "&lt;script&gt;alert(1)" in body and "severe &lt;script" in body
    assert picture.stat().st_size > 60_000, "an empty page of this size makes a picture of 14 kB"
