"""Stage 1: responses -> critiques and spans. Who criticises: a program, a model behind a server, or people.

    python annotate.py                                                 # the toy: 6000 samples, criticised by its rule
    python annotate.py --task summarize --policy MODEL --data posts.jsonl --num_samples 500 --out runs/posts/annotations.jsonl
    python annotate.py --responses texts.jsonl --out notes.jsonl --model gpt-4o --input_price 2.5 --output_price 10 --budget 5
    python annotate.py --responses texts.jsonl --out notes.jsonl --model NAME --base_url http://localhost:8000/v1
    python annotate.py --responses filled_in.jsonl --out notes.jsonl --critic human

Each line of --responses: {"id", "prompt", "response"}; further fields are kept. Without it, responses are sampled from a policy.
Each line of --out has these and {"critique", "good_spans", "poor_spans", "status", "reason"}. With --severity, a span is
{"text": ..., "severity": ...} where the critic says how much it matters.

A server's annotations are written as they come, with "reasoning" and "usage". Stopped at any moment, by a kill, Ctrl-C (exit code
130) or the budget (exit code 0), the same command goes on where it was, and asks again only for what was on its way. The key is
read from OPENAI_API_KEY.
"""

import asyncio
import random
import time
from pathlib import Path

import torch
from tqdm import tqdm

from t2g import annotator, cli, policy, server, stages, tasks
from t2g.feedback import FeedbackError
from t2g.notes import WRITTEN, Notes, check_kinds, read_responses, write_whole, writing
from t2g.rollout import respond


def parse_args():
    parser = cli.parser(__doc__)
    add = parser.add_argument
    tasks.add_flags(add)
    add("--responses", help="records to annotate; a policy's samples if not given")
    add("--out", help="the .jsonl file to write; runs/TASK/annotations.jsonl if not given")
    add(
        "--critic",
        choices=("rule", "openai", "human"),
        help="openai if --model or --base_url is given, else rule",
    )
    add(
        "--policy",
        help="whose responses are criticised: a run, a folder, a hub id or a .gguf file; sft beside --out if not given",
    )
    add(
        "--num_samples",
        type=cli.positive(int),
        default=500,
        help="responses to sample and criticise, without --responses",
    )
    add("--response_length", type=cli.positive(int), default=64, help="most tokens of a response")
    add(
        "--temperature",
        type=cli.positive(float),
        default=1.0,
        help="the policy's sampling temperature",
    )
    add(
        "--severity",
        action="store_true",
        help="keep how bad or good each quote is, where the critic says so",
    )
    add("--model", help="openai: the annotator's name at the server")
    add(
        "--base_url",
        help="openai: any server that speaks OpenAI's API, such as http://localhost:8000/v1; OpenAI if not given",
    )
    add(
        "--annotator_temperature",
        type=cli.between(0, 2),
        default=0.3,
        help="openai: the annotator's sampling temperature",
    )
    add(
        "--max_tokens",
        type=cli.positive(int),
        default=1024,
        help="openai: most tokens of an answer",
    )
    add(
        "--max_spans",
        type=cli.positive(int),
        default=2,
        help="openai: most good quotes, and most poor ones, of a response",
    )
    add("--concurrency", type=cli.positive(int), default=16, help="openai: requests at once")
    add(
        "--max_retries",
        type=cli.positive(int),
        default=5,
        help="openai: how often a request is sent again, and a question put again",
    )
    add(
        "--timeout",
        type=cli.positive(float),
        default=120.0,
        help="openai: seconds to wait for an answer",
    )
    add(
        "--input_price",
        type=cli.between(0, 1e9),
        default=0.0,
        help="openai: money for a million tokens of prompts",
    )
    add(
        "--output_price",
        type=cli.between(0, 1e9),
        default=0.0,
        help="openai: money for a million tokens of answers",
    )
    add(
        "--budget",
        type=cli.between(0, 1e9),
        help="openai: stop before --out has cost more money than this, earlier runs included",
    )
    add(
        "--retry_failed",
        action="store_true",
        help="openai: ask again for the records of --out that failed",
    )
    add(
        "--dry_run",
        action="store_true",
        help="openai: print one prompt and what all would cost; responses are sampled and kept",
    )
    task, args = tasks.parse(parser, "annotate")
    args.critic = args.critic or ("openai" if args.model or args.base_url else "rule")
    if args.critic == "openai" and not args.model:
        cli.fail("--model is missing: the annotator's name at the server")
    if args.severity and args.critic != "rule":
        cli.fail("--severity is for --critic rule")
    if args.dry_run and args.critic != "openai":
        cli.fail("--dry_run is for a model behind a server; the other critics cost nothing")
    if args.policy and args.responses:
        cli.fail(
            "--policy and --responses exclude each other: either a policy is sampled, or its responses are there"
        )
    if args.responses and Path(args.responses).is_dir():
        cli.fail(f"--responses {args.responses} is a folder; name a .jsonl file in it")
    if args.critic == "human" and not args.responses:
        cli.fail("--responses is missing: the file that people filled in")
    if args.budget is not None and not args.input_price + args.output_price:
        cli.fail("--budget needs --input_price and --output_price, the money for a million tokens")
    return task, args


def main():
    start = time.perf_counter()
    task, args = parse_args()
    out = Path(args.out or f"runs/{task.NAME}/annotations.jsonl")
    if args.responses and out.resolve() == Path(args.responses).resolve():
        cli.fail("--out is the file of --responses; choose another --out")
    if args.critic != "openai" and out.exists():
        cli.fail(f"{out} exists already; move it away or choose another --out")
    cli.make_folder(out.parent, "--out")
    if args.critic == "openai":
        return by_server(task, args, out)
    records = by_people(args) if args.critic == "human" else by_program(task, args, out)
    write_whole(out, records)
    print(f"annotations: {out}, {len(records)} records ({time.perf_counter() - start:.0f} s)")


# ---- responses ---------------------------------------------------------------------------------------------------------


def given(args) -> list[dict]:
    """The records of --responses, without what an earlier annotator wrote."""
    return [
        {name: value for name, value in r.items() if name not in WRITTEN}
        for r in read_responses(args.responses)
    ]


def sampled(task, args, out) -> tuple[list[tasks.Example], list[dict]]:
    """Examples of the task, and a record for each with a response that the policy samples."""
    stages.ensure(["sft"], args, out.parent, args.policy)
    torch.manual_seed(args.seed)
    tokenizer, model = policy.load(args.policy or out.parent / "sft", policy.device())
    examples = tasks.short_enough(task.load(args)[0], tokenizer, args.max_prompt_length)
    chosen = random.Random(args.seed).choices(examples, k=args.num_samples)
    sampling = dict(temperature=args.temperature, bf16=args.bf16)
    texts, _ = respond(
        model,
        tokenizer,
        [e.prompt for e in chosen],
        args.response_length,
        128,
        "sampling to annotate",
        **sampling,
    )
    return chosen, [
        {"id": str(n), "prompt": e.prompt, "response": text}
        for n, (e, text) in enumerate(zip(chosen, texts))
    ]


def examples_of(records, task, args) -> list[tasks.Example]:
    """The example of each record: one that the record itself holds, or else the task's, by its prompt."""
    read_example = getattr(task, "example_of_record", lambda record: None)
    examples = [read_example(record) for record in records]
    if all(examples):
        return examples
    known = {example.prompt: example for part in task.load(args) for example in part}
    for number, record in enumerate(records, 1):
        if record["prompt"] not in known:
            cli.fail(f"the prompt of record {number} is none of the task {args.task}, which is needed to judge its response; "
                     "see --task, --data and --seed")  # fmt: skip
    return [known[record["prompt"]] for record in records]


def with_test_logs(records, task, args) -> list[dict]:
    """The records with what their unit tests say, for the annotator to read, if the task has such tests and may run them."""
    if not hasattr(task, "test_log") or all("test_log" in record for record in records):
        return records
    if not getattr(args, "allow_code_execution", True):  # a flag of tasks that run programs
        print("without --allow_code_execution the annotator does not see what the unit tests say")
        return records
    pairs = tqdm(
        list(zip(examples_of(records, task, args), records)), desc="unit tests", unit="record"
    )
    return [
        {"test_log": task.test_log(example, record["response"]), **record}
        for example, record in pairs
    ]


# ---- critics -----------------------------------------------------------------------------------------------------------


def by_program(task, args, out) -> list[dict]:
    """The task's rule."""
    if args.responses:
        records = given(args)
        examples = examples_of(records, task, args)
    else:
        examples, records = sampled(task, args, out)
    for example, record in zip(examples, tqdm(records, desc="criticising", unit="record")):
        said = task.critique(example, record["response"])
        said = said if args.severity else said.plain()
        record |= {
            "critique": said.critique,
            "good_spans": said.good,
            "poor_spans": said.poor,
            "status": "ok",
            "reason": "",
        }
    return records


def by_people(args) -> list[dict]:
    """What people wrote into the records' own fields. Records that are not filled in yet are counted."""
    records, empty, faulty = [], 0, 0
    for number, record in enumerate(read_responses(args.responses), 1):
        if not record.get("critique"):
            empty += 1
            continue
        try:
            said = annotator.checked(
                {"good_spans": [], "poor_spans": [], **record}, record["response"]
            )
            check_kinds({**record, **said})
            records.append({**record, **said, "status": "ok", "reason": ""})
        except FeedbackError as fault:
            faulty += 1
            print(f"record {number} of {args.responses} is left out: {fault}")
    if not records:
        cli.fail(
            f"no record of {args.responses} is filled in as it should be: critique, good_spans and poor_spans"
        )
    if empty or faulty:
        print(
            f"{empty} records are not filled in yet and {faulty} have a fault; mend them, move --out away and call again"
        )
    return records


def by_server(task, args, out):
    """A model behind a server, record by record into --out; see t2g/annotator.py."""
    criteria = getattr(task, "CRITERIA", annotator.CRITERIA)
    client = None if args.dry_run else server.client(args.base_url, args.timeout, args.max_retries)
    records = given(args) if args.responses else samples_kept(task, args, out)
    if args.dry_run:
        todo = Notes(out).left(records, args.retry_failed) if out.exists() else records
        return dry_run(
            [
                annotator.question(r, criteria, args.max_spans)
                for r in with_test_logs(todo, task, args)
            ],
            args,
        )
    start = time.perf_counter()
    with writing(out), Notes(out) as notes:
        todo = with_test_logs(notes.left(records, args.retry_failed), task, args)
        spent = [
            sum(column) for column in zip((0, 0), *map(annotator.tokens_of, notes.records.values()))
        ]
        meter = server.Meter((args.input_price, args.output_price), args.budget, spent)
        bar = tqdm(
            total=len(records), initial=len(records) - len(todo), desc="annotating", unit="record"
        )

        def state():
            return f"{len(notes.failed)} failed, {meter.tokens[0]} + {meter.tokens[1]} tokens, {meter.money(meter.tokens):.4f} spent"

        def save(record):
            notes.add(record)
            bar.set_postfix_str(state(), refresh=False)
            bar.update()

        try:
            asyncio.run(
                annotator.annotate_all(
                    todo, save, annotator.Annotator(client, args, criteria, meter), args.concurrency
                )
            )
        except server.Stop as error:
            bar.close()
            cli.fail(
                f"{error}. The same command goes on from the {len(notes.records)} records in {out}"
            )
        except KeyboardInterrupt:
            bar.close()
            print(
                f"stopped; the same command goes on from the {len(notes.records)} records in {out}"
            )
            raise SystemExit(130) from None
        bar.close()
        print(
            f"annotations: {out}, {len(notes.records)} records, {state()} ({time.perf_counter() - start:.0f} s)"
        )
        if left := len(notes.left(records)):
            print(
                f"{left} records are left, for the next request could pass the budget; a larger --budget goes on from there"
            )
        if notes.failed:
            print("each failed record has its reason; --retry_failed asks again for them")


def samples_kept(task, args, out) -> list[dict]:
    """Sampled responses, in a file beside --out, so that an interrupted run goes on with the same ones."""
    path = out.with_suffix(".responses.jsonl")
    if path.exists():
        print(f"responses: {path} (sampled before; move it away to sample anew)")
        return read_responses(path)
    if out.exists():
        cli.fail(
            f"{out} exists already, without {path}, its responses; move it away or choose another --out"
        )
    _, records = sampled(task, args, out)
    write_whole(path, records)
    return records


def dry_run(questions, args):
    """One prompt in full, and what the whole would cost."""
    tokens = (
        sum(len(question.encode()) for question in questions) // 4,
        len(questions) * args.max_tokens,
    )
    money = server.Meter((args.input_price, args.output_price), None, (0, 0)).money(tokens)
    print("\n".join(questions[:1]))
    print(
        f"{len(questions)} records to ask for: about {tokens[0]} tokens of prompts (four bytes each) and at most {tokens[1]} of "
        f"answers (--max_tokens each), {money:.4f} at most where nothing must be asked again. Nothing was asked."
    )


if __name__ == "__main__":
    main()
