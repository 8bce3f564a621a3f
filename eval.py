"""Measures policies and reward models on held-out prompts. The last line printed is a JSON object.

python eval.py                                    # the toy's trained policy beside its starting one
python eval.py policy runs/toy/sft runs/toy/ppo runs/toy/ppo_scalar
python eval.py rm                                 # the card of the toy's reward model
python eval.py rm CRITIC ... --annotations TRUTH.jsonl      # reward models or annotation files
python eval.py page runs/toy/ppo runs/toy/ppo_scalar        # one page that compares runs
"""

import json
from functools import partial
from pathlib import Path

from t2g import card, cli, critics, dist, page, policy, stages, tasks, torchrun
from t2g.metrics import evaluate
from t2g.notes import read_usable
from t2g.rollout import respond_together

EXAMPLES_SHOWN = 3
ANNOTATIONS = (".jsonl", ".jsonl.gz")  # how the names of files of annotations end


@cli.friendly_errors()
def main():
    parser = cli.parser(__doc__)
    parser.add_argument("what", nargs="?", choices=WHAT, default="policy", help="default: policy")
    runs = "for policy: policies; for rm: reward models or annotations; for page: PPO runs"
    parser.add_argument("runs", nargs="*", help=runs)
    add = cli.flags(parser)
    tasks.add_flags(add)
    add("--policy", None, "rm: policy to sample; with --annotations, only its tokenizer is used")
    add("--annotations", None, "rm: records of annotate.py that are the truth instead of the rule")
    add("--response_length", 64, "maximum tokens of a response")
    add("--temperature", 1.0, "temperature of sampled responses")
    add("--critique_length", 200, "rm: maximum tokens of a critique")
    add("--free_critiques", False, "rm: generate critiques without a grammar")
    add("--eval_samples", 256, "number of held-out prompts; --annotations uses all its records")
    add("--out", "page.html", "page: the file to write")
    task, args = tasks.parse(parser, "eval")
    if args.what == "rm" and not (args.annotations or hasattr(task, "critique")):
        cli.fail(f"the task {args.task} has no rule; give the true records as --annotations")
    if args.policy and args.what != "rm":
        cli.fail("--policy belongs to eval.py rm; name policies as arguments: eval.py policy RUN")
    needed = [] if args.runs else NEEDED.get(args.what, [])
    earlier = partial(stages.ensure, needed, args, f"runs/{task.NAME}", args.policy)
    with torchrun.session(run_first=earlier):
        print(json.dumps(WHAT[args.what](task, args)))


def policies(task, args) -> dict:
    """Returns each policy's scores on the same held-out prompts, sampled and greedy."""
    scores, table, examples = {}, {}, tasks.load(task, args)[1]
    for run in args.runs or [f"runs/{task.NAME}/sft", f"runs/{task.NAME}/ppo"]:
        tokenizer, model = policy.load(run, policy.device())
        heldout = tasks.short_enough(examples, tokenizer, model, args)
        heldout = heldout[: args.eval_samples]
        scores[run] = evaluate(task, model, tokenizer, heldout, args, run)
        table[run] = {name: f"{score:.3f}" for name, score in scores[run].items()}
        del model  # before the next one is loaded
    print_table(table)
    return scores


def reward_models(task, args) -> dict:
    """Returns the card of a critic, or {critic: card} of several; see t2g/card.py."""
    root = Path("runs", task.NAME)
    names = args.runs or [str(root / "rm")]
    models = [name for name in names if not name.endswith(ANNOTATIONS)]
    if args.annotations:
        source, records = args.policy or next(iter(models), None), read_usable(args.annotations)
    elif models == names:
        source = args.policy or str(root / "sft")
        records = records_of_rule(task, args, source)
    else:
        cli.fail("annotation files need the truth about their responses: give --annotations")
    tokenizer = policy.load(source, empty=True)[0] if source else None
    feedback = {name: feedback_of(name, records, args) for name in names}
    cards = {name: card.card(records, feedback[name], tokenizer, args.seed) for name in names}
    print_examples(records, feedback)
    print_table({name: card.as_rows(one) for name, one in cards.items()})
    return cards if len(cards) > 1 else cards[names[0]]


def records_of_rule(task, args, source) -> list[dict]:
    """Samples responses of a policy to held-out prompts; the task's rule annotates them."""
    tokenizer, model = policy.load(source, policy.device())
    heldout = tasks.short_enough(tasks.load(task, args)[1], tokenizer, model, args)
    heldout = heldout[: args.eval_samples]
    prompts, length = [example.prompt for example in heldout], args.response_length
    options = dict(temperature=args.temperature, bf16=args.bf16, desc="responses")
    texts, _ = respond_together(model, tokenizer, prompts, length, **options)
    records = []
    for example, text, one in zip(heldout, texts, critics.rule_critic(task)(heldout, texts)):
        kinds = task.kinds(example, text) if hasattr(task, "kinds") else []
        records.append(dict(prompt=example.prompt, response=text, kinds=kinds, feedback=one))
    return records


def feedback_of(name, records, args):
    """Returns the feedback of a reward model or an annotations file; None is unreadable."""
    if name.endswith(ANNOTATIONS):
        return card.read_feedback_on(records, name)
    tokenizer, model = policy.load(name, policy.device())
    options = dict(critique_length=args.critique_length, free=args.free_critiques)
    options |= dict(bf16=args.bf16, desc=f"{name} criticises")
    critic = critics.reward_model_critic(model, tokenizer, **options)
    own = dist.share(records)
    examples = [tasks.Example(record["prompt"], "", {}) for record in own]
    feedback = critic(examples, [record["response"] for record in own])
    return dist.collect(feedback, len(records))


def compare(task, args) -> dict:
    """Writes one page; runs that differ in nothing but the seed form one column."""
    return {"page": page.write_page(args.out, args.runs)}


def print_examples(records, feedback):
    for i, record in enumerate(records[:EXAMPLES_SHOWN]):
        print(f"\n{record['response']}\n\ntruth: {record['feedback'].render()}")
        for name, opinions in feedback.items():
            print(f"{name}: {opinions[i].render() if opinions[i] else 'unreadable'}")


def print_table(columns):
    """Prints {column: {row: cell}}."""
    print("\n" + " " * 28 + "".join(f"  {name:>20}" for name in columns))
    for row in next(iter(columns.values())):
        cells = [f"  {column[row]:>{max(20, len(name))}}" for name, column in columns.items()]
        print(f"{row:28}" + "".join(cells))


WHAT = {"policy": policies, "rm": reward_models, "page": compare}
NEEDED = {"policy": ["sft", "ppo"], "rm": ["sft", "annotate", "rm"]}  # stages, if no run is named

if __name__ == "__main__":
    main()
