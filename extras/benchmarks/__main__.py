"""Measures models on published benchmarks. The last line printed is one JSON object.

python benchmark.py                        # this text and the list of benchmarks
python benchmark.py NAME --help            # what a benchmark measures, and its flags
python benchmark.py NAME MODEL ...         # a model is a run's folder, a model's folder, a .gguf file or a hub id
"""

import json
import sys
from pathlib import Path

from extras import benchmarks
from t2g import cli
from t2g.log import write_json

COMMON = {
    "--seed": dict(type=int, default=0, help="seed of every random choice"),
    "--bf16": dict(action="store_true", help="matrix products in bf16, weights in fp32"),
    "--out": dict(help="a file for the JSON object"),
}


def main():
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        return print(
            f"{__doc__}\n"
            + "\n".join(f"{name:12}{first_line(name)}" for name in benchmarks.names())
        )
    benchmark = benchmarks.get(sys.argv[1])
    parser = cli.parser(benchmark.__doc__)
    parser.prog = f"benchmark.py {sys.argv[1]}"
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="run's folder, model's folder, .gguf file or hub id",
    )
    own = set()

    def add(flag, *spec, **settings):
        own.add(flag)
        parser.add_argument(flag, *spec, **settings)

    benchmark.add_flags(add)
    for flag, settings in COMMON.items():
        if flag not in own:  # a benchmark on a task's examples brings that task's flags
            add(flag, **settings)
    args = parser.parse_intermixed_args(sys.argv[2:])
    if args.out:
        cli.make_folder(Path(args.out).resolve().parent, "--out")  # before the work, not after it
    result = benchmark.run(args)
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result))


def first_line(name) -> str:
    return benchmarks.get(name).__doc__.strip().splitlines()[0]


if __name__ == "__main__":
    main()
