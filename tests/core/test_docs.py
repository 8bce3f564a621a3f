"""What is written can be relied on: no flag is dead, helps and defaults are right, figures have their commands and their files."""

import argparse
import ast
import importlib
import re
import struct
import subprocess
import sys
from functools import cache

import pytest
from test_readme import PAGES, ROOT, commands, section, shell

import train_ppo
from extras import benchmarks
from t2g import tasks
from t2g.log import METRICS

SCRIPTS = [(path.stem,) for path in sorted(ROOT.glob("*.py")) if path.stem != "benchmark"]
SCRIPTS += [("benchmark", name) for name in benchmarks.names()]
BENCHES = [
    (f"bench.{path.stem}",)
    for path in sorted((ROOT / "bench").glob("*.py"))
    if ".add_argument" in path.read_text()
]
RESULTS = (ROOT / "docs" / "RESULTS.md").read_text()


class Built(Exception):
    pass


@pytest.fixture
def flags_of(monkeypatch):
    """flags_of(script, *words): the actions of the parser that a script has built when it is about to parse these words."""

    def stop(parser, *_):
        raise Built(parser)

    def build(script, *words):
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", stop)
            patch.setattr(sys, "argv", [script, *words])
            with pytest.raises(Built) as built:
                importlib.import_module(script).main()
        return [action for action in built.value.args[0]._actions if action.dest != "help"]

    return build


@cache
def tree(path):
    return ast.parse(path.read_text())


def imported(path):
    """The files of the project that a file imports, at its head or in a function; of tasks and benchmarks every one."""
    for node in ast.walk(tree(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            place = ROOT / name.replace(".", "/")
            yield from (
                file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()
            )
            if name in ("t2g.tasks", "t2g.benchmarks"):
                yield from place.glob("*.py")


def files_of(script):
    """A script's file and all that it imports, directly or not."""
    found, new = set(), {ROOT / f"{script.replace('.', '/')}.py"}
    while new:
        found |= new
        new = {file for path in new for file in imported(path)} - found
    return found


@cache
def read_in(path):
    """The names x that a file reads as args.x or getattr(args, "x"). `args.x = args.x or ...` alone is no use of x. Where a
    function has getattr(args, name) its strings count, for the names stand in it."""
    names, own = set(), set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            target = ast.unparse(node.targets[0])
            own |= {id(part) for part in ast.walk(node.value) if ast.unparse(part) == target}
    for node in ast.walk(tree(path)):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Load)
            and id(node) not in own
        ):
            if ast.unparse(node.value).endswith(("args", "parse_args()")):
                names.add(node.attr)
        elif isinstance(node, ast.FunctionDef):
            asked = [part.args[1] for part in ast.walk(node) if is_getattr_of_args(part)]
            names |= {part.value for part in asked if isinstance(part, ast.Constant)}
            if not all(isinstance(part, ast.Constant) for part in asked):
                names |= {
                    part.value
                    for part in ast.walk(node)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                }
    return names


def is_getattr_of_args(node):
    return (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "getattr"
        and ast.unparse(node.args[0]) == "args"
    )


@pytest.mark.parametrize("script", SCRIPTS + BENCHES, ids="-".join)
def test_no_flag_is_dead(script, flags_of):
    read = set().union(*map(read_in, files_of(script[0])))
    assert not {action.dest for action in flags_of(*script)} - read, (
        "the script takes flags that nothing reads"
    )


def test_a_flag_that_nothing_reads_would_be_noticed(tmp_path):
    (tmp_path / "script.py").write_text(
        "args.a = args.a or 1\nargs.b = args.b or 2\nprint(args.b, other.c)"
    )
    assert read_in(tmp_path / "script.py") == {"b"}
    assert "kl_horizon" in read_in(ROOT / "train_ppo.py") and "beta" not in set().union(
        *map(read_in, files_of("train_ppo"))
    )


@pytest.mark.parametrize("script", SCRIPTS + BENCHES, ids="-".join)
def test_every_flag_has_a_help_of_its_own_that_states_no_other_default(script, flags_of):
    actions = flags_of(*script)
    actions = [action for action in actions if action.help != argparse.SUPPRESS]
    helps = [(action.help or "").strip() for action in actions]
    assert all(helps), [action.dest for action in actions if not (action.help or "").strip()]
    assert len(set(helps)) == len(helps), "two flags have the same help"
    for action, said in zip(actions, helps):
        assert "default" not in said, f"{action.dest}: the help shows the default by itself"
        if action.dest == "eval_samples" and script == ("eval",):
            continue  # its default is for prompts; of annotations all are taken unless it is given
        assert action.default is None or "if not given" not in said, (
            f"{action.dest} has a default, so it is always given"
        )
        for name in re.findall(r"runs/TASK/(\S+) if not given", said):
            sources = "".join(path.read_text() for path in files_of(script[0]))
            assert (
                f"runs/{{args.task}}/{name}" in sources
                or f"runs/{{args.task}}'}}/{name}" in sources
            ), (action.dest, name)


def test_the_steps_between_checkpoints_are_what_their_help_says(monkeypatch):
    for max_steps, expected in ((5, 1), (45, 4), (1000, 20)):
        monkeypatch.setattr(sys, "argv", ["train_ppo.py", "--max_steps", str(max_steps)])
        assert train_ppo.parse_args()[1].save_steps == expected


@pytest.mark.parametrize("name", tasks.BUILT_IN)
def test_a_task_sets_defaults_of_flags_that_the_scripts_have(name, flags_of):
    for script, defaults in getattr(tasks.load_task(name), "DEFAULTS", {}).items():
        assert set(defaults) <= {action.dest for action in flags_of(script)}, script


def test_the_table_of_flags_has_the_defaults_of_the_parser(flags_of, monkeypatch):
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]]
        for row in section("Flags that matter").splitlines()
        if "| `--" in row
    ]
    assert 8 <= len(rows) <= 12
    own = {task: tasks.load_task(task).DEFAULTS.get("train_ppo", {}) for task in tasks.BUILT_IN}
    monkeypatch.setattr(tasks.load_task("toy"), "DEFAULTS", {})
    defaults = {action.dest: action.default for action in flags_of("train_ppo")}
    for flag, default, of_tasks, _ in rows:
        dest = flag.strip("`-")
        assert default == "none" if defaults[dest] is None else float(default) == defaults[dest], (
            flag
        )
        said = {
            task: float(value)
            for value, names in re.findall(r"(\S+) for ([\w, ]+)", of_tasks)
            for task in names.split(", ")
        }
        assert said == {task: own[task][dest] for task in own if dest in own[task]}, flag


def test_each_figure_of_the_table_of_flags_is_one_of_the_results():
    figures = re.compile(r"(?<![\d.])\d+\.\d+(?!\d)")
    said = {
        figure
        for row in section("Flags that matter").splitlines()
        for figure in figures.findall(row.split("|")[-2:][0])
    }
    assert said and said <= set(
        figures.findall(RESULTS + (ROOT / "docs" / "DEVIATIONS.md").read_text())
    )


def keys_in(path):
    """The names that a file gives to values: keys of a dict, keywords of dict(), d[name] = ..., the unit of an Objective, the first
    of each tuple that a loop goes through; an f-string as its beginning."""
    for node in ast.walk(tree(path)):
        made = []
        if isinstance(node, ast.Dict):
            made = node.keys
        elif isinstance(node, ast.DictComp):
            made = [node.key]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            made = [node.slice]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "dict":
            yield from (keyword.arg for keyword in node.keywords if keyword.arg)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Objective"):
            made = node.args[:1]
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            made = [row.elts[0] for row in node.iter.elts if isinstance(row, ast.Tuple)]
        for key in made:
            if isinstance(key, ast.JoinedStr) and isinstance(key.values[0], ast.Constant):
                yield key.values[0].value + "*"
            elif isinstance(key, ast.Constant):
                yield key.value


def test_every_metric_of_the_glossary_is_made_by_a_script():
    """The other direction is the Logger's: it refuses what does not stand in the glossary."""
    sources = {*ROOT.glob("train_*.py"), *(ROOT / "t2g").glob("*.py")} - {ROOT / "t2g" / "log.py"}
    made = {key for path in sources for key in keys_in(path)}
    known = {name for name in METRICS if name in made or name.partition("_")[0] + "_*" in made}
    assert set(METRICS) - known - {"step"} == set(), (
        "metrics that nothing logs"
    )  # `step` is the Logger's own


def sections(text):
    """(heading, content, content with the section that it is a part of) of each section of a page."""
    above = ""
    for mark, heading, content in re.findall(
        r"^(##+) ([^\n]*)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL
    ):
        above = content if mark == "##" else above
        yield heading, content, above + content


def names_a_command(text):
    ours = ("python", "torchrun", "pytest", "mutmut")
    return any(
        words[0] in ours or words[0].endswith(".py") or words[:2] == ["git", "checkout"]
        for words in shell(text)
    )


SECTIONS = {heading: both for heading, *both in sections(RESULTS)}


@pytest.mark.parametrize("heading", SECTIONS)
def test_a_section_of_the_results_that_states_figures_has_a_command(heading):
    """Or each line with a figure has a link to a section that does."""
    content, whole = SECTIONS[heading]
    stated = [line for line in content.splitlines() if re.search(r"\d\.\d", line)]
    assert names_a_command(whole) or all(linked(line) for line in stated)


def linked(line) -> bool:
    """True if a line has links within the page, each of them to a section that names a command."""
    anchors = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-"): whole
        for heading, (_, whole) in SECTIONS.items()
    }
    links = re.findall(r"\]\(#([^)]+)\)", line)
    return bool(links) and all(names_a_command(anchors[link]) for link in links)


def test_a_section_without_a_command_would_be_noticed():
    assert (
        linked("| 0.5 | [speed](#speed-on-a-cpu) |")
        and not linked("| 0.5 | [this](#in-short) |")
        and not linked("| 0.5 |")
    )
    found = {
        heading: names_a_command(whole)
        for heading, _, whole in sections("## a\n\n    head x\n\n### b\n`pytest x`\n## c\n0.5\n")
    }
    assert found == {"a": False, "b": True, "c": False} and len(SECTIONS) > 15


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_a_page_names_are_there(page):
    for words in shell((ROOT / page).read_text()):
        if words[0] == "pytest":
            files = [ROOT / word for word in words if word.endswith(".py")]
            assert all(file.is_file() for file in files), words
            marked = "-m" not in words or any(
                "mark.slow" in file.read_text() for file in files or ROOT.glob("tests/*.py")
            )
            assert marked, f"{words} would run nothing"


def test_commits_that_the_pages_name_are_of_this_repository():
    def git(*words):
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True
        ).stdout.split()

    if git("rev-parse", "--is-shallow-repository") != ["false"]:
        pytest.skip("no clone with its history")
    text = "".join((ROOT / page).read_text() for page in PAGES)
    named = re.findall(r"(?<!Text2Grad at )\b(?=\w*\d)(?=\w*[a-f])[0-9a-f]{7}\b", text)
    assert len(named) > 5 and not set(named) - {commit[:7] for commit in git("rev-list", "--all")}


FIGURES = sorted(
    {
        (page, link)
        for page in PAGES
        for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / page).read_text())
    }
)


@pytest.mark.parametrize(("page", "link"), FIGURES)
def test_a_figure_is_a_small_png_and_a_command_makes_it(page, link):
    """A command that says so (--plot), one whose script writes that file, or eval.py page, if it is a picture of the page."""
    figure = (ROOT / page).parent / link
    content = figure.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82"), (
        "no whole PNG"
    )
    assert 10_000 < len(content) < 400_000 and 600 < width < 2400 and 300 < height < 1600
    name, made_by = str(figure.resolve().relative_to(ROOT)), set()
    for words in (words for page in PAGES for words in commands((ROOT / page).read_text())):
        files = [ROOT / f"{word.removesuffix('.py').replace('.', '/')}.py" for word in words]
        if name in words or any(
            f'"{name}"' in file.read_text() for file in files if file.is_file()
        ):
            made_by.add(" ".join(words))
    around = next(
        content
        for _, content, _ in sections("## top\n" + (ROOT / page).read_text())
        if f"({link})" in content
    )
    assert made_by or "python eval.py page" in around, f"no command of the pages makes {name}"


def test_every_figure_in_docs_is_shown():
    shown = {((ROOT / page).parent / link).resolve() for page, link in FIGURES}
    assert shown == set((ROOT / "docs").resolve().glob("*.png"))
