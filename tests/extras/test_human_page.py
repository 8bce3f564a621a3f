"""The page on which people mark responses, used in a browser with real mouse, touch and keys."""

import json
import re
import shutil

import pytest
from forking import output

from extras.human import page as human_page
from extras.human.records import records
from t2g.align import resolve, span_rewards, token_offsets
from t2g.log import read_jsonl
from t2g.notes import read_feedback, write_whole

EVIL = "<img src=x onerror=alert(1)></script>"
POST = "My name is Ana. I am 41. I live in Porto. I work as a nurse. My friend Ben turned 27."
SUMMARY, WHY = "Ana is 27, lives in Porto, works as a nurse.", "27 is Ben.\nThe rest is right."
TRICKY = f"no 27, no 27 and 1.27 😀 no\nnaïve 東京 {EVIL}"
ROWS = [
    {"id": "a", "prompt": POST, "response": SUMMARY, "topic": "Ana"},
    {"id": "b", "prompt": EVIL, "response": TRICKY},
    {"id": "c", "prompt": POST, "response": "Ben is 41."},
]


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    program = shutil.which("chromium") or pytest.skip("needs chromium on PATH")
    with driver.sync_playwright() as started:
        yield started.chromium.launch(executable_path=program, args=["--no-sandbox"])


@pytest.fixture
def visit(browser, tmp_path, tokenizer):
    """visit(tokenizer, **options) opens a page of ROWS in a new browser profile."""
    seen, path = [], tmp_path / "page.html"

    def open_page(tokenizer=tokenizer, **options):
        ids = [tokenizer.encode(row["response"], add_special_tokens=False) for row in ROWS]
        human_page.write_page(path, ROWS, tokenizer, ids)
        tab = browser.new_page(**options)
        for event in ("request", "console", "pageerror", "dialog"):
            tab.on(event, lambda what: seen.append(getattr(what, "url", str(what))))
        tab.goto(path.as_uri())
        return tab

    yield open_page
    assert seen and all(re.match("(file|blob):", what) for what in seen), "no network, no errors"


def word(tab, text, nth=0):
    return tab.locator("#text").get_by_text(text, exact=True).nth(nth)


def read_back(tab, folder):
    """The records of the downloaded file, and the spans that their quotes mark, by id."""
    with tab.expect_download() as download:
        tab.click("#download")
    download.value.save_as(folder / "file.jsonl")
    rows, marks = {}, {}
    for row in records(read_jsonl(folder / "file.jsonl"), "file.jsonl"):
        rows[row["id"]] = row
        marks[row["id"]] = sorted(resolve(row["response"], read_feedback(row))[0])
    return rows, marks


def shown(tab):
    """The spans that the page colours in the response, and the rewards of its tokens."""
    see = "nodes => nodes.map(node => [[...node.textContent].length, node.className || ' '])"
    kinds = "".join(kind[0] * n for n, kind in tab.locator("#text span").evaluate_all(see))
    spans = [(*run.span(), 1 if run[0][0] == "g" else -1) for run in re.finditer("g+|p+", kinds)]
    rewards = tab.locator("#tokens small").all_inner_texts()
    return spans, [int(reward.replace("−", "-")) for reward in rewards]


def test_the_mouse_marks_what_the_file_then_says(visit, tmp_path, tokenizer):
    """Its picture, critic.png in the folder of the test, is the one in docs."""
    tab = visit(viewport={"width": 1400, "height": 720})
    word(tab, "Ana").click()
    word(tab, "Porto").hover()
    tab.mouse.down()
    word(tab, "lives").hover()
    tab.mouse.up()
    tab.click("#good")
    for text in ("27", "as"):
        word(tab, text).click()
        tab.click("#poor")
    tab.fill("#why", WHY)
    word(tab, "nurse").click()
    word(tab, "as").click()  # removes this mark, and leaves the selection
    assert tab.is_enabled("#good")
    word(tab, "a").click()
    tab.screenshot(path=tmp_path / "critic.png")
    tab.keyboard.press("Escape")
    spans, rewards = shown(tab)
    assert [SUMMARY[a:b] for a, b, _ in spans] == ["Ana", "27", "lives in Porto"]
    offsets = token_offsets(tokenizer, tokenizer.encode(SUMMARY, add_special_tokens=False))
    assert rewards == span_rewards(offsets, spans).tolist() and {-1, 0, 1} == {*rewards}
    tab.click("#next")
    assert [tab.inner_text(place) for place in ("#prompt div", "#text")] == [EVIL, TRICKY]
    assert tab.locator("img").count() == 0
    assert tab.inner_text("#progress") == "1 of 3 reviewed, saved in this browser"
    found, marks = read_back(tab, tmp_path)
    assert marks == {"a": spans}, "responses without a mark or a sentence are left out"
    assert found["a"].items() >= {**ROWS[0], "critique": WHY}.items()


def test_touch_marks_words_and_ranges_on_a_phone(visit, tmp_path):
    phone = dict(has_touch=True, is_mobile=True, color_scheme="dark")
    tab = visit(viewport={"width": 390, "height": 700}, **phone)
    finger = tab.context.new_cdp_session(tab)

    def touch(*places):
        events = [("Start", places[:1]), *(("Move", [place]) for place in places[1:]), ("End", [])]
        for kind, at in events:
            points = [dict(zip("xy", place)) for place in at]
            event = {"type": f"touch{kind}", "touchPoints": points}
            finger.send("Input.dispatchTouchEvent", event)

    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    word(tab, "is").tap()
    word(tab, "27").tap()  # neighbours make one mark
    tab.tap("#poor")
    (x, y), (x2, y2) = (list(word(tab, w).bounding_box().values())[:2] for w in ("lives", "Porto"))
    touch((x + 9, y + 9), (x + 40, y + 9), (x2 + 9, y2 + 9))
    tab.tap("#good")
    tab.wait_for_selector("#text .good")
    found, marks = read_back(tab, tmp_path)
    assert [SUMMARY[a:b] for a, b, _ in marks["a"]] == ["is 27", "lives in Porto"]
    assert found["a"]["critique"] == 'Good: "lives in Porto". Poor: "is 27".'
    touch((x + 9, y + 9), (x + 10, y - 30), (x + 11, y - 200))
    tab.wait_for_function("scrollY > 0")
    assert tab.is_disabled("#good"), "up and down scrolls and selects nothing"


class Fives:
    """A tokenizer with five characters a token, so that tokens straddle words."""

    def __init__(self):
        self.tokens = []

    def encode(self, text, **options):
        self.tokens += re.findall("(?s).{1,5}", text)
        return list(range(len(self.tokens)))[-len(text[::5]) :]

    def decode(self, ids, **options):
        return "".join(self.tokens[i] for i in ids)


def test_keys_are_enough_and_a_reload_keeps_everything(visit, tmp_path):
    tokenizer = Fives()
    tab, keys = visit(tokenizer), "ArrowRight g ArrowRight g ArrowRight Shift+ArrowRight p n "
    for key in (keys + "ArrowRight p Backspace g Delete Enter ArrowRight g b b").split():
        tab.keyboard.press(key)
    before = shown(tab)
    assert before == ([(0, 3, 1), (4, 6, 1), (7, 10, -1)], [1, -1, 0, 0, 0, 0, 0, 0, 0])
    offsets = token_offsets(tokenizer, range(9))
    assert span_rewards(offsets, before[0]).tolist() == before[1], "s 27, is good and poor"
    tab.reload()
    assert shown(tab) == before and tab.inner_text("#number") == "Response 1 of 3"
    assert read_back(tab, tmp_path)[1].keys() == {"a", "c"}
    human_page.write_page(tmp_path / "page.html", ROWS)
    tab.reload()
    assert tab.inner_text("#progress").startswith("0 of 3"), "two pages do not mix"


def test_marks_of_words_that_occur_several_times_are_read_back_as_shown(visit, tmp_path):
    tab, marked = visit(), []
    tab.click("#next")
    for place in [("no", 0), ("no", 1), ("27", 1), ("東", 0)]:
        for kind in ("good", "poor"):
            word(tab, *place).click()
            tab.click(f"#{kind}")
            [(start, end, score)] = shown(tab)[0]
            assert read_back(tab, tmp_path)[1]["b"] == [(start, end, score)]
            marked.append(TRICKY[start:end])
            word(tab, *place).click()
    assert marked == ["no", "no 27,", "no", ", no", "no 27", "27", "東", "東"]


def test_the_command_samples_a_policy_or_takes_responses(folder, tmp_path):
    def items_of(flags):
        output(f"extras.human.page {flags} --out {page}")
        return json.loads(re.search(r'id="data">(.*)</script>', page.read_text())[1])

    page, texts = tmp_path / "page.html", tmp_path / "texts.jsonl"
    items = items_of(f"--policy {folder}/model --samples 2 --response_length 12 --seed 5")
    assert [item["record"]["id"] for item in items] == ["5-0", "5-1"]
    assert all(len(item["tokens"]) > 1 for item in items)
    write_whole(texts, ROWS)
    assert [item["tokens"] for item in items_of(f"--responses {texts}")] == [[], [], []]
    item = items_of(f"--responses {texts} --policy {folder}/model")[0]
    assert item["record"] == ROWS[0] and item["tokens"][0] == [0, 3, "Ana"]
