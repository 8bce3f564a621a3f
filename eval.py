"""Measures policies and reward models on held-out prompts. The last line printed is one JSON object.

python eval.py                                                     # the toy's trained policy beside its starting one
python eval.py policy runs/toy/sft runs/toy/ppo runs/toy/ppo_scalar
python eval.py rm                                                  # the card of the toy's reward model, against its rule
python eval.py rm CRITIC ... --annotations TRUTH.jsonl             # of reward models or annotation files, against annotations
python eval.py seeds runs/toy/ppo runs/toy-1/ppo runs/toy-2/ppo    # mean and 95% interval over runs of several seeds
python eval.py page runs/toy/ppo runs/toy/ppo_scalar               # one page that compares runs, with bands over their seeds
python eval.py alignment --data FILE [TOKENIZER ...]               # do quotes find the spans that people marked?
python eval.py merge RUN --out FOLDER                              # the plain model of a run that trained LoRA adapters
python eval.py glossary                                            # every metric that train_ppo.py logs, and its formula
"""

import json
import sys
from pathlib import Path

import torch

from extras.human import families
from extras.human import spans as human_spans
from t2g import card, cli, critics, policy, stages, tasks
from t2g import page as report
from t2g.align import MATCH_KINDS
from t2g.log import METRICS, read_jsonl
from t2g.metrics import evaluate, interval
from t2g.respond import respond


def main():
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("what", nargs="?", choices=list(WHAT), default="policy", help="what to do")
    add(
        "runs",
        nargs="*",
        help="policy: the policies to measure; rm: reward models, or with --annotations also files that another critic annotated; "
        "seeds, page, merge: folders of train_ppo.py; alignment: tokenizers",
    )
    tasks.add_flags(add)
    add(
        "--policy",
        help="rm: whose responses are criticised, runs/TASK/sft if not given; with --annotations, whose tokens count",
    )
    add(
        "--prompted",
        action="store_true",
        help="rm: the models are no reward models; ask them as annotate.py asks an annotator",
    )
    add(
        "--annotations",
        help="rm: records as annotate.py writes them that are the truth, in place of the task's rule",
    )
    add("--response_length", type=cli.positive(int), default=64, help="most tokens of a response")
    critics.add_flags(add)
    add(
        "--reflect",
        action="store_true",
        help="policy: measure a second try, after the critique of the first by --critic",
    )
    add(
        "--eval_samples",
        type=cli.positive(int),
        default=256,
        help="held-out prompts; of --annotations all records if not given",
    )
    where = "page: the file to write, page.html if not given; rm: the same, card.html in the reward model's folder; merge: a folder"
    add("--out", help=where)
    task, args = tasks.parse(parser, "eval")
    if not (args.what == "policy" and args.reflect) and (
        args.reflect or args.reward_model or args.base_url
    ):
        cli.fail(
            "--reflect is for policy, and --reward_model and --base_url are for --reflect; name what is measured behind it"
        )
    torch.manual_seed(args.seed)
    print(json.dumps(WHAT[args.what](task, args)))


def policies(task, args) -> dict:
    """Each policy's scores on the same held-out prompts, sampled and greedy."""
    if not args.runs:
        stages.ensure(["sft", "ppo"], args, f"runs/{task.NAME}")
    rows, examples = {}, task.load(args)[1]
    critic = None
    if args.reflect:
        root = Path(args.runs[0]).parent if args.runs else Path(f"runs/{task.NAME}")
        stages.ensure(critics.stages_before(args), args, root)
        critic = critics.load_critic(task, args, root, policy.device())
    for run in args.runs or [f"runs/{task.NAME}/sft", f"runs/{task.NAME}/ppo"]:
        tokenizer, model = policy.load(run, policy.device())
        heldout = tasks.short_enough(examples, tokenizer, args.max_prompt_length)[
            : args.eval_samples
        ]
        rows[run], _ = evaluate(
            task, model, tokenizer, heldout, args.response_length, args.bf16, run, args.seed, critic
        )
    print_table(rows, next(iter(rows.values())))
    return rows


def reward_model(task, args) -> dict:
    """The card of a critic, or {critic: card} of several: see t2g/card.py. Writes their page."""
    root = Path(f"runs/{task.NAME}")
    if not args.annotations and not hasattr(task, "critique"):
        cli.fail(
            f"the task {args.task} has no rule to hold a critic against; give records that are true with --annotations"
        )
    if not args.runs:
        stages.ensure(["sft", "annotate", "rm"], args, root, args.policy)
    names = list(dict.fromkeys(args.runs)) or [str(root / "rm")]
    out = card.page_path(args.out, names[0])
    records, source = (
        against_annotations(args, names)
        if args.annotations
        else against_rule(task, args, names, root)
    )
    samples = card.samples(
        records, source and families.load(str(policy.latest_checkpoint(source) or source))
    )
    said = dict.fromkeys(names)
    for name in sorted(
        names, key=lambda name: not name.endswith(".jsonl")
    ):  # files first: their faults show at once
        said[name] = critique_of(name, task, records, args)
    cards = {name: card.card(samples, feedback, args.seed) for name, feedback in said.items()}
    for name, found in cards.items():
        print(f"\n{name}")
        by_character = {f"{sign}, characters": found["by_character"][sign] for sign in card.SIGNS}
        print_table(
            {sign: found[sign] for sign in card.SIGNS} | by_character, ("precision", "recall", "f1")
        )
        if found["kinds"]:
            print_table(found["kinds"], ("recall", "spans", "tokens"))
    truth = args.annotations or f"the rule of {args.task}"
    card.write_page(
        out, truth, f"of {source}" if source else "words", samples, said, cards, args.seed
    )
    print(f"\npage: {out}")
    return cards if len(cards) > 1 else next(iter(cards.values()))


def against_rule(task, args, names, root):
    """Responses of a policy to held-out prompts, annotated by the task's rule; and that policy, whose tokens count."""
    if files := [name for name in names if name.endswith(".jsonl")]:
        cli.fail(
            f"{files[0]} criticises responses of its own; say with --annotations what is true of them"
        )
    source = args.policy or str(root / "sft")
    tokenizer, model = policy.load(source, policy.device())
    heldout = tasks.short_enough(task.load(args)[1], tokenizer, args.max_prompt_length)[
        : args.eval_samples
    ]
    texts, _ = respond(
        model,
        tokenizer,
        [e.prompt for e in heldout],
        args.response_length,
        desc="responses",
        bf16=args.bf16,
    )
    records = []
    for example, text in zip(heldout, texts):
        feedback = task.critique(example, text)
        kinds = task.kinds(example, text) if hasattr(task, "kinds") else []
        records.append(
            {"prompt": example.prompt, "response": text, "feedback": feedback, "kinds": kinds}
        )
    return records, source


def against_annotations(args, names):
    """The records of --annotations; and --policy or else the first reward model, whose tokens count, None if there is neither."""
    given = any(
        word.partition("=")[0] == "--eval_samples" for word in sys.argv
    )  # the task's default is for prompts
    records = card.truth_of(args.annotations, args.eval_samples if given else None, args.seed)
    return records, args.policy or next(
        (name for name in names if not name.endswith(".jsonl")), None
    )


def critique_of(name, task, records, args):
    """What a reward model, or another file of annotations, says of the records: a list of feedback, None where it is unreadable."""
    if name.endswith(".jsonl"):
        return card.same_records(name, records, args.annotations)
    tokenizer, model = policy.load(name, policy.device())
    settings = dict(critique_length=args.critique_length, bf16=args.bf16, desc=f"{name} criticises")
    if args.prompted:
        from t2g import annotator  # here, for it needs the package openai

        critic = annotator.prompted_critic(
            model, tokenizer, getattr(task, "CRITERIA", annotator.CRITERIA), **settings
        )
    else:
        critic = critics.reward_model_critic(model, tokenizer, **settings)
    examples = [tasks.Example(record["prompt"], "", {}) for record in records]
    return critic(examples, [record["response"] for record in records])


def seeds(task, args) -> dict:
    """Mean and 95% interval of the results of several runs: {metric: {when: {"mean", "low", "high", "seeds"}}}."""
    missing = [run for run in args.runs if not (Path(run) / "result.json").is_file()]
    if len(args.runs) < 2:
        cli.fail("an interval needs the folders of two runs of train_ppo.py at least")
    if missing:
        cli.fail(f"no result.json in {', '.join(missing)}; name finished runs of train_ppo.py")
    results = [json.loads((Path(run) / "result.json").read_text()) for run in args.runs]
    table = {}
    for when in ("before", "after"):
        for name in results[0][when]:
            table.setdefault(name, {})[when] = interval([result[when][name] for result in results])
            print(
                f"{name:24}{when:8}"
                + "{mean:9.3f}  [{low:.3f}, {high:.3f}]".format(**table[name][when])
            )
    return table


def page(task, args) -> dict:
    """One page that compares runs of train_ppo.py; those that differ in nothing but the seed are shown as one, with intervals."""
    return {"page": report.write_page(args.out or "page.html", args.runs)}


def alignment(task, args) -> dict:
    """What quotes mark, against spans that people marked: as t2g/human_spans.py measures it."""
    if not args.data:
        cli.fail(
            "alignment needs --data: responses with spans that people marked; the head of t2g/human_spans.py lists the forms"
        )
    responses, verbatim = human_spans.read(read_jsonl(args.data), args.data)
    found = human_spans.how_found(responses)
    print_table({"share of quotes": found}, list(found)[1:])
    if not verbatim:
        corrections = human_spans.against_corrections(responses)
        print_table(corrections, ("quotes", "changed", "by_chance"))
        return {"quotes": found, "corrections": corrections}
    if args.runs:
        short = len({Path(name).name for name in args.runs}) == len(args.runs)
        tokenizers = {Path(name).name if short else name: families.load(name) for name in args.runs}
    else:
        texts = [marked.text for marked in responses]
        tokenizers = {name: train(texts) for name, train in families.FAMILIES.items()}
    rules, garbled = (
        human_spans.rules_for_ambiguous_quotes(responses),
        human_spans.garbled_quotes(responses, args.seed),
    )
    tokens = {
        name: human_spans.tokens_marked(responses, tokenizer)
        for name, tokenizer in tokenizers.items()
    }
    print_table(rules, ("precision", "recall"))
    print_table(garbled["ways"], MATCH_KINDS)
    print_table(garbled["found"], ("right place", "right characters"))
    for name in ("verbatim", "all"):
        print(f"\ntokens of {name} quotes")
        print_table(
            {key: table[name] for key, table in tokens.items()},
            ("marked", "wrong", "human", "missed"),
        )
    return {"quotes": found, "rules": rules, "garbled": garbled, "tokenizers": tokens}


def merge(task, args) -> dict:
    """Writes a policy as a plain model, its adapter merged into the weights if it has one."""
    if len(args.runs) != 1 or not args.out:
        cli.fail("merge needs one run, and --out, the folder to write")
    if Path(args.out).exists():
        cli.fail(f"{args.out} is there already; choose another --out")
    tokenizer, model = policy.load(args.runs[0])
    cli.make_folder(Path(args.out), "--out")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    return {"merged": args.out}


def glossary(task, args) -> dict:
    """The Markdown table of README: every metric and its formula."""
    table = METRICS | task.METRICS
    print(
        "| metric | meaning |\n|---|---|\n"
        + "\n".join(f"| `{name}` | {meaning} |" for name, meaning in table.items())
    )
    return table


def print_table(rows, columns):
    """A row for each column name, a column for each of the rows: few policies have many scores."""
    width = max([10, *(len(name) + 2 for name in rows)])
    print(f"\n{'':24}" + "".join(f"{name:>{width}}" for name in rows))
    for column in columns:
        cells = [row[column] for row in rows.values()]
        print(
            f"{column:24}"
            + "".join(
                f"{cell:{width}}" if isinstance(cell, int) else f"{cell:{width}.3f}"
                for cell in cells
            )
        )


WHAT = {
    "policy": policies,
    "rm": reward_model,
    "seeds": seeds,
    "page": page,
    "alignment": alignment,
    "merge": merge,
}
WHAT |= {"glossary": glossary}

if __name__ == "__main__":
    main()
