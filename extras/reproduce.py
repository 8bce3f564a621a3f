"""Runs every method of a recipe over seeds, and writes their table, ledger of costs and curves.

python -m extras.reproduce --recipe toy                           # all rows and seeds
python -m extras.reproduce --recipe toy --rows scalar text2grad --seeds 0 1 2
python -m extras.reproduce --recipe toy_rates                     # the sweep of learning rates
python -m extras.reproduce --recipe toy_quick                     # a taste of it in five minutes
python -m extras.reproduce --recipe slf5k_8b --dry_run            # print the commands, run none
python -m extras.reproduce --recipe slf5k_8b --plan 8xH100-80     # memory, hours and costs

A recipe is a file recipes/NAME.toml. The rows of a seed share its [stages.*]. Each of the [rows.*]
is trained by its `run` and measured by its `measure` or the recipe's; each {name} in a command is
replaced by that entry of [words]. Kill it at any moment: the same command resumes it. The last line
printed is a JSON object.
"""

import json
import os
import shlex
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from extras import table
from t2g import checkpoint
from t2g.cli import fail, flags, friendly_errors, parser, positive
from t2g.log import write_json

ROOT = Path(__file__).resolve().parents[1]
# A recipe may also have seeds, jobs, stages, words, curve, against, also_at_equal_kl (metrics whose
# difference is taken there too) and lower_is_better (true or false, of the curve).
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

    @property
    def result(self) -> Path:
        return self.folder / f"{self.name}.done.json"


@friendly_errors()
def main():
    arguments = parser(__doc__)
    add = flags(arguments)
    arguments.add_argument("--recipe", required=True, help="a name in recipes/ or a .toml file")
    arguments.add_argument("--rows", nargs="+", metavar="ROW", help="all rows if not given")
    arguments.add_argument("--seeds", nargs="+", type=int, help="the recipe's if not given")
    add("--jobs", None, "commands at once, each with its share of the cores", positive(int))
    add("--output_dir", None, "where all runs go; runs/reproduce/RECIPE if not given")
    add("--dry_run", False, "print the commands of the first seed and run none")
    add("--plan", None, "a machine, such as 8xH100-80: print memory, hours and costs, run nothing")
    args = arguments.parse_args()
    recipe = read_recipe(args.recipe)
    if unknown := set(args.rows or []) - set(recipe["rows"]):
        fail(f"no row {', '.join(sorted(unknown))}; the rows are {', '.join(recipe['rows'])}")
    rows = {name: row for name, row in recipe["rows"].items() if name in (args.rows or [name])}
    seeds = args.seeds or recipe.get("seeds", [0, 1, 2])
    root = Path(args.output_dir or f"runs/reproduce/{Path(args.recipe).stem}")
    try:
        by_seed = [jobs_of(recipe, rows, s, root) for s in seeds]
    except KeyError as error:
        fail(f"{args.recipe} uses {error}, which is neither one of its stages nor one of its words")
    if args.dry_run:
        return show(recipe, rows, by_seed[0])
    if args.plan:
        from extras.scale.recipe import plan_recipe  # which imports the scripts

        return print(json.dumps(plan_recipe(args.plan, by_seed[0], len(seeds))))
    root.mkdir(parents=True, exist_ok=True)
    jobs = [job for same in zip(*by_seed) for job in same]
    jobs.sort(key=lambda job: job.name in rows)  # stages before rows
    run_all(jobs, args.jobs or recipe.get("jobs", 1))
    folders = [root / f"seed-{seed}" for seed in seeds]
    result = table.write(root, folders, recipe, rows, [job.name for job in by_seed[0]])
    print(json.dumps(result))


def show(recipe, rows, jobs):
    """Prints the commands of jobs, and the paper's figures for their rows."""
    print(f"# {recipe['title']}")
    for job in jobs:
        paper = rows.get(job.name, {}).get("paper", {})
        print(f"# {job}" + "".join(f"; paper: {name} {x}" for name, x in paper.items()))
        for line in job.commands:
            print(line if line.startswith("torchrun") else f"python {line}")


def read_recipe(name) -> dict:
    path = Path(name) if name.endswith(".toml") else ROOT / "recipes" / f"{name}.toml"
    if not path.is_file():
        known = sorted(path.stem for path in ROOT.glob("recipes/*.toml"))
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


def jobs_of(recipe, rows, seed, root) -> list[Job]:
    """Returns the jobs of one seed in order: each after the stages that it needs."""
    jobs, folder = {}, Path(root) / f"seed-{seed}"

    def add_job(name, part, lines):
        for need in part.get("needs", []):
            if need not in jobs:
                stage = recipe["stages"][need]
                add_job(need, stage, [stage["run"]])
        words = recipe["words"] | part | {"seed": seed}
        words |= {"root": shlex.quote(str(folder)), "out": shlex.quote(str(folder / name))}
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
    left = [job for job in jobs if not is_done(job)]
    futures, failed = {}, []
    pool = ThreadPoolExecutor(at_once)
    try:
        for job in left:
            needs = [futures[job.seed, n] for n in job.needs if (job.seed, n) in futures]
            futures[job.seed, job.name] = pool.submit(run_job, job, needs, at_once)
        bar = tqdm(as_completed(futures.values()), "jobs", len(jobs), initial=len(jobs) - len(left))
        failed = [str(future.result()) for future in bar if future.result()]
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        fail(f"{', '.join(failed)} failed; see the logs. The same command runs what is left")


def run_job(job, needs, at_once):
    """Runs a job's remaining commands, and records each in NAME.done.json; returns a failed job."""
    if any(need.result() for need in needs):
        return job
    threads = str(max(1, (os.cpu_count() or 1) // at_once))
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": path}
    done, log_file = progress(job), job.folder / f"{job.name}.log"
    for line in job.commands[len(done["commands"]) :]:
        start = time.perf_counter()
        with open(log_file, "a", encoding="utf-8") as log:
            pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
            ended = subprocess.run([sys.executable, *argv(line)], env=env, text=True, **pipes)
            log.write(ended.stdout)
        if ended.returncode:
            tqdm.write(f"{job} failed: see {log_file}")
            return job
        done["commands"].append(line)
        done["seconds"] += time.perf_counter() - start
        done["result"] = ended.stdout.rstrip().rpartition("\n")[2]
        done["commits"] = [*done.get("commits", []), checkpoint.commit()]
        write_json(job.result, done)


def progress(job) -> dict:
    """Returns a job's commands that have ended, their seconds and what the last one printed."""
    if job.result.is_file():
        return table.read_done(job.folder, job.name)
    return {"commands": [], "seconds": 0.0, "result": ""}


def argv(line) -> list[str]:
    """Returns the arguments of python for a command, whose scripts are the project's.

    >>> argv("torchrun --nproc_per_node 8 -m extras.a")
    ['-m', 'torch.distributed.run', '--nproc_per_node', '8', '-m', 'extras.a']
    """
    words = shlex.split(line)
    words = [str(ROOT / w) if w.endswith(".py") and (ROOT / w).is_file() else w for w in words]
    return ["-m", "torch.distributed.run", *words[1:]] if words[0] == "torchrun" else words


def is_done(job) -> bool:
    """Returns True if the job was done before; fails if other commands did it."""
    job.folder.mkdir(parents=True, exist_ok=True)
    done = progress(job)["commands"]
    if done != job.commands[: len(done)]:
        other = "; ".join(done)
        fail(f"{job} in {job.folder} was made by {other}; move it away or change --output_dir")
    return len(done) == len(job.commands)


if __name__ == "__main__":
    main()
