"""The page on which people mark responses, used in a browser with real mouse, touch and keys."""

import json
import re
import shutil

import pytest

from extras.human import page as human_page
from extras.human.records import records
from t2g.align import resolve, span_rewards, token_offsets
from t2g.log import read_jsonl
from t2g.notes import read_feedback

CHROMIUM = shutil.which("chromium")
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
EVIL = "<img src=x onerror=alert(1)></script>"
SUMMARY = "Ana is 27, lives in Porto, works as a nurse."
ROWS = [
    {"id": "a", "prompt": f"Post {EVIL}", "response": SUMMARY, "topic": "Ana"},
    {"id": "b", "prompt": "Post", "response": f"no 27, no 27 and 1.27 😀 no\nnaïve 東京 {EVIL}"},
    {"id": "c", "prompt": "Post", "response": "Ben is 41."},
]


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    if not CHROMIUM:
        pytest.skip("needs chromium on PATH")
    with driver.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def visit(browser, tmp_path, tokenizer):
    """visit(**options) opens a page of ROWS in a new browser profile with these options."""
    seen, path = [], tmp_path / "page.html"
    ids = [tokenizer.encode(row["response"], add_special_tokens=False) for row in ROWS]
    human_page.write_page(path, ROWS, tokenizer, ids)

    def open_page(**options):
        tab = browser.new_page(**options)
        for event in ("request", "console", "pageerror", "dialog"):
            tab.on(event, lambda what: seen.append(getattr(what, "url", str(what))))
        tab.goto(path.as_uri())
        return tab

    yield open_page
    assert seen and all(re.match("(file|blob):", what) for what in seen), "no network, no errors"


def word(tab, text, nth=0):
    exact = re.compile(f"^{re.escape(text)}$")
    return tab.locator("#text [role=option]").filter(has_text=exact).nth(nth)


def read_back(tab, path):
    """The records of the downloaded file, and the spans that their quotes mark, by id."""
    with tab.expect_download() as download:
        tab.click("#download")
    download.value.save_as(path)
    rows, marks = {}, {}
    for record in records(read_jsonl(path), path):
        rows[record["id"]] = record
        marks[record["id"]] = sorted(resolve(record["response"], read_feedback(record))[0])
    return rows, marks


def shown(tab):
    """The spans that the page colours in the response, and the rewards of its tokens."""
    see = "nodes => nodes.map(node => [[...node.textContent].length, node.className])"
    nodes = tab.locator("#text span").evaluate_all(see)
    kinds = "".join((kind or " ")[0] * length for length, kind in nodes)
    spans = [(*run.span(), 1 if run[0][0] == "g" else -1) for run in re.finditer("g+|p+", kinds)]
    rewards = tab.locator("#tokens small").all_inner_texts()
    return spans, [int(reward.replace("−", "-")) for reward in rewards]


def test_the_mouse_marks_what_the_file_then_says(visit, tmp_path, tokenizer):
    tab = visit(viewport={"width": 1400, "height": 800})
    word(tab, "Ana").click()
    word(tab, "Porto").click()
    tab.click("#good")
    word(tab, "lives").hover()
    tab.mouse.down()
    word(tab, "27").hover()
    tab.mouse.up()
    tab.click("#poor")
    word(tab, "nurse").click()
    tab.click("#poor")
    word(tab, "nurse").click()  # removes the mark
    tab.fill("#why", "She is 41.\nThe city is right.")
    spans, rewards = shown(tab)
    assert [SUMMARY[a:b] for a, b, _ in spans] == ["Ana", "27, lives", "Porto"]
    offsets = token_offsets(tokenizer, tokenizer.encode(SUMMARY, add_special_tokens=False))
    assert rewards == span_rewards(offsets, spans).tolist() and {-1, 0, 1} == {*rewards}
    assert tab.inner_text("#prompt div") == ROWS[0]["prompt"] and not tab.locator("img").count()
    tab.click("#next")
    assert tab.inner_text("#text") == ROWS[1]["response"]
    assert tab.inner_text("#progress") == "1 of 3 reviewed, saved in this browser"
    found, marks = read_back(tab, tmp_path / "file.jsonl")
    assert marks == {"a": spans}, "responses without a mark or a sentence are left out"
    assert found["a"].items() >= {**ROWS[0], "critique": "She is 41.\nThe city is right."}.items()


def test_touch_marks_words_and_ranges_on_a_phone(visit, tmp_path):
    phone = dict(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    tab = visit(color_scheme="dark", **phone)
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    word(tab, "is").tap()
    word(tab, "27").tap()  # neighbours make one mark
    tab.tap("#poor")
    start, end = (word(tab, text).bounding_box() for text in ("lives", "Porto"))
    start, end = ({"x": box["x"] + 9, "y": box["y"] + 9} for box in (start, end))
    touch, beside = tab.context.new_cdp_session(tab), start | {"x": start["x"] + 40}
    for kind, *points in (("Start", start), ("Move", beside), ("Move", end), ("End",)):
        touch.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
    tab.tap("#good")
    tab.wait_for_selector("#text .good")
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    found, marks = read_back(tab, tmp_path / "file.jsonl")
    assert [SUMMARY[a:b] for a, b, _ in marks["a"]] == ["is 27", "lives in Porto"]
    assert found["a"]["critique"] == 'Good: "lives in Porto". Poor: "is 27".'


def test_keys_are_enough_and_a_reload_keeps_everything(visit, tmp_path):
    tab = visit()

    def press(keys):
        for key in keys.split():
            tab.keyboard.press(key)

    press("ArrowRight g ArrowRight ArrowRight Shift+ArrowRight Shift+ArrowRight p n")
    assert tab.inner_text("#number") == "Response 2 of 3"
    press("ArrowRight p Backspace g Delete Enter ArrowRight g b b")
    before = shown(tab)
    assert [SUMMARY[a:b] for a, b, _ in before[0]] == ["Ana", "27, lives"]
    tab.reload()
    assert shown(tab) == before and tab.inner_text("#number") == "Response 1 of 3"
    assert tab.inner_text("#progress").startswith("2 of 3")
    assert read_back(tab, tmp_path / "file.jsonl")[1].keys() == {"a", "c"}
    human_page.write_page(tmp_path / "page.html", ROWS)
    tab.reload()
    assert tab.inner_text("#progress").startswith("0 of 3"), "two pages do not mix"
    assert tab.inner_text("#tokens") == "The tokens are unknown."


def test_marks_of_words_that_occur_several_times_are_read_back_as_shown(visit, tmp_path):
    tab, text, marked = visit(), ROWS[1]["response"], []
    tab.click("#next")
    for place in [("no", 0), ("no", 1), ("27", 1), ("東", 0)]:
        for kind in ("good", "poor"):
            word(tab, *place).click()
            tab.click(f"#{kind}")
            [(start, end, score)] = shown(tab)[0]
            assert read_back(tab, tmp_path / "file.jsonl")[1]["b"] == [(start, end, score)]
            marked.append(text[start:end])
            word(tab, *place).click()
    assert marked == ["no", "no 27,", "no", ", no", "no 27", "27", "東", "東"]


def test_the_command_samples_a_policy_or_takes_responses(folder, run_main, tmp_path):
    def items_of(*flags):
        run_main(human_page, *flags, "--out", tmp_path / "page.html")
        return json.loads(DATA.search((tmp_path / "page.html").read_text())[1])

    policy, texts = ("--policy", folder / "model"), tmp_path / "texts.jsonl"
    items = items_of(*policy, "--samples", 2, "--response_length", 12, "--seed", 5)
    assert [item["record"]["id"] for item in items] == ["5-0", "5-1"]
    assert all(len(item["tokens"]) > 1 for item in items)
    texts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [item["tokens"] for item in items_of("--responses", texts)] == [[], [], []]
    item = items_of("--responses", texts, *policy)[0]
    assert item["record"] == ROWS[0] and item["tokens"][0] == [0, 3, "Ana"]
