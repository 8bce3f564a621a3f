"""docs/GUIDE.md keeps its word: its code stands where it says, the tour prints what it shows, its figures and links are good."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import test_exercises

from extras.studies import healthy
from t2g.log import METRICS
from t2g.tasks import toy

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "GUIDE.md").read_text()
BLOCKS = re.findall(
    r"^([^\n]*)\n```(\w+)\n(.*?)^```$", GUIDE, re.M | re.S
)  # (the line before, language, content)
QUOTES = [
    (*re.fullmatch(r"\[`([\w.]+)`, (\S+)\]\(\.\./(\S+)\)", said).groups(), code)
    for said, kind, code in BLOCKS
    if kind == "python"
]
HEALTHY = re.findall(
    r"^\| `([^`]+)` \| (.* → [^|]*) \| ([^|]*) \|$", GUIDE, re.M
)  # as python -m bench.healthy prints it
PROSE = re.sub(
    r"^```.*?^```$|\$\$.*?\$\$|`[^`\n]*`", "", GUIDE, flags=re.M | re.S
)  # without code, output and equations


def body(path, name) -> list[str]:
    """The lines of a function, or of a method Class.name, of a file."""
    source = (ROOT / path).read_text()
    scope = ast.parse(source)
    for part in name.split("."):
        (scope,) = (node for node in scope.body if getattr(node, "name", None) == part)
    return source.splitlines()[scope.lineno - 1 : scope.end_lineno]


def stands(code, lines) -> bool:
    """True if code is a run of these lines, up to white space at the left of the whole."""
    n = len(code.splitlines())
    return dedent(code).rstrip() in (dedent("\n".join(lines[i : i + n])) for i in range(len(lines)))


@pytest.mark.parametrize(
    ("name", "file", "link", "code"), QUOTES, ids=[name for name, *_ in QUOTES]
)
def test_a_quote_stands_to_the_letter_in_the_function_that_it_names(name, file, link, code):
    assert file == link and stands(code, body(file, name)), f"{name} of {file} does not say\n{code}"


def test_a_quote_with_another_letter_or_indentation_would_be_noticed():
    name, file, _, code = next(quote for quote in QUOTES if quote[0] == "gae")
    assert not stands(code.replace("lam", "gamma"), body(file, name)) and not stands(
        code, body(file, "whiten")
    )
    assert not stands(code.replace("    td", "td"), body(file, name))


def test_the_tour_prints_what_the_guide_shows_wherever_it_is_started(tmp_path):
    shown = "\n".join(content for _, kind, content in BLOCKS if kind == "text")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "tour.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == shown, done.stderr
    assert {kind for _, kind, _ in BLOCKS} == {"python", "text"}


def test_each_figure_of_the_guide_is_one_of_the_results_or_of_the_tour():
    known = "".join((ROOT / "docs" / name).read_text() for name in ("RESULTS.md", "DEVIATIONS.md"))
    known += "".join(content for _, _, content in BLOCKS) + " ".join(
        figures for _, figures, _ in HEALTHY
    )
    figure = re.compile(r"(?<![\d.])\d+\.\d+(?!\d)")
    assert set(figure.findall(PROSE)) <= set(figure.findall(known))


def anchors(path) -> set[str]:
    """GitHub's names of the headings of a page."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings():
    links = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", PROSE)
    assert len(links) > 30
    for file, anchor in links:
        page = (ROOT / "docs" / file) if file else ROOT / "docs" / "GUIDE.md"
        assert page.is_file(), file
        assert not anchor or anchor in anchors(page), f"{file}#{anchor}"


def test_the_picture_of_a_healthy_run_is_a_table_of_its_bench():
    assert {name: worry for name, _, worry in HEALTHY} == healthy.WORRY
    assert {part for name in healthy.WORRY for part in name.split(" / ")} <= {
        *METRICS,
        *toy.METRICS,
    }


def test_that_table_has_means_over_runs_at_the_first_the_tenth_and_the_last_step(
    tmp_path, monkeypatch, capsys
):
    for run, shift in (("a", 0), ("b", 2)):
        rows = [{"kl": float(step + shift), "response_tokens": 2.0} for step in range(1, 13)]
        (tmp_path / run).mkdir()
        (tmp_path / run / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows[: 12 - shift])
        )
    runs, plot = [str(tmp_path / run) for run in "ab"], tmp_path / "curves.png"
    monkeypatch.setattr(
        sys, "argv", ["healthy", *runs, "--beside", "alone", runs[0], "--plot", str(plot)]
    )
    healthy.main()
    both, alone = json.loads(capsys.readouterr().out.splitlines()[-1]).values()
    assert both == {
        "kl": [2.0, 11.0, 11.0],
        "response_tokens": [2.0] * 3,
        "kl / response_tokens": [1.0, 5.5, 5.5],
    }
    assert alone["kl"] == [1.0, 10.0, 12.0] and plot.read_bytes().startswith(b"\x89PNG")


def test_every_exercise_has_its_solution_and_every_solution_its_exercise():
    solutions = {
        "_".join(name.split("_")[1:3])
        for name in vars(test_exercises)
        if name.startswith("test_exercise_")
    }
    assert (
        set(re.findall(r"\[Solution\]\(\.\./tests/test_exercises\.py\) `(exercise_\w+)`", GUIDE))
        == solutions
    )
    exercises = re.findall(
        r"^\d+\. .*?(?=^\d+\. |\Z)", GUIDE[GUIDE.index("## Exercises") :], re.M | re.S
    )
    assert len(exercises) == 11 and all(
        "[Solution]" in text or "<summary>Answer</summary>" in text for text in exercises
    )


def test_metrics_and_flags_of_the_guide_exist():
    table = GUIDE[GUIDE.index("| what you see") :].split("\n\n")[0]
    metrics = {
        name
        for row in table.splitlines()[2:]
        for name in re.findall(r"`(\w+)`", row.split(" | ")[1])
    }
    assert len(metrics) > 10 and metrics <= {*METRICS, *toy.METRICS}
    flags = {
        flag for code in re.findall(r"`([^`\n]*)`", GUIDE) for flag in re.findall(r"--\w+", code)
    }
    files = (
        "train_ppo.py",
        "reproduce.py",
        "bench/healthy.py",
        "t2g/critics.py",
        "t2g/ablations.py",
        "t2g/tasks/__init__.py",
    )
    sources = "".join((ROOT / path).read_text() for path in files)
    assert len(flags) > 10 and all(f'"{flag}"' in sources for flag in flags), [
        flag for flag in flags if f'"{flag}"' not in sources
    ]
