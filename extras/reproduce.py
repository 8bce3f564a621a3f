"""Runs every method of a recipe over seeds, and writes their table, ledger of costs and curves.

python -m extras.reproduce --recipe toy                           # all rows, three seeds
python -m extras.reproduce --recipe toy --rows scalar text2grad --seeds 0 1 2 4 5
python -m extras.reproduce --recipe toy_quick                     # a taste of it in ten minutes
python -m extras.reproduce --recipe slf5k_8b --dry_run            # print the commands, run none

A recipe is a file recipes/NAME.toml: the [stages.*] are shared by the rows of a seed, each of the
[rows.*] is trained by its `run` and measured by its `measure` or the recipe's, and [words] replace
their {names}. Kill it at any moment: the same command goes on with what is not done. The last line
printed is a JSON object. To sweep learning rates, repeat it with --scale_learning_rates.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from extras import table
from t2g.cli import Help, fail, flags, make_folder, positive
from t2g.log import write_json

HERE = Path(__file__).resolve().parents[1]
NEEDED = {"title", "metrics", "main", "main_title", "curves", "measure", "rows"}


class Job(NamedTuple):
    """The commands of a stage or a row for one seed, and the jobs of that seed that come before."""

    seed: int
    name: str
    folder: Path
    needs: list[str]
    commands: list[str]

    def __str__(self):
        return f"{self.name} of seed {self.seed}"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = flags(parser)
    parser.add_argument("--recipe", required=True, help="a name in recipes/ or a .toml file")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="all rows if not given")
    parser.add_argument("--seeds", nargs="+", type=int, help="the recipe's if not given")
    add("--jobs", None, "commands at once, each with its share of the cores", positive(int))
    add("--output_dir", None, "where all runs go; runs/reproduce/RECIPE if not given")
    add("--scale_learning_rates", 1.0, "factor on the learning rate of every row")
    add("--dry_run", False, "print the commands of the first seed and run none")
    return parser.parse_args()


def main():
    args = parse_args()
    recipe = read_recipe(args.recipe)
    if unknown := set(args.rows or []) - set(recipe["rows"]):
        fail(f"no row {', '.join(sorted(unknown))}; the rows are {', '.join(recipe['rows'])}")
    rows = {name: row for name, row in recipe["rows"].items() if name in (args.rows or [name])}
    seeds = args.seeds or recipe.get("seeds", [0, 1, 2])
    root = Path(args.output_dir or f"runs/reproduce/{Path(args.recipe).stem}")
    by_seed = [jobs_of(recipe, rows, s, root, args.scale_learning_rates) for s in seeds]
    if args.dry_run:
        print(f"# {recipe['title']}")
        for job in by_seed[0]:
            paper = rows.get(job.name, {}).get("paper", {})
            print(f"# {job}" + "".join(f"; paper: {name} {x}" for name, x in paper.items()))
            for line in job.commands:
                print(line if line.startswith("torchrun") else f"python {line}")
        return
    make_folder(root, "--output_dir")
    jobs = [job for same in zip(*by_seed) for job in same]
    jobs.sort(key=lambda job: job.name in rows)  # what others wait for comes first
    run_all(jobs, args.jobs or recipe.get("jobs", 1))
    folders = [root / f"seed-{seed}" for seed in seeds]
    result = table.write(root, folders, recipe, rows, [job.name for job in by_seed[0]])
    print(json.dumps(result))


def read_recipe(name) -> dict:
    path = Path(name) if name.endswith(".toml") else HERE / "recipes" / f"{name}.toml"
    if not path.is_file():
        known = sorted(path.stem for path in HERE.glob("recipes/*.toml"))
        fail(f"there is no recipe {name!r}; the recipes are {', '.join(known)}")
    try:
        recipe = {"stages": {}, "words": {}} | tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        fail(f"{path} is no TOML: {error}")
    if missing := NEEDED - set(recipe):
        fail(f"{path} has no {', '.join(sorted(missing))}")
    if untitled := [name for name, row in recipe["rows"].items() if "title" not in row]:
        fail(f"rows without a title in {path}: {', '.join(untitled)}")
    if both := set(recipe["rows"]) & set(recipe["stages"]):
        fail(f"{', '.join(sorted(both))} in {path} names a row and a stage; rename one of them")
    return recipe


def jobs_of(recipe, rows, seed, root, scale=1.0) -> list[Job]:
    """The jobs of one seed in order: the stages that its rows need, then the rows."""
    jobs, folder = {}, Path(root) / f"seed-{seed}"

    def add_job(name, part, lines):
        for need in part.get("needs", []):
            if need not in jobs:
                stage = recipe["stages"][need]
                add_job(need, stage, [stage["run"]])
        words = recipe["words"] | part | {"seed": seed}
        words |= {"root": shlex.quote(str(folder)), "out": shlex.quote(str(folder / name))}
        words["learning_rate"] = f"{part.get('learning_rate', 0) * scale:.6g}"
        for _ in range(5):  # words may hold words
            lines = [line.format(**words) for line in lines]
        lines = [" ".join(line.split()) for line in lines]
        jobs[name] = Job(seed, name, folder, part.get("needs", []), lines)

    for name, row in rows.items():
        lines = [row["run"]] if "run" in row else []
        add_job(name, row, [*lines, row.get("measure", recipe["measure"])])
    return list(jobs.values())


def run_all(jobs, at_once):
    """Runs the jobs, which are sorted so that each comes after those that it needs."""
    done, futures, failed = [is_done(job) for job in jobs], {}, []
    pool = ThreadPoolExecutor(at_once)
    try:
        for job, is_over in zip(jobs, done):
            needs = [futures[job.seed, need] for need in job.needs]
            run = (lambda: True) if is_over else partial(run_job, job, needs, at_once)
            futures[job.seed, job.name] = pool.submit(run)
        names = {future: job for job, future in zip(jobs, futures.values())}
        for future in tqdm(as_completed(names), total=len(jobs), unit="job"):
            if not future.result():
                failed.append(str(names[future]))
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        fail(f"{', '.join(failed)} failed; see the logs. The same command goes on with the rest")


def run_job(job, needs, at_once) -> bool:
    """Runs the commands with a log, and keeps what the last one printed last for the table."""
    if not all(need.result() for need in needs):
        return False
    threads = str(max(1, (os.cpu_count() or 1) // at_once))
    env = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(HERE)}
    start, output = time.perf_counter(), ""
    with open(job.folder / f"{job.name}.log", "w", encoding="utf-8") as log:
        for line in job.commands:
            pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
            done = subprocess.run([sys.executable, *argv(line)[1:]], env=env, text=True, **pipes)
            output = done.stdout
            log.write(output)
            log.flush()
            if done.returncode:
                tqdm.write(f"{job} failed: see {job.folder}/{job.name}.log")
                return False
    last, seconds = output.rstrip().rpartition("\n")[2], time.perf_counter() - start
    write_json(marker(job), {"commands": job.commands, "seconds": seconds, "result": last})
    return True


def argv(line) -> list[str]:
    """The words of a command, with scripts in the folder of the project.

    >>> argv("torchrun --nproc_per_node 8 train.py")[:4]
    ['python', '-m', 'torch.distributed.run', '--nproc_per_node']
    """
    words = [str(HERE / w) if w.endswith(".py") else w for w in shlex.split(line)]
    if words[0] == "torchrun":
        words[:1] = ["-m", "torch.distributed.run"]
    return ["python", *words]


def is_done(job) -> bool:
    """Whether the job was done before, by the same commands."""
    job.folder.mkdir(parents=True, exist_ok=True)
    if not marker(job).is_file():
        return False
    before = json.loads(marker(job).read_text(encoding="utf-8"))["commands"]
    if before != job.commands:
        other = "; ".join(before)
        fail(f"{job} in {job.folder} was made by {other}; move it away or change --output_dir")
    return True


def marker(job) -> Path:
    return job.folder / f"{job.name}.done.json"


if __name__ == "__main__":
    main()
