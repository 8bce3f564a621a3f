"""Benchmarks: how a model does on problems that others publish. One file a benchmark; `python benchmark.py NAME MODEL ...` runs it.

A benchmark is a module t2g/benchmarks/NAME.py whose docstring says what it measures and how to start it, with

    add_flags(add)        its flags, beside --seed, --bf16 and --out
    run(args) -> dict     its figures; args.models is the list of models
"""

import importlib
from pathlib import Path

from t2g.cli import fail


def names() -> list[str]:
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_"))


def get(name: str):
    if name not in names():
        fail(f"there is no benchmark {name!r}; the benchmarks are {', '.join(names())}")
    return importlib.import_module(f"t2g.benchmarks.{name}")


def print_table(rows):
    """A line for each metric, a column for each model: a number, or a figure {"value", "low", "high"} with its interval."""
    width = max([28, *(len(name) + 2 for name in rows)])
    print(f"\n{'':16}" + "".join(f"{name:>{width}}" for name in rows))
    for metric in next(iter(rows.values())):
        print(f"{metric:16}" + "".join(f"{shown(row[metric]):>{width}}" for row in rows.values()))


def shown(figure) -> str:
    """
    >>> shown(3), shown(0.5), shown({"value": 0.5, "low": 0.4, "high": 0.6})
    ('3', '0.500', '0.500  [0.400, 0.600]')
    """
    if isinstance(figure, dict):
        return "{value:.3f}  [{low:.3f}, {high:.3f}]".format(**figure)
    return str(figure) if isinstance(figure, int) else f"{figure:.3f}"
