"""The page of runs: what the file contains, which runs form a group, and what a browser shows."""

import base64
import json
import random
import re
import shutil
import subprocess

import pytest

from t2g.log import read_jsonl, write_json
from t2g.notes import write_whole
from t2g.page import CURVES, MEANS, SHIFTS, write_page
from t2g.tasks import toy

EVIL = "<script>alert(1)</script>"
STEPS, WATCHED = (1, 2, 4), (0, 4)
METRICS = (*MEANS, *toy.METRICS, *CURVES)
TOKENS = {  # with their delta
    **{EVIL: -1.0, " &amp; 東京": 1.0, " is": 0.0, " 27": -1.0, " years": -1.0},
    **{"\u2028": 0.0, "<end>": 0.0},
}
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
# What a reader does; what the page then shows is printed as one line on the console.
USE = """{
const seen = { colours: {} }, texts = nodes => [...nodes].map(node => node.textContent);
const all = (kind, within = document) => [...within.querySelectorAll(kind)];
const one = (kind, word) => all("#samples .columns > div:first-child " + kind)
  .find(node => node.textContent.includes(word));
const lit = () => texts(all(".lit")), form = $("look").elements, word = /(held|step)\\d/;
const point = node => {
  node.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  return [lit(), $("tip").textContent];
};
const press = key => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true }));
const first = () => document.querySelector(".text");
const view = () => [$("step").textContent, first().textContent.match(word)[0]];
seen.open = [view(), form.of.value];
press("ArrowRight");
seen.moved = view();
press("ArrowLeft");
seen.back = view();
if (form.of[1]) form.of[1].click();
seen.step = view();
seen.quote = point(one(".quote", "27 years"));
seen.token = point(one(".token", "years"));
seen.lost = point(one(".quote", "severe"));
seen.metric = point(document.querySelector("#curves [data-note]"));
seen.away = point(document.body);
for (const input of form.which) {
  input.click();
  seen.colours[input.value] = all(".token", first()).map(
    node => node.style.getPropertyValue("--shade"));
}
document.querySelector("summary").click();
seen.details = all("details").map(node => [node.open, node.textContent.length]);
const root = document.documentElement;
seen.overflow = [innerWidth, root.scrollWidth - root.clientWidth];
seen.page = getComputedStyle(document.body).backgroundColor;
console.log("SEEN", btoa(unescape(encodeURIComponent(JSON.stringify(seen)))));
}"""


def make_run(folder, **settings):
    """A folder as train_ppo.py leaves it. Step 3 had no update, and one critique is unreadable."""
    config = {"argv": [str(folder)], "task": "toy", "critic": "rule", "reward": "span", "seed": 0}
    config |= {"output_dir": str(folder)}
    rng = random.Random(str(settings))
    folder.mkdir()
    write_json(folder / "config.json", config | settings)
    before, after = ({"perfect": rng.random(), "perfect_greedy": 1.0} for _ in range(2))
    write_json(folder / "result.json", {"before": before, "after": after})

    metrics = [{"step": n, **{name: rng.gauss(0, 1) for name in METRICS}} for n in range(1, 5)]
    del metrics[2]["clipfrac"], metrics[1]["shift_poor_above"]
    write_whole(folder / "metrics.jsonl", metrics)
    poor = [{"text": "27 years", "tokens": [4, 5]}]
    poor += [{"text": EVIL, "severity": -0.25, "tokens": [1]}]
    poor += [{"text": f"severe {EVIL}", "tokens": []}]
    marks = {"prompt": EVIL, "critique": EVIL, "poor": poor}
    marks |= {"good": [{"text": "&amp; 東京", "tokens": [2]}]}

    def sample(name, step, **more):
        tokens = []
        for text, delta in {f"{name}{step}": 0.0, **TOKENS}.items():
            numbers = {"delta": delta, "kl": step / 4 * (1 + delta), "value": 0.5}
            tokens.append({"text": text, **numbers})
            if name == "step":
                tokens[-1]["shift"] = len(text) / 9
        return {"step": step, "tokens": tokens, **marks, **more}

    samples = [sample("step", n, prompt=p * 600) for n in STEPS for p in ("s", "long")]
    samples[-1] |= {"tokens": [], "critique": None, "good": [], "poor": []}
    samples += [sample("held", step, heldout=True) for step in WATCHED]
    write_whole(folder / "samples.jsonl", samples)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three seeds of two settings, under names that differ as well."""
    root = tmp_path_factory.mktemp("runs")
    pairs = [(reward, seed) for reward in ("span", "scalar") for seed in range(3)]
    return [make_run(root / f"{reward}-{seed}", reward=reward, seed=seed) for reward, seed in pairs]


def data_of(runs, path):
    """What the page of these runs, written to path, shows."""
    assert write_page(path, runs) == str(path)
    return json.loads(DATA.search(path.read_text())[1])


def test_a_page_is_one_file_that_needs_no_network_and_holds_no_markup_of_models(runs, tmp_path):
    write_page(tmp_path / "page.html", runs)
    text = (tmp_path / "page.html").read_text()
    assert EVIL not in text and "\\u003cscript>alert(1)" in text
    assert set(re.findall(r"https?://[^\s\"]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in text and not re.search(r"\b(src|href)=", text)
    assert len(text.encode()) < 2e6


def test_runs_that_differ_only_in_seed_and_place_form_a_group(runs, tmp_path):
    data = data_of(runs[::-1], tmp_path / "page.html")
    assert data["title"] == "toy: reward scalar against reward span"
    assert [group["label"] for group in data["groups"]] == ["reward scalar", "reward span"]
    for group in data["groups"]:
        assert group["seeds"] == [2, 1, 0]
        assert [point[0] for point in group["curves"]["shift_poor"]] == [1, 2, 3, 4]
        steps = [point[0] for point in group["curves"]["clipfrac"]]
        assert steps == [1, 2, 4], "without a step at which the runs lack the metric"
        for mean, *seeds in [*group["result"]["perfect"], group["means"]["shift_rank"]]:
            assert len(seeds) == 3 and mean == pytest.approx(sum(seeds) / 3, rel=1e-3)
        assert len(group["samples"]) == 2 * len(STEPS) + len(WATCHED)
    alone = data_of(runs[:1], tmp_path / "page.html")
    assert alone["title"] == "toy: reward span, critic rule" and not alone["learned"]
    (group,) = alone["groups"]
    assert {len(point) for points in group["curves"].values() for point in points} == {2}


def test_labels_name_what_differs_and_a_setting_that_is_off_is_as_good_as_absent(tmp_path):
    beside = {name: str(tmp_path / name) for name in ("policy", "reward_model")}
    settings = [
        dict(kl_target=6.0, kl_coef=0.1),
        dict(kl_coef=0.1, bf16=False, **beside),
        dict(kl_target=None, kl_coef=0.1, seed=1),
        dict(kl_coef=0.0, reward="prm", critic="rm"),
    ]
    folders = [make_run(tmp_path / str(n), **more) for n, more in enumerate(settings)]
    data = data_of(folders, tmp_path / "page.html")
    assert data["learned"], "one of the critics is a model"
    assert [(group["label"], group["seeds"]) for group in data["groups"]] == [
        ("critic rule, kl_coef 0.1, kl_target 6.0, reward span", [0]),
        ("critic rule, kl_coef 0.1, kl_target off, reward span", [0, 1]),
        ("critic rm, kl_coef 0.0, kl_target off, reward prm", [0]),
    ]


def test_what_cannot_be_shown_is_one_clear_sentence(runs, tmp_path, refused):
    def refusal(*folders, out=tmp_path / "page.html"):
        return refused(write_page, out, folders)

    first, folder = runs[0], make_run(tmp_path / "run")
    assert "it has no config.json" in refusal(first, tmp_path / "absent")
    summarize = make_run(tmp_path / "summarize", task="summarize")
    assert "these are of summarize and toy" in refusal(first, summarize)
    assert "these are of none" in refusal()
    others = [make_run(tmp_path / f"{n}", kl_coef=n) for n in range(1, 5)]
    assert "4 settings side by side; these runs have 5" in refusal(folder, *others)
    (folder / "result.json").unlink()
    assert "it has no result.json" in refusal(folder)
    (folder / "config.json").write_text('{"task": ')
    assert "config.json is damaged" in refusal(folder)


# ---- in a browser ------------------------------------------------------------------------------
needs_browser = pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium on PATH")


def look_at(page, picture, *flags):
    """What a browser has seen after USE, and the page's elements; a picture goes into a file."""
    command = "chromium --headless --no-sandbox --disable-gpu --enable-logging=stderr --v=0".split()
    command += ["--dump-dom", *flags, f"--user-data-dir={picture.parent}/profile"]
    command += [f"--screenshot={picture}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    seen = re.findall(r'"SEEN (\S+)", source', done.stderr)
    assert len(seen) == len(re.findall("CONSOLE|Uncaught", done.stderr)) == 1, done.stderr
    body = done.stdout.split('<script type="application/json"')[0]
    return json.loads(base64.b64decode(seen[0])), body


def used(page, folders):
    """A page, with what a reader does to it."""
    write_page(page, folders)
    page.write_text(page.read_text().replace("</html>", f"<script>{USE}</script></html>"))
    return page


@needs_browser
def test_a_browser_shows_it_without_an_error(runs, tmp_path):
    picture = tmp_path / "page.png"
    page = used(tmp_path / "page.html", runs)
    seen, body = look_at(page, picture, "--window-size=1280,2400")
    lines = 2 * (len(SHIFTS) + len(toy.METRICS) + len(CURVES))
    assert body.count('class="panel"') == 2
    assert body.count("<polyline") == lines * (1 + 3), "a thin line for each of three seeds"
    assert EVIL not in body and "&lt;script&gt;alert(1)" in body and "severe &lt;script" in body
    assert picture.stat().st_size > 60_000, "an empty page of this size makes a picture of 14 kB"
    assert seen["overflow"] == [1280, 0]
    assert seen["details"] == [[True, 2400]], "the one prompt that is too long to stand in full"

    assert seen["open"] == [["After step 0 of 4", "held0"], "heldout"]
    assert seen["moved"] == ["After step 4 of 4", "held4"]
    assert seen["back"] == ["After step 0 of 4", "held0"]
    assert seen["step"] == ["Step 1 of 4", "step1"]
    assert seen["quote"] == [["27", " years", "27 years"], ""], "its tokens and itself"
    assert seen["token"][0] == [" years", "27 years"], "itself and its quote"
    assert seen["token"][1].startswith("reward δ\u00a0\u22121 ")
    assert seen["lost"] == [[], "This stands nowhere in the response: it rewards nothing."]
    assert seen["metric"] == [[], toy.METRICS["coverage"]] and seen["away"] == [[], ""]
    good, poor = (f"rgba(var(--{sign}), calc(var(--full) * 1.000))" for sign in ("good", "poor"))
    assert seen["colours"]["delta"] == ["none", poor, good, "none", poor, poor, "none", "none"]
    assert len(set(seen["colours"]["value"])) == 1 and len(set(seen["colours"]["shift"])) > 4


@needs_browser
def test_one_run_fits_a_phone_and_is_dark_where_the_reader_is(tmp_path):
    """It was trained with a learned critic and has no held-out samples."""
    folder = make_run(tmp_path / "run", critic="rm")
    rows = [row for row in read_jsonl(folder / "samples.jsonl") if not row.get("heldout")]
    write_whole(folder / "samples.jsonl", rows)
    used(tmp_path / "page.html", [folder])
    phone = tmp_path / "phone.html"  # a window has 500 pixels at least, a frame has not
    style = "width: 360px; height: 2000px; border: 0"
    phone.write_text(f'<iframe src="page.html" style="{style}"></iframe>')
    dark = "--blink-settings=preferredColorScheme=0"
    for flags, colour in (([], "rgb(251, 251, 249)"), ([dark], "rgb(21, 24, 28)")):
        seen, _ = look_at(phone, tmp_path / "page.png", "--window-size=500,2000", *flags)
        assert seen["overflow"] == [360, 0] and seen["page"] == colour
        assert seen["open"] == [["Step 1 of 4", "step1"], "step"]
