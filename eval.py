"""Measures policies and reward models on held-out prompts. The last line printed is a JSON object.

python eval.py                                    # the toy's trained policy beside its starting one
python eval.py policy runs/toy/sft runs/toy/ppo runs/toy/ppo_scalar
python eval.py rm                                 # the card of the toy's reward model
python eval.py rm CRITIC ... --annotations TRUTH.jsonl      # reward models or annotation files
python eval.py seeds runs/toy/ppo runs/toy-1/ppo runs/toy-2/ppo     # mean and 95% interval
python eval.py page runs/toy/ppo runs/toy/ppo_scalar        # one page that compares runs

Left out: the training stages, whose metrics.jsonl has a line per step (t2g/log.py).
"""

import json
import sys
from pathlib import Path

import torch

from t2g import card, cli, critics, page, policy, stages, tasks
from t2g.metrics import evaluate, interval
from t2g.rollout import respond


def parse_args():
    parser = cli.parser(__doc__)
    what = "what to measure"
    runs = "policies; reward models and, with --annotations, annotation files; or runs"
    parser.add_argument("what", nargs="?", choices=list(WHAT), default="policy", help=what)
    parser.add_argument("runs", nargs="*", help=runs)
    add = cli.flags(parser)
    tasks.add_flags(add)
    add("--policy", None, "rm: writes the responses, or gives the tokens with --annotations")
    add("--prompted", False, "rm: ask models that are no reward models as annotate.py asks")
    add("--annotations", None, "rm: records of annotate.py that are the truth instead of the rule")
    add("--response_length", 64, "maximum tokens of a response")
    add("--critique_length", 200, "rm: maximum tokens of a critique")
    add("--eval_samples", 256, "held-out prompts; all records of --annotations if not given")
    add("--out", None, "page: the file, page.html if not given; rm: the same, card.html beside it")
    return tasks.parse(parser, "eval")


def main():
    task, args = parse_args()
    torch.manual_seed(args.seed)
    print(json.dumps(WHAT[args.what](task, args)))


def policies(task, args) -> dict:
    """Each policy's scores on the same held-out prompts, sampled and greedy."""
    if not args.runs:
        stages.ensure(["sft", "ppo"], args, f"runs/{task.NAME}")
    rows, examples = {}, task.load(args)[1]
    for run in args.runs or [f"runs/{task.NAME}/sft", f"runs/{task.NAME}/ppo"]:
        tokenizer, model = policy.load(run, policy.device())
        heldout = tasks.short_enough(examples, tokenizer, args.max_prompt_length)
        heldout, length = heldout[: args.eval_samples], args.response_length
        rows[run], _ = evaluate(task, model, tokenizer, heldout, length, args.bf16, run, args.seed)
    print_table(rows)
    return rows


def reward_models(task, args) -> dict:
    """The card of a critic, or {critic: card} of several; writes their page. See t2g/card.py."""
    root = Path(f"runs/{task.NAME}")
    if not args.annotations and not hasattr(task, "critique"):
        cli.fail(f"the task {args.task} has no rule; give records that are true as --annotations")
    if not args.runs:
        stages.ensure(["sft", "annotate", "rm"], args, root, args.policy)
    names = list(dict.fromkeys(args.runs)) or [str(root / "rm")]
    out = Path(args.out or Path(names[0] if Path(names[0]).is_dir() else ".") / "card.html")
    cli.make_folder(out.parent, "--out")
    names.sort(key=lambda name: not name.endswith(".jsonl"))  # files first: they may be unusable
    if args.annotations:
        models = [name for name in names if not name.endswith(".jsonl")]
        source, truth = args.policy or next(iter(models), None), args.annotations
        given = any(word.split("=")[0] == "--eval_samples" for word in sys.argv)
        records = card.truth_of(truth, args.eval_samples if given else None, args.seed)
    else:
        if names[0].endswith(".jsonl"):
            cli.fail(f"{names[0]} has responses of its own; give their truth as --annotations")
        source, truth = args.policy or str(root / "sft"), f"the rule of {args.task}"
        records = ruled_responses(task, args, source)
    samples = card.samples(records, policy.load(source)[0] if source else None)
    feedback = {name: critique_of(name, task, records, args) for name in names}
    cards = {name: card.card(samples, feedback[name], args.seed) for name in names}
    print_table({name: card.flat(one) for name, one in cards.items()})
    card.write_page(out, truth, source or "words", samples, feedback, cards, args.seed)
    print(f"\npage: {out}")
    return cards if len(cards) > 1 else cards[names[0]]


def ruled_responses(task, args, source) -> list[dict]:
    """Responses of a policy to held-out prompts, annotated by the task's rule."""
    tokenizer, model = policy.load(source, policy.device())
    heldout = tasks.short_enough(task.load(args)[1], tokenizer, args.max_prompt_length)
    heldout = heldout[: args.eval_samples]
    prompts, options = [e.prompt for e in heldout], dict(desc="responses", bf16=args.bf16)
    texts, _ = respond(model, tokenizer, prompts, args.response_length, **options)
    records = []
    for example, text in zip(heldout, texts):
        record = {"prompt": example.prompt, "response": text}
        record["feedback"] = task.critique(example, text)
        record["kinds"] = task.kinds(example, text) if hasattr(task, "kinds") else []
        records.append(record)
    return records


def critique_of(name, task, records, args):
    """The feedback of a model or an annotations file on records; None is unreadable."""
    if name.endswith(".jsonl"):
        return card.same_records(name, records)
    tokenizer, model = policy.load(name, policy.device())
    options = dict(critique_length=args.critique_length, bf16=args.bf16, desc=f"{name} criticises")
    if args.prompted:
        from t2g import annotator  # needs the package openai

        criteria = getattr(task, "CRITERIA", annotator.CRITERIA)
        critic = annotator.prompted_critic(model, tokenizer, criteria, **options)
    else:
        critic = critics.reward_model_critic(model, tokenizer, **options)
    examples = [tasks.Example(record["prompt"], "", {}) for record in records]
    return critic(examples, [record["response"] for record in records])


def seeds(task, args) -> dict:
    """{metric: {"before" or "after": {"mean", "low", "high", "seeds", "values"}}} over runs."""
    results = [page.read_run(run)["result"] for run in args.runs]
    if len(results) < 2:
        cli.fail("an interval needs two runs of train_ppo.py or more")
    table = {}
    for name in results[0]["after"]:
        table[name] = {}
        for when in ("before", "after"):
            table[name][when] = row = interval([result[when][name] for result in results])
            values = ", ".join(f"{value:.3f}" for value in row["values"])
            numbers = "{mean:9.3f}  [{low:.3f}, {high:.3f}]".format(**row)
            print(f"{name:24}{when:8}{numbers}  seeds: {values}")
    return table


def compare(task, args) -> dict:
    """One page of runs; those that differ in nothing but the seed form one column."""
    return {"page": page.write_page(args.out or "page.html", args.runs)}


def print_table(columns):
    """Prints {column: {row: number}}."""
    print("\n" + " " * 32 + "".join(f"  {name:>10}" for name in columns))
    for row, first in next(iter(columns.values())).items():
        if isinstance(first, float):
            cells = [f"  {column[row]:{max(10, len(name))}.3f}" for name, column in columns.items()]
            print(f"{row:32}" + "".join(cells))


WHAT = {"policy": policies, "rm": reward_models, "seeds": seeds, "page": compare}

if __name__ == "__main__":
    main()
