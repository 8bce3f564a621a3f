"""Measures multiple choice on ARC-Challenge by lm-evaluation-harness: pip install "lm-eval[hf]".

    python -m extras.benchmarks.arc MODEL --data arc_challenge.jsonl
    python -m extras.benchmarks.arc MODEL --data arc_challenge.jsonl --letters

    acc         share of questions whose right option has the highest log-likelihood
    acc_norm    the same, the log-likelihood divided by the option's length

The task is arc_local.yaml, 0-shot and without a chat template, or arc_letters.yaml.
"""

from pathlib import Path

import yaml

from extras import benchmarks
from t2g import cli, dist, policy
from t2g.data import needed


@cli.friendly_errors()
def main():
    parser, add = benchmarks.parser(__doc__, samples=False)
    parser.add_argument("model", help="a run, a model's folder, a .gguf file or a hub id")
    add("--data", "arc.jsonl", "the questions; arc_local.yaml describes the file")
    add("--letters", False, "list the options in the question and compare their letters")
    args = parser.parse_args()
    if not Path(args.data).is_file():
        cli.fail(f"there is no file {args.data}; --data names the questions")
    benchmarks.report({args.model: evaluate(args)})


def evaluate(args) -> dict:
    """Returns acc and acc_norm with normal 95% intervals."""
    lm_eval, models = needed("lm_eval", "ARC"), needed("lm_eval.models.huggingface", "ARC")
    tokenizer, model = policy.load(args.model, policy.device())
    dtype = "bfloat16" if dist.in_bf16(args.bf16) else None
    wrapped = models.HFLM(model, tokenizer=tokenizer, batch_size=16, mixed_precision_dtype=dtype)
    task = {}
    for name in ("arc_local", "arc_letters") if args.letters else ("arc_local",):
        task |= yaml.safe_load(Path(__file__).with_name(f"{name}.yaml").read_text())
    task.pop("include", None)
    task["dataset_path"] = "parquet" if args.data.endswith(".parquet") else "json"
    task["dataset_kwargs"] = {"data_files": {"test": str(Path(args.data).resolve())}}
    [result] = lm_eval.simple_evaluate(wrapped, tasks=[task])["results"].values()
    figures = {}
    for metric in ("acc", "acc_norm"):
        error = result[f"{metric}_stderr,none"]
        figures[metric] = benchmarks.normal_interval(result[f"{metric},none"], 1.96 * error)
    return figures


if __name__ == "__main__":
    main()
