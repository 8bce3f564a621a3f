"""A table of methods over seeds: every stage, every run, the measuring, the ledger of what each costs, and the learning curves.

    python reproduce.py --recipe toy                               # all rows, three seeds: about an hour and a half on 2 cores
    python reproduce.py --recipe toy --quick                       # a taste of it in ten minutes: two seeds, the rule as the critic
    python reproduce.py --recipe toy --rows scalar text2grad       # some rows
    python reproduce.py --recipe toy --sweep                       # how the learning rates of the recipes were found
    python reproduce.py --recipe slf5k_8b --dry_run                # the commands of the paper's table, to be read

A recipe is a folder recipes/NAME: table.toml says which stages rows share and how a policy is measured, each other file is a row
and holds its command. Stopped at any moment, the same command goes on: what is done stays. The last line printed is a JSON object.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import tomllib
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from extras import table
from t2g.cli import fail, make_folder, positive
from t2g.log import write_json

HERE = Path(__file__).resolve().parents[1]
SWEEP = (1 / 3, 1, 3)  # times a row's learning rate


class Job(NamedTuple):
    """A command of one seed, and the jobs of that seed that must be done before it."""

    seed: int
    name: str
    folder: Path
    needs: list[str]
    commands: list[str]

    def __str__(self):
        return f"{self.name} of seed {self.seed}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--recipe", required=True, help="a folder of recipes/, or any other")
    add(
        "--rows",
        nargs="+",
        metavar="ROW",
        help="names of its files without number and .toml; all if not given",
    )
    add(
        "--seeds",
        nargs="+",
        type=int,
        help="seeds of the runs; 0 1 2 if not given, for --quick 0 1, for --sweep 3",
    )
    add(
        "--jobs",
        type=positive(int),
        help="commands at once, each with its share of the cores; as table.toml says if not given",
    )
    add(
        "--output_dir",
        help="where all runs go; runs/reproduce/RECIPE if not given, with -quick or -sweep behind it",
    )
    add(
        "--quick",
        action="store_true",
        help="short runs, with the flags under [quick] in table.toml",
    )
    add(
        "--sweep",
        action="store_true",
        help="each row at a third of its learning rate, at it, and at three times of it",
    )
    add("--dry_run", action="store_true", help="print the commands of the first seed, and run none")
    add("--plot", help="where the curves go as a PNG; curves.png in --output_dir if not given")
    args = parser.parse_args()
    kind = "quick" if args.quick else "sweep" if args.sweep else ""
    recipe, rows = read_recipe(args.recipe, args.rows, kind)
    seeds = args.seeds or {"sweep": [3], "quick": [0, 1]}.get(kind, [0, 1, 2])
    root = Path(
        args.output_dir
        or Path("runs/reproduce") / "-".join(filter(None, [Path(args.recipe).name, kind]))
    )
    if args.dry_run:
        print(f"# {recipe['title']}")
        for job in jobs_of(recipe, rows, seeds[0], root, kind):
            paper = ", ".join(
                f"{metric} {value}"
                for metric, value in rows.get(job.name, {}).get("paper", {}).items()
            )
            commands = [
                line if line.startswith("torchrun") else f"python {line}" for line in job.commands
            ]
            print(f"# {job}{paper and f'; the paper has {paper}'}", *commands, sep="\n")
        return
    make_folder(root, "--output_dir")
    jobs = [job for seed in seeds for job in jobs_of(recipe, rows, seed, root, kind)]
    jobs.sort(key=lambda job: job.name in rows)  # what others wait for comes first
    run_all(jobs, args.jobs or recipe.get("jobs", 1))
    logged = recipe.get("curve", recipe["main"])
    found = {
        name: [table.read_cell(root / f"seed-{seed}", name, logged) for seed in seeds]
        for name in rows
    }
    result = table.summarise(found, recipe, rows)
    result["stages"] = table.stage_seconds(jobs, rows)
    write_json(root / "table.json", result)
    text = table.markdown(result, recipe, rows)
    (root / "table.md").write_text(text, encoding="utf-8")
    plot = args.plot or str(root / "curves.png")
    table.plot(plot, found, recipe, rows)
    print(f"\n{text}\ntable: {root / 'table.md'}\ncurves: {plot}\n{json.dumps(result)}")


def read_recipe(name, chosen, kind) -> tuple[dict, dict]:
    """table.toml, and the rows by name in the order of their files."""
    folder = Path(name) if Path(name).is_dir() else HERE / "recipes" / name
    if not (folder / "table.toml").is_file():
        known = sorted(path.parent.name for path in HERE.glob("recipes/*/table.toml"))
        fail(f"there is no recipe {name!r}; the recipes are {', '.join(known)}")
    try:
        recipe, *rest = [
            tomllib.loads(path.read_text(encoding="utf-8"))
            for path in [folder / "table.toml", *files_of(folder)]
        ]
    except tomllib.TOMLDecodeError as error:
        fail(f"a recipe of {folder} is no TOML: {error}")
    rows = dict(zip(map(row_name, files_of(folder)), rest))
    recipe.setdefault("stages", {})
    if missing := {"title", "metrics", "main", "main_title", "against", "curves", "measure"} - set(
        recipe
    ):
        fail(f"{folder}/table.toml has no {', '.join(sorted(missing))}")
    if untitled := [name for name, row in rows.items() if "title" not in row]:
        fail(f"rows without a title in {folder}: {', '.join(untitled)}")
    if both := set(rows) & set(recipe["stages"]):
        fail(f"{', '.join(sorted(both))} in {folder} names a row and a stage; rename one of them")
    if kind == "quick" and "quick" not in recipe:
        fail(f"{folder}/table.toml has no [quick], so there is no short form of these runs")
    if unknown := set(chosen or []) - set(rows):
        fail(f"there is no row {', '.join(sorted(unknown))}; the rows are {', '.join(rows)}")
    rows = {name: row for name, row in rows.items() if name in (chosen or rows)}
    if kind == "quick":
        rows = {name: row for name, row in rows.items() if row.get("quick", True)}
    if kind == "sweep":
        rows = {f"{name} x {by:.2g}": row | {"learning_rate": row["learning_rate"] * by, "title": f"{row['title']}, x {by:.2g}"}
                for name, row in rows.items() if row.get("sweep") for by in SWEEP}  # fmt: skip
    if not rows:
        fail("no row is left to run; see --rows")
    return recipe, rows


def files_of(folder):
    return [path for path in sorted(folder.glob("*.toml")) if path.name != "table.toml"]


def row_name(path) -> str:
    """08_text2grad.toml -> text2grad"""
    return path.stem.partition("_")[2]


def jobs_of(recipe, rows, seed, root, kind) -> list[Job]:
    """A seed's jobs: the stages that its rows need, then the rows, each trained and then measured."""
    stages, jobs, folder = recipe["stages"], {}, Path(root) / f"seed-{seed}"
    extra = recipe.get(kind, {})

    def command(line, name, learning_rate=""):
        places = {"root": folder, "out": folder / name.replace(" ", "_")}
        places = {place: shlex.quote(str(path)) for place, path in places.items()}
        words = line.format(**places, seed=seed, learning_rate=learning_rate)
        return f"{words} {extra.get(script_of(words), '')}".strip()

    def add_stage(name):
        for need in stages[name].get("needs", []):
            add_stage(need)
        jobs[name] = Job(
            seed, name, folder, stages[name].get("needs", []), [command(stages[name]["run"], name)]
        )

    for name, row in rows.items():
        needs = [
            need
            for need in row.get("needs", [])
            if not (kind == "quick" and stages[need].get("learned"))
        ]
        for need in needs:
            add_stage(need)
        lines = [*([row["run"]] if "run" in row else []), row.get("measure", recipe["measure"])]
        jobs[name] = Job(
            seed,
            name,
            folder,
            needs,
            [command(line, name, row.get("learning_rate", "")) for line in lines],
        )
    return list(jobs.values())


def script_of(line) -> str:
    """The name of the script or of the module that a command runs.

    >>> script_of("train_ppo.py --seed 0"), script_of("-m extras.baselines.dpo --seed 0")
    ('train_ppo', 'dpo')
    """
    words = line.split()
    if "-m" in words:
        return words[words.index("-m") + 1].rpartition(".")[2]
    return Path(next(word for word in words if word.endswith(".py"))).stem


def run_all(jobs, at_once):
    """All jobs that are not done yet, `at_once` at a time, each as soon as those are done that it needs."""
    done, failed = {(job.seed, job.name) for job in jobs if is_done(job)}, []
    waiting, running = [job for job in jobs if (job.seed, job.name) not in done], {}
    bar = tqdm(total=len(jobs), initial=len(done), unit="job")
    with ThreadPoolExecutor(at_once) as pool:
        while waiting or running:
            ready = [job for job in waiting if all((job.seed, need) in done for need in job.needs)]
            for job in ready[: at_once - len(running)]:
                waiting.remove(job)
                running[pool.submit(run_job, job, at_once)] = job, time.perf_counter()
            if not running:
                break  # what is left needs what failed
            bar.set_postfix_str(
                ", ".join(
                    f"{job} {time.perf_counter() - since:.0f} s" for job, since in running.values()
                )
            )
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                job, _ = running.pop(future)
                if future.result():
                    done.add((job.seed, job.name))
                    bar.update()
                else:
                    failed.append(job)
                    tqdm.write(f"{job} failed: see {job.folder}/{job.name}.log")
    bar.close()
    if failed or waiting:
        fail(
            f"{', '.join(map(str, failed))} failed, as the logs say; the same command goes on with what is not done"
        )


def run_job(job, at_once) -> bool:
    """Its commands one after the other, with a log; and what the last one printed last, for the table."""
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once))}
    start = time.perf_counter()
    with open(job.folder / f"{job.name}.log", "w", encoding="utf-8") as log:
        for line in job.commands:
            words = [
                str(HERE / word) if word.endswith(".py") else word for word in shlex.split(line)
            ]
            command = [
                sys.executable,
                *(["-m", "torch.distributed.run", *words[1:]] if words[0] == "torchrun" else words),
            ]
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
                text=True,
            )
            log.write(done.stdout)
            log.flush()
            if done.returncode:
                return False
    last = done.stdout.rstrip().rpartition("\n")[2]
    seconds = time.perf_counter() - start
    write_json(marker(job), {"commands": job.commands, "seconds": seconds, "result": last})
    return True


def is_done(job) -> bool:
    """Whether the job was done before, by the same commands."""
    job.folder.mkdir(parents=True, exist_ok=True)
    if not marker(job).is_file():
        return False
    before = json.loads(marker(job).read_text(encoding="utf-8"))["commands"]
    if before != job.commands:
        fail(
            f"{job} in {job.folder} was made by other commands ({'; '.join(before)}); move it away, or choose another --output_dir"
        )
    return True


def marker(job) -> Path:
    return job.folder / f"{job.name}.done.json"


if __name__ == "__main__":
    main()
