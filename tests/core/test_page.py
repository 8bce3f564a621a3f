"""The page of runs: what stands in the file, which runs stand together, and what a browser makes of it."""

import base64
import json
import random
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

import train_ppo
from t2g.feedback import Feedback
from t2g.log import read_jsonl, write_json
from t2g.page import (
    AGAINST,
    CURVES,
    HELDOUT_SHOWN,
    SHIFTS,
    Samples,
    changed_words,
    quotes_with_tokens,
    write_page,
)
from t2g.score import Scores
from t2g.tasks import toy

EVIL = "<script>alert(1)</script>"
STEPS, PER_STEP, WATCHED = (1, 2, 4), 2, (0, 4)
METRICS = (*SHIFTS, *AGAINST, "shift_rank", *toy.METRICS, *CURVES)
TOKENS = {
    EVIL: -1.0,
    " &amp; 東京": 1.0,
    " is": 0.0,
    " 27": -1.0,
    " years": -1.0,
    "\u2028": 0.0,
    "<end>": 0.0,
}  # with their delta
# What a reader does, most of it in the first response that is shown; and what is seen then, as one line on the console.
USE = """{
const seen = { colours: {} }, texts = nodes => [...nodes].map(node => node.textContent);
const all = (kind, within = document) => [...within.querySelectorAll(kind)], one = (kind, word) =>
  all("#samples .columns > div:first-child " + kind).find(node => node.textContent.includes(word));
const lit = () => texts(all(".lit")), said = () => $("tip").textContent, form = $("look").elements, word = /(held|step)\\d/;
const point = node => { node.dispatchEvent(new PointerEvent("pointerover", { bubbles: true })); return [lit(), said()]; };
const press = (key, more) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, ...more }));
const view = () => [$("step").textContent, document.querySelector(".text").textContent.match(word)[0], form.which.value];
const colours = () => [...document.querySelector(".text").children].map(node => node.style.getPropertyValue("--shade"));
const ramp = () => [...$("ramp").children].map(node => [node.textContent, node.style.getPropertyValue("--shade")]);
const free = () => [...form.which].filter(input => !input.disabled).map(input => input.value);

seen.open = [view(), form.of.value, free(), texts(all(".text")).map(text => text.match(word)[0]), $("learned").hidden];
form.which[1].click();
seen.start = [colours(), ramp()];
press("ArrowRight");
seen.moved = [view(), colours(), ramp(), one(".token", "years").dataset.says];
press("ArrowRight", { altKey: true });
form.which[0].focus();
press("ArrowLeft");
seen.back = view();
form.of[1].click();
form.which[3].click();
seen.chosen = view();
form.of[0].click();
seen.lacking = [view(), free()];
form.of[1].click();
seen.restored = [view(), free()];

seen.quote = point(one(".quote", "27 years"));
seen.token = point(one(".token", "years"));
seen.plain = point(one(".token", "is"));
seen.lost = point(one(".quote", "severe"));
seen.metric = point(document.querySelector("#curves [data-says]"));
seen.away = point(document.body);
one(".quote", "27 years").focus();
seen.focus = lit();
one(".token", "is").focus();
press("ArrowRight");
seen.arrow = [document.activeElement.textContent, view()];
seen.end = all(".text:has(.token)").map(text => texts(text.querySelectorAll(".end")).join());
for (const input of form.which) {
  input.click();
  seen.colours[input.value] = colours();
}
document.activeElement.blur();
seen.steps = ["ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"].map(key => { press(key); return view().slice(0, 2); });
$("slider").value = 2;
$("slider").dispatchEvent(new Event("input"));
form.which[1].click();
seen.negative = [view(), colours(), ramp()];
seen.axis = all("#curves .card").filter(card => card.textContent.startsWith("eos rate")).map(card => texts(all(".y", card)));
document.querySelector("summary").click();
seen.details = all("details").map(node => [node.open, node.textContent.length]);
seen.overflow = [innerWidth, document.documentElement.scrollWidth - document.documentElement.clientWidth];
seen.page = getComputedStyle(document.body).backgroundColor;
console.log("SEEN", btoa(unescape(encodeURIComponent(JSON.stringify(seen)))));
}"""


def make_run(folder, **settings):
    """A folder as train_ppo.py leaves it. Step 3 had no update, the last critique could not be read, and one KL is negative."""
    config = {
        "argv": [str(folder)],
        "task": "toy",
        "critic": "rule",
        "reward": "span",
        "seed": 0,
        "output_dir": str(folder),
    }
    rng = random.Random(str(settings))
    folder.mkdir()
    write_json(folder / "config.json", config | settings)
    write_json(
        folder / "result.json",
        {when: {"perfect": rng.random(), "perfect_greedy": 1.0} for when in ("before", "after")},
    )

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    metrics = [
        {"step": step, **{name: rng.gauss(0, 1) for name in METRICS}} for step in range(1, 5)
    ]
    for row in metrics:
        row["eos_rate"] = 0.99 + row["step"] / 500
    del metrics[2]["clipfrac"], metrics[1]["shift_poor_above"]
    write("metrics.jsonl", metrics)
    poor = ["27 years", {"text": EVIL, "severity": -0.25}, "severe " + EVIL, "end"]
    marks = {"prompt": EVIL, "critique": EVIL, "good": ["&amp; 東京"], "poor": poor}

    def tokens(name, kl, **more):
        pairs = {name: 0.0, **TOKENS}.items()
        return [
            {"text": text, "delta": delta, "kl": kl * (1 + delta), "value": 0.5} | more
            for text, delta in pairs
        ]

    samples = [
        {"step": step, "tokens": tokens(f"step{step}", 0, shift=0)} | marks
        for step in STEPS
        for _ in range(PER_STEP)
    ]
    for token in (token for sample in samples for token in sample["tokens"]):
        token["shift"] = len(token["text"]) / 9
    samples[-2]["tokens"][1]["kl"], samples[-2]["tokens"][2]["kl"] = -0.5, 0.125
    samples[-1] = {"step": 4, "prompt": "", "tokens": [], "critique": None}
    watched = [
        {"step": step, "heldout": True, "tokens": tokens(f"held{step}", step / 4)} | marks
        for step in WATCHED
    ]
    write("samples.jsonl", samples + watched)
    prompts = [f"{i} {EVIL}" for i in range(7)] + ["l" * 601, "s" * 600]
    write(
        "heldout.jsonl",
        [{"prompt": prompt, "before": EVIL, "after": "fine"} for prompt in prompts[::-1]],
    )
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three seeds of two settings, under names that differ as well."""
    root = tmp_path_factory.mktemp("runs")
    return [
        make_run(root / f"{reward}-{seed}", reward=reward, seed=seed)
        for reward in ("span", "scalar")
        for seed in (0, 1, 2)
    ]


def data_of(runs, path):
    """What the page of these runs, written to path, shows."""
    assert write_page(path, runs) == str(path)
    return json.loads(
        re.search(
            r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL
        )[1]
    )


def test_a_page_is_one_file_that_needs_no_network_and_holds_no_markup_of_models(runs, tmp_path):
    write_page(tmp_path / "page.html", runs)
    text = (tmp_path / "page.html").read_text()
    assert EVIL not in text and "\\u003cscript>alert(1)" in text
    assert set(re.findall(r"https?://[^\s\"]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in text and not re.search(r"\b(src|href)=", text)
    assert len(text.encode()) < 2e6


def test_runs_that_differ_in_seed_and_place_alone_form_a_group(runs, tmp_path):
    data = data_of(runs[::-1], tmp_path / "page.html")
    assert data["title"] == "toy: one scalar against span rewards"
    assert {group["label"]: group["seeds"] for group in data["groups"]} == {
        "one scalar": [2, 1, 0],
        "span rewards": [2, 1, 0],
    }
    assert {group["settings"] for group in data["groups"]} == {""}
    for group in data["groups"]:
        assert [point[0] for point in group["curves"]["shift_poor"]] == [1, 2, 3, 4]
        assert [point[0] for point in group["curves"]["clipfrac"]] == [1, 2, 4], (
            "a step at which the runs lack the metric"
        )
        for mean, *seeds in [*group["result"]["perfect"], group["means"]["shift_rank"]]:
            assert len(seeds) == 3 and mean == pytest.approx(sum(seeds) / 3, rel=1e-3)
        assert group["result"]["perfect_greedy"] == [[1, 1, 1, 1]] * 2
        assert (
            len(group["samples"]) == len(STEPS) * PER_STEP + len(WATCHED)
            and len(group["heldout"]) == HELDOUT_SHOWN
        )


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
    pieces = changed_words(
        "Leo is grown up, works as a nurse.", "Leo is 26, works as a nurse, misses Ana.\n"
    )
    assert pieces["before"] == [
        ["Leo is", 0],
        [" grown up", 1],
        [", works as a nurse", 0],
        [".", 0],
    ]
    assert pieces["after"] == [
        ["Leo is", 0],
        [" 26", 1],
        [", works as a nurse", 0],
        [", misses Ana", 1],
        [".", 0],
    ]
    assert changed_words("", "Yes") == {"before": [], "after": [["Yes", 1]]}


def test_one_run_has_means_without_intervals_under_its_main_settings(runs, tmp_path):
    data = data_of(runs[:1], tmp_path / "page.html")
    (group,) = data["groups"]
    assert (group["label"], group["settings"], data["title"]) == (
        "span rewards",
        "critic rule",
        "toy: span rewards, critic rule",
    )
    assert {len(point) for points in group["curves"].values() for point in points} == {2}
    result = json.loads((runs[0] / "result.json").read_text())
    assert group["result"]["perfect"] == [
        [pytest.approx(result[when]["perfect"], rel=1e-4)] for when in ("before", "after")
    ]


def test_labels_name_what_differs_and_a_setting_that_is_off_is_as_good_as_absent(tmp_path):
    folders = [
        make_run(tmp_path / "a", noise=["flip", 0.3], kl_coef=0.1),
        make_run(
            tmp_path / "b",
            kl_coef=0.1,
            bf16=False,
            policy=str(tmp_path / "sft"),
            reward_model=str(tmp_path / "rm"),
        ),
        make_run(tmp_path / "c", noise=None, kl_coef=0.1, seed=1),
        make_run(tmp_path / "d", kl_coef=0.2),
    ]
    groups = data_of(folders, tmp_path / "page.html")["groups"]
    assert [(group["label"], group["settings"], len(group["seeds"])) for group in groups] == [
        ("kl coef 0.1", "noise flip:0.3", 1),
        ("kl coef 0.1", "no noise", 2),
        ("kl coef 0.2", "no noise", 1),
    ]


def test_the_reward_comes_first_and_in_words(tmp_path):
    folders = [
        make_run(tmp_path / reward, reward=reward, critic=reward)
        for reward in ("span", "prm", "scalar")
    ]
    groups = data_of(folders, tmp_path / "page.html")["groups"]
    assert [group["label"] for group in groups] == [
        "span rewards",
        "rewards by sentence",
        "one scalar",
    ]
    assert [group["settings"] for group in groups] == ["critic span", "critic prm", "critic scalar"]


@pytest.mark.parametrize(
    ("critic", "learned"), [("rm", True), ("openai", True), ("rule", False), ("scalar", False)]
)
def test_a_page_knows_whether_a_learned_model_wrote_its_critiques(critic, learned, tmp_path):
    assert (
        data_of([make_run(tmp_path / "run", critic=critic)], tmp_path / "page.html")["learned"]
        is learned
    )


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("absent", "{} is no finished run of train_ppo.py: it has no config.json"),
        ("unfinished", "{} is no finished run of train_ppo.py: it has no result.json"),
        ("broken", "{}/config.json is no JSON: .*"),
        ("of another task", "a page needs runs of one task; these are of summarize and toy"),
        ("named twice", "a run is named twice; .*"),
        ("a seed twice", "two of the runs have the same settings and the seed 0"),
        ("without a task", "{} is no run of train_ppo.py: .*"),
        ("without steps", "{} is no run of train_ppo.py: .*"),
        ("five settings", "a page shows 4 settings side by side; these runs have 5"),
        ("none", "a page needs runs of one task; these are of none"),
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
    assert stop.value.code == 2 and re.fullmatch(
        f"error: {sentence.format(re.escape(str(folder)))}\n", said
    ), said


ARGS = {
    "response_length": 12,
    "temperature": 1.0,
    "bf16": False,
    "seed": 3,
    "span_weights": "uniform",
}


def watch(samples, model, tokenizer, step, critic, **args):
    """Shows three held-out prompts after a step; values and KL are numbers that tell the place."""
    run = SimpleNamespace(args=SimpleNamespace(**ARGS | args), samples=samples, first=1)
    run.heldout = [SimpleNamespace(prompt=f"Post {i}.") for i in range(3)]
    run.tokenizer = tokenizer

    def score(actor, reference, rollout, args):
        places = rollout.mask * torch.arange(1.0, rollout.mask.shape[1] + 1)
        return Scores(None, None, places, places / 100)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ppo, "score", score)
        train_ppo.show_heldout(step, SimpleNamespace(model=model), None, critic, run)
    return read_jsonl(samples.folder / "samples.jsonl")


def test_held_out_prompts_meet_the_same_random_numbers_at_each_step_which_are_not_those_of_the_run(
    model, tokenizer, tmp_path
):
    samples, state = Samples(tmp_path, 100), torch.get_rng_state()
    rows = [
        watch(samples, model, tokenizer, step, lambda examples, texts: [None] * 3)[-3:]
        for step in (0, 1, 2, 100)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert [row["step"] for row in rows[2]] == [1] * 3, "step 2 is none of the dozen"
    first, second, last = (
        [{**row, "step": None} for row in part] for part in (rows[0], rows[1], rows[3])
    )
    assert first == second == last and {row["heldout"] for row in first} == {True}
    assert len({str(row["tokens"]) for row in first}) == 3, (
        "sampled, and each response with its own numbers"
    )
    assert (
        watch(samples, model, tokenizer, 100, lambda *_: [None] * 3, temperature=0.01)[-3]["tokens"]
        != first[0]["tokens"]
    )
    for token_number, token in enumerate(first[0]["tokens"], 1):
        assert (token["delta"], token["value"], token["kl"]) == (
            0,
            token_number,
            token_number / 100,
        )
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
        assert (
            watch(samples, model, tokenizer, 100, lambda *_: [None] * 3)[-3]["tokens"]
            != first[0]["tokens"]
        )
        model.lm_head.weight.mul_(-1)


def test_a_run_that_goes_on_keeps_what_was_seen_before_its_first_update(model, tokenizer, tmp_path):
    for step in (0, 1, 12):
        watch(Samples(tmp_path, 12, keep_until=step), model, tokenizer, step, lambda *_: [None] * 3)
    Samples(tmp_path, 12, keep_until=11)
    assert [row["step"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [0] * 3 + [1] * 3
    Samples(tmp_path, 12)
    assert not read_jsonl(tmp_path / "samples.jsonl")


def test_held_out_responses_are_rewarded_as_those_of_the_run(model, tokenizer, tmp_path):
    def critic(examples, texts):
        severe = Feedback("poor", poor=[{"text": texts[0], "severity": 0.5}])
        return [severe, 0.25, None]

    plain = watch(Samples(tmp_path, 1), model, tokenizer, 0, critic)
    severe = watch(Samples(tmp_path, 1), model, tokenizer, 0, critic, span_weights="severity")
    for rows, reward in ((plain, -1), (severe, -0.5)):
        text, number, unreadable = ([token["delta"] for token in row["tokens"]] for row in rows)
        assert set(text) == {reward, 0}, "special tokens are no part of the text"
        assert number == [0] * (len(number) - 1) + [0.25] and set(unreadable) == {0}
    assert [row["critique"] for row in plain] == ["poor", "+0.25", None]


needs_browser = pytest.mark.skipif(
    not shutil.which("chromium"), reason="no chromium on PATH to look at the page with"
)


def look_at(page, picture, *flags):
    """What a browser has seen after USE, and the page's elements; a picture goes into a file. The console says nothing else."""
    command = [
        "chromium",
        *"--headless --no-sandbox --disable-gpu --enable-logging=stderr --v=0 --dump-dom".split(),
        *flags,
    ]
    command += [
        f"--user-data-dir={picture.parent}/profile",
        f"--screenshot={picture}",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    seen = re.findall(r'"SEEN (\S+)", source', done.stderr)
    assert len(seen) == len(re.findall("CONSOLE|Uncaught", done.stderr)) == 1, done.stderr
    return json.loads(base64.b64decode(seen[0])), done.stdout.split(
        '<script type="application/json"'
    )[0]


def used(page, folders, use=USE):
    """A page, with what a reader does to it."""
    write_page(page, folders)
    page.write_text(page.read_text().replace("</html>", f"<script>{use}</script></html>"))
    return page


@needs_browser
@pytest.mark.parametrize("count", [1, 6])
def test_a_browser_shows_it_without_an_error(runs, count, tmp_path):
    picture = tmp_path / "page.png"
    seen, body = look_at(
        used(tmp_path / "page.html", runs[:count]), picture, "--window-size=1280,2400"
    )
    groups, lines = (1 if count == 1 else 2), len(SHIFTS) + len(toy.METRICS) + len(CURVES)
    assert body.count('class="panel"') == groups
    seeds = 0 if count == 1 else 3
    assert body.count("<polyline") == groups * lines * (1 + seeds), "a thin line for each seed"
    assert EVIL not in body and "&lt;script&gt;alert(1)" in body and "severe &lt;script" in body
    assert picture.stat().st_size > 60_000, "an empty page of this size makes a picture of 14 kB"
    assert seen["overflow"] == [1280, 0] and seen["axis"] == [["0.9", "0.95", "1"]], (
        "a share's axis spans 0.1 at least"
    )
    assert seen["details"] == [[True, 601]], "the one prompt that is too long to stand in full"

    scored = ["delta", "kl", "value"]
    assert seen["open"] == [
        ["After step 0 of 4", "held0", "delta"],
        "heldout",
        scored,
        ["held0"] * groups,
        True,
    ]
    none, ends, shades = (
        ["none"] * 8,
        [number for number, _ in seen["start"][1]],
        [shade for _, shade in seen["start"][1]],
    )
    above = [
        f"rgba(var(--above), calc(var(--full) * {shade}))"
        for shade in ("0.500", "0.707", "0.866", "1.000")
    ]
    assert (
        seen["start"][0] == none
        and ends == ["0", "0.5", "1", "1.5", "2"]
        and shades == ["none", *above]
    )
    assert (
        seen["moved"][0] == ["After step 4 of 4", "held4", "kl"]
        and seen["moved"][2] == seen["start"][1]
    ), "one scale for all steps"
    assert seen["moved"][1] == [
        above[1],
        "none",
        above[3],
        above[1],
        "none",
        "none",
        above[1],
        above[1],
    ]
    assert seen["moved"][3] == "reward δ\u00a0−1    KL\u00a00    value\u00a00.5"
    assert seen["back"] == ["After step 0 of 4", "held0", "kl"], (
        "from wherever the focus is; Alt and an arrow are the browser's"
    )
    assert seen["chosen"] == ["Step 1 of 4", "step1", "shift"]
    assert seen["lacking"] == [["After step 0 of 4", "held0", "delta"], scored], (
        "what is chosen is always what is shown"
    )
    assert seen["restored"] == [["Step 1 of 4", "step1", "shift"], [*scored, "shift"]]

    phrase = ["27", " years", "27 years"]
    assert seen["quote"] == [phrase, ""] and seen["focus"] == phrase, (
        "its tokens and itself, and nothing else"
    )
    assert seen["token"][0] == [" years", "27 years"], "itself and its quote"
    assert (
        seen["token"][1].startswith("reward δ\u00a0\u22121 ")
        and "change of log π\u00a00.67" in seen["token"][1]
    )
    assert seen["plain"][0] == [] and seen["plain"][1].startswith("reward δ\u00a00 ")
    assert seen["lost"] == [[], "This stands nowhere in the response: it rewards nothing."]
    assert seen["metric"] == [[], toy.METRICS["coverage"]] and seen["away"] == [[], ""]
    assert seen["arrow"] == ["27", seen["chosen"]], (
        "the token behind it has the focus, and the slider stays"
    )
    assert set(seen["end"]) == {"<end>"}, "its name is no text"

    good, poor = (f"rgba(var(--{sign}), calc(var(--full) * 1.000))" for sign in ("good", "poor"))
    assert seen["colours"]["delta"] == ["none", poor, good, "none", poor, poor, "none", "none"]
    assert seen["colours"]["kl"] == none and len(set(seen["colours"]["value"])) == 1
    assert seen["colours"]["shift"][1] == good and len(set(seen["colours"]["shift"])) > 4
    assert seen["steps"] == [[f"Step {step} of 4", f"step{step}"] for step in (2, 4, 4, 2)]
    assert seen["negative"][0] == ["Step 4 of 4", "step4", "kl"]
    assert seen["negative"][1] == ["none", above[3].replace("above", "below"), above[0], *none[3:]]
    assert [number for number, _ in seen["negative"][2]] == ["−0.5", "−0.25", "0", "0.25", "0.5"], (
        "k1 may be of either sign"
    )


@needs_browser
@pytest.mark.parametrize("kept", ["greedy", "none"])
def test_a_browser_shows_runs_whose_held_out_rows_have_fewer_numbers_or_are_not_there(
    kept, tmp_path
):
    folder = make_run(tmp_path / "run", critic="rm")
    rows = [
        row
        for row in read_jsonl(folder / "samples.jsonl")
        if not row.get("heldout") or (kept == "greedy" and row["step"])
    ]
    for token in (token for row in rows if row.get("heldout") for token in row["tokens"]):
        del token["kl"], token["value"]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    looked = USE[: USE.index("form.which[1]")] + USE[USE.index("console.log") :]
    seen, body = look_at(used(tmp_path / "page.html", [folder], looked), tmp_path / "page.png")
    there = kept == "greedy"
    first = ["After step 4 of 4", "held4", "delta"] if there else ["Step 1 of 4", "step1", "delta"]
    free = ["delta"] if there else ["delta", "kl", "value", "shift"]
    assert seen["open"] == [
        first,
        "heldout" if there else "step",
        free,
        [first[1]] * (1 if there else 2),
        False,
    ]
    assert ('id="prompts" hidden' in body) is not there


@needs_browser
def test_it_fits_a_phone_and_is_dark_where_the_reader_is(runs, tmp_path):
    used(tmp_path / "page.html", runs)
    phone = tmp_path / "phone.html"  # a window has 500 pixels at least, a frame has not
    phone.write_text(
        '<iframe src="page.html" style="width: 360px; height: 2000px; border: 0"></iframe>'
    )
    light, _ = look_at(phone, tmp_path / "light.png", "--window-size=500,2000")
    dark, _ = look_at(
        phone,
        tmp_path / "dark.png",
        "--window-size=500,2000",
        "--blink-settings=preferredColorScheme=0",
    )
    assert light["overflow"] == dark["overflow"] == [360, 0]
    assert (light["page"], dark["page"]) == ("rgb(251, 251, 249)", "rgb(21, 24, 28)")
    assert light["quote"] == [["27", " years", "27 years"], ""]
    for picture in ("light.png", "dark.png"):
        assert (tmp_path / picture).stat().st_size > 40_000
