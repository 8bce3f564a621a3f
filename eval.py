"""Measures policies and reward models on held-out prompts. The last line printed is one JSON object.

python eval.py                                                     # the toy's trained policy beside its starting one
python eval.py policy runs/toy/sft runs/toy/ppo runs/toy/ppo_scalar
python eval.py rm                                                  # precision and recall of the toy's reward model
python eval.py seeds runs/toy/ppo runs/toy-1/ppo runs/toy-2/ppo    # mean and 95% interval over runs of several seeds
python eval.py page runs/toy/ppo runs/toy/ppo_scalar               # one page that compares runs, with bands over their seeds
python eval.py alignment --data FILE [TOKENIZER ...]               # do quotes find the spans that people marked?
python eval.py glossary                                            # every metric that train_ppo.py logs, and its formula
"""

import json
from pathlib import Path

import torch

from t2g import cli, critics, families, human_spans, policy, report, stages, tasks
from t2g.align import MATCH_KINDS
from t2g.log import METRICS, read_jsonl
from t2g.metrics import evaluate, interval, span_card
from t2g.rollout import respond


def main():
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("what", nargs="?", choices=list(WHAT), default="policy", help="what to do")
    add(
        "runs",
        nargs="*",
        help="policy: the policies to measure; rm: the reward model; seeds, page: folders of train_ppo.py; alignment: tokenizers",
    )
    tasks.add_flags(add)
    add("--policy", help="rm: whose responses are criticised; runs/TASK/sft if not given")
    add("--response_length", type=cli.positive(int), default=64, help="most tokens of a response")
    add("--critique_length", type=cli.positive(int), default=200, help="rm: most tokens of a critique")
    add("--eval_samples", type=cli.positive(int), default=256, help="held-out prompts")
    add("--out", default="page.html", help="page: the file to write")
    task, args = tasks.parse(parser, "eval")
    torch.manual_seed(args.seed)
    print(json.dumps(WHAT[args.what](task, args)))


def policies(task, args) -> dict:
    """Each policy's scores on the same held-out prompts, sampled and greedy."""
    if not args.runs:
        stages.ensure(["sft", "ppo"], args, f"runs/{args.task}")
    rows, examples = {}, task.load(args)[1]
    for run in args.runs or [f"runs/{args.task}/sft", f"runs/{args.task}/ppo"]:
        tokenizer, model = policy.load(run, policy.device())
        heldout = tasks.short_enough(examples, tokenizer, args.max_prompt_length)[: args.eval_samples]
        rows[run], _ = evaluate(task, model, tokenizer, heldout, args.response_length, args.bf16, run, args.seed)
    print_table(rows, next(iter(rows.values())))
    return rows


def reward_model(task, args) -> dict:
    """The reward model's marks on responses of a policy, against the task's rule."""
    root = Path(f"runs/{args.task}")
    if not args.runs:
        stages.ensure(["sft", "annotate", "rm"], args, root, args.policy)
    tokenizer, model = policy.load(args.policy or root / "sft", policy.device())
    rm_tokenizer, rm = policy.load(args.runs[0] if args.runs else root / "rm", policy.device())
    heldout = tasks.short_enough(task.load(args)[1], tokenizer, args.max_prompt_length)[: args.eval_samples]
    texts, _ = respond(model, tokenizer, [e.prompt for e in heldout], args.response_length, desc="responses", bf16=args.bf16)
    critic = critics.reward_model_critic(rm, rm_tokenizer, args.critique_length, args.bf16)
    card = span_card(task, critic, tokenizer, heldout, texts)
    print_table({kind: card[kind] for kind in ("good", "poor")}, ("precision", "recall", "f1"))
    return card


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
            print(f"{name:24}{when:8}" + "{mean:9.3f}  [{low:.3f}, {high:.3f}]".format(**table[name][when]))
    return table


def page(task, args) -> dict:
    """One page that compares runs of train_ppo.py; those that differ in nothing but the seed are shown as one, with intervals."""
    return {"page": report.write_page(args.out, args.runs)}


def alignment(task, args) -> dict:
    """What quotes mark, against spans that people marked: as t2g/human_spans.py measures it."""
    if not args.data:
        cli.fail("alignment needs --data: responses with spans that people marked; the head of t2g/human_spans.py lists the forms")
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
    rules, garbled = human_spans.rules_for_ambiguous_quotes(responses), human_spans.garbled_quotes(responses, args.seed)
    tokens = {name: human_spans.tokens_marked(responses, tokenizer) for name, tokenizer in tokenizers.items()}
    print_table(rules, ("precision", "recall"))
    print_table(garbled["ways"], MATCH_KINDS)
    print_table(garbled["found"], ("right place", "right characters"))
    for name in ("verbatim", "all"):
        print(f"\ntokens of {name} quotes")
        print_table({key: table[name] for key, table in tokens.items()}, ("marked", "wrong", "human", "missed"))
    return {"quotes": found, "rules": rules, "garbled": garbled, "tokenizers": tokens}


def glossary(task, args) -> dict:
    """The Markdown table of README: every metric and its formula."""
    table = METRICS | task.METRICS
    print("| metric | meaning |\n|---|---|\n" + "\n".join(f"| `{name}` | {meaning} |" for name, meaning in table.items()))
    return table


def print_table(rows, columns):
    """A row for each column name, a column for each of the rows: few policies have many scores."""
    width = max([10, *(len(name) + 2 for name in rows)])
    print(f"\n{'':24}" + "".join(f"{name:>{width}}" for name in rows))
    for column in columns:
        cells = [row[column] for row in rows.values()]
        print(f"{column:24}" + "".join(f"{cell:{width}}" if isinstance(cell, int) else f"{cell:{width}.3f}" for cell in cells))


WHAT = {"policy": policies, "rm": reward_model, "seeds": seeds, "page": page, "alignment": alignment, "glossary": glossary}

if __name__ == "__main__":
    main()
