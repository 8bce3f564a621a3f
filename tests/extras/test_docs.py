"""README and docs can be relied on: examples, links, commands, flags, metrics and figures."""

import argparse
import doctest
import importlib
import itertools
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from forking import output

from extras import reproduce
from extras.studies import deviations
from t2g import tasks
from t2g.log import METRICS, read_jsonl

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
PAGES += ["exercises/README.md"]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
RESULTS, REFERENCE = TEXTS["docs/RESULTS.md"], TEXTS["docs/REFERENCE.md"]
LAUNCHERS = ("python", "torchrun")
STAGES = ("train_sft", "annotate", "train_rm", "train_ppo", "eval")
FIGURES = [
    (page, link) for page in PAGES for link in re.findall(r"!\[[^\]]*\]\((.+?)\)", TEXTS[page])
]


def section(text, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)[1]


def simple_commands(text):
    """The commands of a page as lists of words: indented lines, ```bash blocks and code in backticks."""
    text = re.sub(r"\\\n\s*", "", text)
    lines = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).splitlines()
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += re.findall(r"^    (.*)", text, re.MULTILINE)
    lines += re.findall(r"`([^`]*)`", re.sub(r"^    .*", "", text, flags=re.MULTILINE))
    for line in lines:
        try:
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = list(lexer)
        except ValueError:  # not a shell command
            continue
        groups = itertools.groupby(words, lambda word: set(word) <= set("();<>|&"))
        for is_operator, group in groups:
            group = [word for word in group if not re.fullmatch(r"do|srun|[A-Z_]+=\S*", word)]
            if group and not is_operator:
                yield group


def our_command(words):
    """The module and the arguments of a command of this project; None for any other command."""
    words = [word for word in words if word != "..."]
    place = next((i for i, word in enumerate(words) if is_module_or_script(word)), None)
    if place is None or "-c" in words or words[-1] == "--help":
        return None
    module, arguments = words[place].removesuffix(".py").replace("/", "."), words[place + 1 :]
    if module == "extras.studies.deviations" and arguments:  # it takes the flags of train_ppo.py
        assert arguments[0] in [detail.__name__ for detail in deviations.DETAILS]
        return "train_ppo", arguments[1:]
    return module, arguments


def is_module_or_script(word):
    return word.startswith("extras.") or word.removesuffix(".py") in STAGES


class Parsed(Exception):
    """Raised in place of running a script, once its command line has been parsed."""


@pytest.fixture
def parse_only(monkeypatch):
    """parse_only(module, *arguments) parses a command line as the module's main() would."""
    parsers = []
    for method in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, method)

        def parse_and_stop(parser, *args, parse=parse):
            parsers.append(parser)
            parse(parser, *args)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, method, parse_and_stop)
    monkeypatch.chdir(ROOT)

    def parse_command(module, *arguments):
        monkeypatch.setattr("sys.argv", [module, *arguments])
        with pytest.raises(Parsed):
            importlib.import_module(module).main()
        return parsers[-1]

    return parse_command


@pytest.mark.parametrize("page", PAGES)
def test_commands_get_through_the_parsers_of_their_scripts(page, parse_only, tmp_path):
    shout = r'^```python\n("""shout.py.*?criticise\n)```'
    (example,) = re.findall(shout, TEXTS["docs/TASKS.md"], re.S | re.M)
    (tmp_path / "shout.py").write_text(example)
    simple = list(simple_commands(TEXTS[page]))
    tests = [word for words in simple for word in words[1:] if words[0] == "pytest"]
    assert all((ROOT / word).exists() for word in tests if word.endswith(".py"))
    commands = [words for words in simple if words[0] in LAUNCHERS]
    for module, arguments in filter(None, map(our_command, commands)):
        source = ROOT / f"{module.replace('.', '/')}.py"
        is_only_named = module.startswith("extras.") and not arguments
        if is_only_named or (source.is_file() and "parser" not in source.read_text()):
            continue
        arguments = [str(tmp_path / word) if word == "shout.py" else word for word in arguments]
        parse_only(module, *arguments)


def test_recipes_name_rows_that_exist_and_commands_that_get_through_the_parsers(parse_only):
    for path in (ROOT / "recipes").iterdir():
        recipe = reproduce.read_recipe(path.stem)
        others = [row["against"] for row in (recipe, *recipe["rows"].values()) if "against" in row]
        assert {*recipe["curves"], *others} <= set(recipe["rows"])
        for job in reproduce.jobs_of(recipe, recipe["rows"], 0, Path("out")):
            for line in job.commands:
                module, arguments = our_command(shlex.split(line))
                parse_only(module, *arguments)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    for file, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", text):
        target = ((ROOT / page).parent / file) if file else ROOT / page
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"


def anchors(path) -> set[str]:
    """GitHub's names of the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_no_table_is_broken_by_an_empty_line(page):
    for table in re.findall(r"(?:^\|.*\n)+", TEXTS[page], re.MULTILINE):
        assert re.fullmatch(r"[-:| ]+", table.splitlines()[1]), table


def test_commits_that_the_pages_name_belong_to_this_repository():
    def git(*words):
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.split()

    if git("rev-parse", "--is-shallow-repository") != ["false"]:
        pytest.skip("no clone with its history")
    hashes = r"(?<!Text2Grad at )\b(?=\w*\d)(?=\w*[a-f])[0-9a-f]{7}\b"
    named = re.findall(hashes, "".join(TEXTS.values()))
    assert set(named) <= {commit[:7] for commit in git("rev-list", "--all")}


def test_what_the_lecturers_page_shows_exists_and_is_run_by_a_test():
    """The parsers check the commands of stages and extras; the other scripts run in a test."""
    page, guide = TEXTS["docs/TEACHING.md"], TEXTS["docs/GUIDE.md"]
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if path.name != "test_docs.py"]
    tests = "".join(path.read_text() for path in files)
    scripts = [words[1] for words in simple_commands(page) if words[0] in LAUNCHERS]
    assert scripts
    for script in scripts:
        if script != "-m" and script.removesuffix(".py") not in STAGES:
            assert (ROOT / script).is_file() and Path(script).name in tests, script
    assert set(re.findall(r"-?\d\.\d\d", page)) <= set(re.findall(r"-?\d\.\d\d", guide))


def test_the_readme_example_gives_what_it_shows():
    assert doctest.testfile(str(ROOT / "README.md"), module_relative=False).failed == 0


def test_reference_has_the_defaults_of_the_parser(parse_only, monkeypatch):
    task_defaults = {name: tasks.load_task(name).DEFAULTS.get("train_ppo", {}) for name in TASKS}
    monkeypatch.setattr(tasks.load_task("toy"), "DEFAULTS", {})
    defaults = {action.dest: action.default for action in parse_only("train_ppo")._actions}
    lines = section(REFERENCE, "Flags that matter").splitlines()
    rows = [line.split("|") for line in lines if "| `--" in line]
    assert len(rows) >= 8
    for _, flag, default, of_tasks, *_ in rows:
        dest = flag.strip("` -")
        shown = None if default.strip() == "none" else float(default)
        assert shown == defaults[dest], flag
        named = {
            task: float(value)
            for value, names in re.findall(r"(\S+) for ([\w, ]+)", of_tasks)
            for task in names.strip().split(", ")
        }
        expected = {task: own[dest] for task, own in task_defaults.items() if dest in own}
        assert named == {TASKS[task]: value for task, value in expected.items()}, flag


TASKS = {"toy": "toy", "summarize": "summarize", "qa": "qa", "extras/code/task.py": "code"}


def test_metrics_that_reference_names_stand_in_the_glossary():
    sentence = re.search(r"look first at (.*)\.$", REFERENCE, re.MULTILINE)[1]
    first = re.findall(r"`(\w+)`", sentence)
    assert len(first) > 5 and set(first) <= set(METRICS)
    trl = section(REFERENCE, "Coming from TRL")
    metrics = [row.split("|")[2] for row in trl.splitlines() if "val/" in row]
    assert set(re.findall(r"`(\w+)`", "".join(metrics))) <= set(METRICS)


def test_the_task_that_the_docs_show_is_the_example_and_trains(tmp_path, folder):
    (source,) = re.findall(r"^```python\n(.*?METRICS.*?)^```", TEXTS["docs/TASKS.md"], re.S | re.M)
    assert source == (ROOT / "examples" / "products.py").read_text(encoding="utf-8")
    flags = ["--task", ROOT / "examples/products.py", "--data", ROOT / "examples/products.jsonl"]
    flags += "--critic rule --max_steps 1 --eval_samples 2 --response_length 8".split()
    flags += ["--per_device_train_batch_size", 2, "--policy", folder / "model"]
    output("train_ppo", *flags, "--output_dir", tmp_path / "ppo")
    assert {"named", "boasts"} <= set(read_jsonl(tmp_path / "ppo" / "metrics.jsonl")[0])


@pytest.mark.parametrize("heading", re.findall(r"^## (.*)$", RESULTS, re.MULTILINE))
def test_a_section_of_the_results_with_figures_names_a_command(heading):
    """A line of the summary at the top links to a section that has one."""
    content = section(RESULTS, re.escape(heading))
    commands = ("python", "torchrun", "pytest", "mutmut")
    has_command = any(words[0] in commands for words in simple_commands(content))
    figures = [line for line in content.splitlines() if re.search(r"\d\.\d", line)]
    assert has_command or all("](#" in line for line in figures)


def test_every_figure_of_the_docs_is_shown():
    shown = {((ROOT / page).parent / link).resolve() for page, link in FIGURES}
    assert shown == set((ROOT / "docs").resolve().glob("*.png"))


SCRIPTS = [*STAGES, *(f"extras.baselines.{name}" for name in ("dpo", "ilf", "sdpo", "scalar_rm"))]


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_flag_is_explained_and_read(script, parse_only):
    files = [*ROOT.glob("*.py"), *(ROOT / "t2g").rglob("*.py"), *(ROOT / "extras").rglob("*.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    actions = [action for action in parse_only(script)._actions if action.dest != "help"]
    for action in actions:
        assert action.help, action.dest
        uses = re.findall(rf'args\.{action.dest}\b(?! = )|getattr\(\w+, "{action.dest}"', source)
        assert uses, f"nothing reads --{action.dest}"
    assert len({action.help for action in actions}) == len(actions), "two flags, one explanation"


@pytest.mark.parametrize("name", TASKS)
def test_a_task_sets_defaults_of_flags_that_the_stages_have(name, parse_only):
    for script, defaults in getattr(tasks.load_task(name), "DEFAULTS", {}).items():
        if script in STAGES:
            assert set(defaults) <= {action.dest for action in parse_only(script)._actions}, script
