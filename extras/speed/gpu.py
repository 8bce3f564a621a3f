"""Checks and times the project on a GPU, in a few minutes on one H100.

    python -m extras.speed.gpu --out runs/gpu
    python -m extras.speed.gpu --out runs/gpu --rehearse        # in tiny shapes, on a CPU

The first part checks that the GPU takes the PPO step of the CPU, the second measures speed and
memory. After each row OUT/gpu.md (a table for docs/RESULTS.md) is rewritten, so an interruption
loses nothing. The exit code is 1 if a check failed.

Left out are jobs that run on a GPU as they do elsewhere: train_ppo.py, extras/reproduce.py.
"""

import os
import sys
from pathlib import Path

import torch
import transformers

from extras.speed import gpu_agreement, gpu_speed
from t2g import checkpoint, cli
from t2g.log import write_text

PARTS = {"agreement": gpu_agreement.agreement, "speed": gpu_speed.speed}
MARKS = {None: "", True: "passed", False: "**failed**"}


@cli.friendly_errors()
def main() -> bool:
    """Runs the parts. Returns whether a check failed."""
    parser = cli.parser(__doc__)
    add = cli.flags(parser)
    add("--out", "runs/gpu", "folder of gpu.md and of what the parts write")
    add("--rehearse", False, "run on a CPU in tiny shapes, to see that it works")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="parts to run")
    args = parser.parse_args()
    if args.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        cli.fail("there is no GPU; --rehearse runs every part on a CPU")
    path, checks = Path(args.out).resolve() / "gpu.md", []
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [about(args.rehearse), "", "| what | measured | beside | |", "|---|---|---|---|"]

    def report(what, measured, beside="", ok=None):
        """Adds a row. beside: what to compare it with. ok: whether a check passed, if it is one."""
        number = f"{measured:.4g}" if isinstance(measured, float) else str(measured)
        table.append(f"| {what} | {number} | {beside} | {MARKS[ok]} |")
        checks.append(ok)
        print(table[-1], flush=True)
        write_text(path, "\n".join(table) + "\n")

    for part in args.parts:
        PARTS[part](args, report)
    print(f"table: {path}")
    return False in checks


def about(is_rehearsal) -> str:
    """Returns the device, the versions and the commit."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    device += " (a rehearsal in tiny shapes: these numbers mean nothing)" if is_rehearsal else ""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{device}, {versions}, CUDA {torch.version.cuda}, commit {checkpoint.commit()}"


if __name__ == "__main__":
    sys.exit(main())
