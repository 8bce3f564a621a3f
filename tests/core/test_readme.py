"""README and docs keep their word: its example, its glossary, its flags, its links, and the task that it shows."""

import argparse
import ast
import doctest
import importlib
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
from test_scripts import run

from t2g import tasks
from t2g.log import METRICS, read_jsonl
from t2g.tasks import toy

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted(
    str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
)


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)[1]


def test_every_metric_stands_there_as_the_glossary_explains_it_and_no_other():
    glossary = {**METRICS, **toy.METRICS}
    for name, meaning in glossary.items():
        assert f"| `{name}` | {meaning} |" in README, (
            f"make README's table anew: python eval.py glossary (missing: {name})"
        )
    assert set(re.findall(r"^\| `(\w+)` \|", section("Metrics"), re.MULTILINE)) == set(glossary)


def test_the_example_gives_what_it_says():
    assert doctest.testfile(str(ROOT / "README.md"), module_relative=False).failed == 0


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / link).exists(), link


def test_every_file_of_the_package_has_its_place_in_the_reading_order():
    named = section("Reading order")
    for path in [*ROOT.glob("*.py"), *(ROOT / "t2g").glob("*.py")]:
        assert path.name == "__init__.py" or f"({path.relative_to(ROOT)})" in named, (
            f"README does not say what {path.name} is for"
        )


def test_flags_that_are_named_exist():
    defined = set(
        re.findall(
            r'(?:add|add_argument)\(\s*"--(\w+)"',
            "".join(path.read_text() for path in ROOT.rglob("*.py")),
        )
    )
    of_others = "nproc_per_node nnodes max_restarts shutdown_timeout rdzv_id rdzv_backend rdzv_endpoint"  # torchrun
    of_others += " nodes ntasks gpus signal port enable gpu_memory_utilization index no help"  # Slurm, vLLM, pip, argparse
    for page in PAGES:
        unknown = (
            set(re.findall(r"(?<![\w-])--([a-z]\w*)", (ROOT / page).read_text()))
            - defined
            - set(of_others.split())
        )
        assert not unknown, f"{page} names flags that no script has: {unknown}"
    same = re.search(r"same name here: (.*?)\. The others", section("Coming from TRL"), re.DOTALL)[
        1
    ]
    assert set(re.findall(r"`(\w+)`", same)) <= defined


def shell(text):
    """The simple commands of a page, as words: of lines of four spaces (a backslash goes on), of ```bash and of backticks."""
    text = re.sub(r"\\\n\s*", "", text)
    lines = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).splitlines()
    lines += [
        line.replace(",", " ") for line in re.findall(r"command: \[(.*?)\]", text, re.DOTALL)
    ]  # of a Kubernetes job
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += re.findall(r"^    (.*)", text, re.MULTILINE)
    lines += re.findall(r"`([^`]*)`", re.sub(r"^    .*", "", text, flags=re.MULTILINE))
    for line in lines:
        try:
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = list(lexer)
        except ValueError:  # a Python program goes on in the next line
            words = line.split()
        for is_end, simple in itertools.groupby(words, lambda word: set(word) <= set("();<>|&")):
            simple = [word for word in simple if not re.fullmatch(r"do|srun|[A-Z_]+=\S*", word)]
            if simple and not is_end:
                yield simple


def commands(text):
    """Those of our own scripts. `SCRIPT --flag` alone names a flag, and `SCRIPT` alone a script."""
    for words in shell(text):
        is_named_alone = len(words) == 1 or (len(words) == 2 and words[1].startswith("--"))
        is_ours = words[0] in ("python", "torchrun") or (
            words[0].endswith(".py") and not is_named_alone
        )
        if is_ours and "-c" not in words:
            yield [
                {"products": "toy", "$s": "0"}.get(word, word) for word in words if word != "..."
            ]


class Understood(Exception):
    pass


def head(path):
    """The docstring of a file, its commands as a page has them. What may be left out counts."""
    text = re.sub(
        r"\[(--[^\]]*)\]", r"\1", ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
    )
    return re.sub(r"^ *(?=(?:python|torchrun) )", "    ", text, flags=re.MULTILINE)


SOURCES = [
    path
    for folder in (".", "bench", "t2g", "t2g/benchmarks", "examples")
    for path in sorted((ROOT / folder).glob("*.py"))
]
HEADS = {str(path.relative_to(ROOT)): text for path in SOURCES if any(commands(text := head(path)))}


@pytest.mark.parametrize("page", [*PAGES, *HEADS])
def test_commands_are_understood(page, monkeypatch):
    """Each one gets through the parser of its script: flags, choices and numbers."""
    seen = 0
    for method in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, method)

        def parse_only(parser, *args, parse=parse):
            parse(parser, *args)
            raise Understood

        monkeypatch.setattr(argparse.ArgumentParser, method, parse_only)
    monkeypatch.chdir(ROOT)
    for words in commands(HEADS.get(page) or (ROOT / page).read_text()):
        place = next(
            (
                i
                for i, word in enumerate(words)
                if word.endswith(".py") or word.startswith("bench.")
            ),
            None,
        )
        if (
            place is None
            or words[place].startswith(("tests/", "examples/"))
            or words[-1] == "--help"
        ):
            continue
        name = words[place].removesuffix(".py").replace("/", ".")
        if name in ("bench.alignment", "bench.peer_trl") or (
            name == "benchmark" and words[place + 1 :][:1] in ([], ["NAME"])
        ):
            continue  # they have no flags, and the name of a benchmark brings them
        monkeypatch.setattr("sys.argv", words[place:])
        with pytest.raises(Understood):
            importlib.import_module(name).main()
        seen += 1
    assert seen > 1 or page not in PAGES


def test_the_metrics_that_stand_for_those_of_trl_exist():
    rows = [row.split("|") for row in section("Coming from TRL").splitlines() if "val/" in row]
    assert len(rows) == 2
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[2])} <= set(METRICS)


def test_the_task_that_it_shows_is_trained_on(tmp_path, monkeypatch):
    (source,) = re.findall(r"```python\n(\"\"\"t2g/tasks/products.py.*?)```", README, re.DOTALL)
    assert source == (ROOT / "examples" / "products.py").read_text()
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(ROOT / "examples")])
    line = json.loads(re.search(r"`(\{\"name\": .*?\})`", section("Bring your own task"))[1])
    data = ROOT / "examples" / "products.jsonl"
    assert set(line) == set(read_jsonl(data)[0])
    tokenizer, model = toy.new_model(0)
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    flags = (
        "--task",
        "products",
        "--data",
        data,
        "--policy",
        tmp_path / "model",
        "--critic",
        "rule",
    )
    short = (
        "--max_steps",
        1,
        "--per_device_train_batch_size",
        2,
        "--response_length",
        8,
        "--eval_samples",
        2,
    )
    result = json.loads(
        run("train_ppo", *flags, *short, "--output_dir", tmp_path / "ppo").splitlines()[-1]
    )
    logged = read_jsonl(tmp_path / "ppo" / "metrics.jsonl")[0]
    assert {"named", "boasts"} <= set(result["after"]) and {"named", "boasts"} <= set(logged)
    products = tasks.load_task("products")
    example = products.load(argparse.Namespace(task="products", data=str(data), heldout_data=None))[
        0
    ][0]
    feature = example.facts["features"].split(", ")[0]
    said = products.critique(example, f"The best of all: {feature}.")
    assert (said.good, said.poor) == ([feature], ["best"])
