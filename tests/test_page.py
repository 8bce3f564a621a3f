"""The page of runs: what stands in the file, which runs stand together, and what a browser makes of it."""

import base64
import json
import random
import re
import shutil
import subprocess

import pytest

from bench import paired
from t2g.log import write_json
from t2g.report import AGAINST, CURVES, HELDOUT_SHOWN, SHIFTS, changed_words, quotes_with_tokens, write_page
from t2g.tasks import toy

EVIL = "<script>alert(1)</script>"
STEPS, PER_STEP = (1, 2, 4), 2
METRICS = (*SHIFTS, *AGAINST, "shift_rank", *toy.METRICS, *CURVES)
TOKENS = {EVIL: -1.0, " &amp; 東京": 1.0, " is": 0.0, " 27": -1.0, " years": -1.0, "\u2028": 0.0, "<end>": 0.0}  # with their delta
# What a reader does, in the first response that is shown; and what is seen then, as one line on the console.
USE = """{
const seen = { steps: [], colours: {} }, texts = nodes => [...nodes].map(node => node.textContent), one = (kind, word) =>
  [...document.querySelectorAll("#samples .columns > div:first-child " + kind)].find(node => node.textContent.includes(word));
const lit = () => texts(document.querySelectorAll(".lit")), said = () => $("tip").textContent;
const point = node => { node.dispatchEvent(new PointerEvent("pointerover", { bubbles: true })); return [lit(), said()]; };
seen.quote = point(one(".quote", "27 years"));
seen.token = point(one(".token", "years"));
seen.plain = point(one(".token", "is"));
seen.lost = point(one(".quote", "severe"));
seen.metric = point(document.querySelector("#curves [data-says]"));
seen.away = point(document.body);
one(".quote", "27 years").focus();
seen.focus = lit();
one(".token", "is").focus();
document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
seen.arrow = document.activeElement.textContent;
for (const input of $("look").elements.which) {
  input.click();
  seen.colours[input.value] = [...document.querySelector(".text").children].map(node => node.style.getPropertyValue("--shade"));
}
for (let i = $("slider").max; i >= 0; i--) {
  $("slider").value = i;
  $("slider").dispatchEvent(new Event("input"));
  seen.steps.push([$("step").textContent, document.querySelector(".text").textContent.match(/step\\d/)[0]]);
}
$("look").elements.of[1].click();
seen.heldout = [texts(document.querySelectorAll(".text")).map(text => text.match(/held\\d/)[0]),
  one(".token", "years").dataset.says, [...$("look").elements.which].map(input => input.disabled)];
seen.overflow = [innerWidth, document.documentElement.scrollWidth - document.documentElement.clientWidth];
seen.back = getComputedStyle(document.body).backgroundColor;
console.log("SEEN", btoa(unescape(encodeURIComponent(JSON.stringify(seen)))));
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
    poor = ["27 years", {"text": EVIL, "severity": -0.25}, "severe " + EVIL, "end"]
    marks = {"prompt": EVIL, "critique": EVIL, "good": ["&amp; 東京"], "poor": poor}

    def tokens(name):
        pairs = {name: 0.0, **TOKENS}.items()
        return [{"text": text, "delta": delta, "kl": 0.0, "shift": len(text) / 9} for text, delta in pairs]

    samples = [{"step": step, "tokens": tokens(f"step{step}")} | marks for step in STEPS for _ in range(PER_STEP)]
    watched = [{"text": token["text"], "delta": token["delta"]} for token in tokens("held1")]
    write(
        "samples.jsonl",
        [
            *samples[:-1],
            {"step": 4, "prompt": "", "tokens": [], "critique": None},
            {"step": 1, "heldout": True, "tokens": watched} | marks,
        ],
    )
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
        assert len(group["samples"]) == len(STEPS) * PER_STEP + 1 and len(group["heldout"]) == HELDOUT_SHOWN


def test_a_quote_knows_the_tokens_that_it_marks(runs, tmp_path):
    sample = data_of(runs[:1], tmp_path / "page.html")["groups"][0]["samples"][0]
    assert sample["good"] == [{"text": "&amp; 東京", "tokens": [2]}]
    years, evil, severe, end = sample["poor"]
    assert years == {"text": "27 years", "tokens": [4, 5]}
    assert evil == {"text": EVIL, "severity": -0.25, "tokens": [1]}
    assert severe["tokens"] == [], "it stands nowhere"
    assert end["tokens"] == [], "it stands in the name of EOS alone"


def test_a_quote_given_twice_marks_two_places_and_one_poor_quote_the_last():
    tokens = [{"text": text, "delta": -1.0} for text in ("no", " and", " no", " and", " no")]
    poor = quotes_with_tokens({"tokens": tokens, "poor": ["no", "no", "and"]})["poor"]
    assert [quote["tokens"] for quote in poor] == [[2, 4], [2, 4], [3]]


def test_of_held_out_texts_the_words_that_changed_are_marked():
    pieces = changed_words("Leo is grown up, works as a nurse.", "Leo is 26, works as a nurse, misses Ana.\n")
    assert pieces["before"] == [["Leo is", 0], [" grown up", 1], [", works as a nurse", 0], [".", 0]]
    assert pieces["after"] == [["Leo is", 0], [" 26", 1], [", works as a nurse", 0], [", misses Ana", 1], [".", 0]]
    assert changed_words("", "Yes") == {"before": [], "after": [["Yes", 1]]}


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


needs_browser = pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH to look at the page with")


def look_at(page, picture, *flags):
    """What a browser has seen after USE, and the page's elements; a picture goes into a file. The console says nothing else."""
    command = ["chromium", *"--headless --no-sandbox --disable-gpu --enable-logging=stderr --v=0 --dump-dom".split(), *flags]
    command += [f"--user-data-dir={picture.parent}/profile", f"--screenshot={picture}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    seen = re.findall(r'"SEEN (\S+)", source', done.stderr)
    assert len(seen) == len(re.findall("CONSOLE|Uncaught", done.stderr)) == 1, done.stderr
    return json.loads(base64.b64decode(seen[0])), done.stdout.split('<script type="application/json"')[0]


def used(page, folders):
    """A page, with what a reader does to it."""
    write_page(page, folders)
    page.write_text(page.read_text().replace("</html>", f"<script>{USE}</script></html>"))
    return page


@needs_browser
@pytest.mark.parametrize("count", [1, 6])
def test_a_browser_shows_it_without_an_error(runs, count, tmp_path):
    picture = tmp_path / "page.png"
    seen, body = look_at(used(tmp_path / "page.html", runs[:count]), picture, "--window-size=1280,2400")
    groups, lines = (1 if count == 1 else 2), len(SHIFTS) + len(toy.METRICS) + len(CURVES)
    assert body.count('class="panel"') == groups
    assert body.count("<polyline") == groups * lines
    assert body.count("<polygon") == (0 if count == 1 else groups * lines), "a band for each line, where there are several seeds"
    assert EVIL not in body and "&lt;script&gt;alert(1)" in body and "severe &lt;script" in body
    assert picture.stat().st_size > 60_000, "an empty page of this size makes a picture of 14 kB"
    assert seen["overflow"] == [1280, 0]

    phrase = ["27", " years", "27 years"]
    assert seen["quote"] == [phrase, ""] and seen["focus"] == phrase, "its tokens and itself, and nothing else"
    assert seen["token"][0] == [" years", "27 years"], "itself and its quote"
    assert seen["token"][1].startswith("reward δ\u00a0\u22121 ") and "change of log π\u00a00.67" in seen["token"][1]
    assert seen["plain"][0] == [] and seen["plain"][1].startswith("reward δ\u00a00 ")
    assert seen["lost"] == [[], "This stands nowhere in the response: it rewards nothing."]
    assert seen["metric"] == [[], toy.METRICS["coverage"]] and seen["away"] == [[], ""]
    assert seen["arrow"] == "27", "the token behind it has the focus"

    good, poor = (f"rgba(var(--{sign}), calc(var(--full) * 1.000))" for sign in ("good", "poor"))
    assert seen["colours"]["delta"] == ["none", poor, good, "none", poor, poor, "none", "none"]
    assert set(seen["colours"]["kl"]) == {"none"}
    assert seen["colours"]["shift"][1] == good and len(set(seen["colours"]["shift"])) > 4
    assert seen["heldout"] == [["held1"] * groups, "reward δ\u00a0\u22121", [False, True, True]], "it has no other number"
    assert seen["steps"] == [["4 of 4", "step4"], ["2 of 4", "step2"], ["1 of 4", "step1"]]


@needs_browser
def test_it_fits_a_phone_and_is_dark_where_the_reader_is(runs, tmp_path):
    used(tmp_path / "page.html", runs)
    phone = tmp_path / "phone.html"  # a window has 500 pixels at least, a frame has not
    phone.write_text('<iframe src="page.html" style="width: 360px; height: 2000px; border: 0"></iframe>')
    light, _ = look_at(phone, tmp_path / "light.png", "--window-size=500,2000")
    dark, _ = look_at(phone, tmp_path / "dark.png", "--window-size=500,2000", "--blink-settings=preferredColorScheme=0")
    assert light["overflow"] == dark["overflow"] == [360, 0]
    assert (light["back"], dark["back"]) == ("rgb(251, 251, 249)", "rgb(21, 24, 28)")
    assert light["quote"] == [["27", " years", "27 years"], ""]
    for picture in ("light.png", "dark.png"):
        assert (tmp_path / picture).stat().st_size > 40_000
