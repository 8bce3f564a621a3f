"""Stage 1: annotates responses with critiques and spans, by a program or a server.

python annotate.py                                        # the toy: 12000 samples and its rule
python annotate.py --task summarize --policy MODEL --data posts.jsonl --num_samples 500
python annotate.py --responses texts.jsonl --out notes.jsonl --model NAME \\
    --base_url http://localhost:8000/v1
python annotate.py --responses texts.jsonl --out notes.jsonl --model gpt-4o \\
    --input_price 2.5 --output_price 10 --budget 5        # OpenAI, with OPENAI_API_KEY

A line of --responses has {"id", "prompt", "response"}; other fields are kept. Without it, a policy
is sampled. A line of --out adds {"critique", "good_spans", "poor_spans", "status", "reason"}, and a
server's also "reasoning" and "usage". Status is "ok" or "failed"; of several lines with one id the
last one counts.

A server's records are written as they arrive. After a kill or Ctrl-C (exit code 130), the same
command annotates the records that are left; after a spent budget (exit code 0), raise --budget.
"""

import math
import random
from functools import partial
from pathlib import Path

from tqdm import tqdm

from t2g import annotator, cli, dist, policy, server, stages, tasks, torchrun
from t2g.critics import rule_critic
from t2g.notes import Notes, read_responses, write_whole
from t2g.rollout import respond_together


def parse_args():
    parser = cli.parser(__doc__)
    add = cli.flags(parser)
    tasks.add_flags(add)
    add("--responses", None, "records to annotate (default: samples of a policy)")
    add("--out", None, "the .jsonl file to write (default: runs/TASK/annotations.jsonl)")
    add("--critic", None, "default: openai with --model, otherwise rule", ("rule", "openai"))
    add("--policy", None, "run, folder, hub id or .gguf file to sample (default: sft beside --out)")
    add("--num_samples", 500, "responses to sample and annotate")
    add("--response_length", 64, "maximum tokens of a sampled response")
    add("--temperature", 1.0, "temperature of the policy")
    add("--severity", False, "rule: keep the severities of quotes")
    add("--model", None, "openai: name of the annotator on the server")
    add("--annotator_temperature", 0.3, "openai: temperature of the annotator", cli.between(0, 2))
    add("--max_tokens", 1024, "openai: maximum tokens of an answer")
    add("--max_spans", 2, "openai: maximum number of good quotes, and of poor ones")
    add("--base_url", None, "openai: server, such as http://localhost:8000/v1 (default: OpenAI)")
    add("--concurrency", 16, "openai: number of simultaneous requests")
    retries = "openai: maximum repetitions of a request or of an invalid answer"
    add("--max_retries", 5, retries, cli.between(0, 1000, int))
    add("--timeout", 120.0, "openai: seconds to wait for an answer")
    add("--input_price", 0.0, "openai: price of a million prompt tokens", cli.between(0, 1e9))
    add("--output_price", 0.0, "openai: price of a million answer tokens", cli.between(0, 1e9))
    add("--budget", math.inf, "openai: maximum price of the whole file --out")
    add("--retry_failed", False, "openai: ask again about the records that failed")
    task, args = tasks.parse(parser, "annotate")
    args.critic = args.critic or ("openai" if args.model or args.base_url else "rule")
    if args.critic == "openai" and not args.model:
        cli.fail("--critic openai needs --model, the name of the annotator on the server")
    if args.critic == "rule" and not hasattr(task, "critique"):
        cli.fail(f"the task {args.task} has no rule; name an annotator on a server by --model")
    if args.severity and args.critic != "rule":
        cli.fail("--severity needs --critic rule")
    if args.policy and args.responses:
        cli.fail("--policy and --responses exclude each other")
    if args.budget < math.inf and not args.input_price + args.output_price:
        cli.fail("--budget needs --input_price and --output_price")
    return task, args


@cli.friendly_errors()
def main():
    task, args = parse_args()
    if args.responses:
        dist.first_only()
    out = Path(args.out or f"runs/{task.NAME}/annotations.jsonl")
    if out.suffix == ".gz":
        cli.fail("--out is written line by line, not gzipped; choose a name that ends in .jsonl")
    if args.responses:
        cli.keep_input(out, args.responses, "--out")
    if out.exists() and not (args.critic == "openai" and out.is_file()):
        cli.fail(f"{out} exists already; move it away or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    annotate = annotate_by_server if args.critic == "openai" else annotate_by_rule
    annotate(task, args, out)


# ---- responses ---------------------------------------------------------------------------------
def sample_responses(task, args, out) -> tuple[list[tasks.Example], list[dict]]:
    """Returns examples of the task, and a record with a response of the policy to each."""
    earlier = partial(stages.ensure, ["sft"], args, out.parent, args.policy)
    with torchrun.session(run_first=earlier):
        tokenizer, model = policy.load(args.policy or out.parent / "sft", policy.device())
        examples = tasks.short_enough(tasks.load(task, args)[0], tokenizer, model, args)
        examples = random.Random(args.seed).choices(examples, k=args.num_samples)
        prompts, length = [example.prompt for example in examples], args.response_length
        options = dict(temperature=args.temperature, bf16=args.bf16, batch_size=128)
        texts, _ = respond_together(model, tokenizer, prompts, length, desc="sampling", **options)
    dist.first_only()
    records = []
    for number, (prompt, text) in enumerate(zip(prompts, texts)):
        records.append({"id": str(number), "prompt": prompt, "response": text})
    return examples, records


def examples_of(records, task, args) -> list[tasks.Example]:
    """Returns the example of each record: the record's own, or the task's with the same prompt."""
    read_example = getattr(task, "example_of_record", lambda record: None)
    examples = [read_example(record) for record in records]
    if all(examples):
        return examples
    known = {example.prompt: example for part in tasks.load(task, args) for example in part}
    for number, (record, example) in enumerate(zip(records, examples), 1):
        if not example and record["prompt"] not in known:
            problem = f"the prompt of record {number} does not occur in the task {args.task}"
            cli.fail(f"{problem}; check --task, --data and --seed")
    return [example or known[record["prompt"]] for record, example in zip(records, examples)]


def add_test_logs(records, task, args) -> list[dict]:
    """Adds the output of the unit tests, for the annotator, if the task has and may run them."""
    if not hasattr(task, "test_log") or all("test_log" in record for record in records):
        return records
    if not getattr(args, "allow_code_execution", True):  # a flag of tasks that run programs
        print("without --allow_code_execution the annotator does not see the unit tests' output")
        return records
    examples, logged = examples_of(records, task, args), []
    for example, record in zip(examples, tqdm(records, desc="unit tests", unit="record")):
        logged.append({"test_log": task.test_log(example, record["response"]), **record})
    return logged


# ---- critics -----------------------------------------------------------------------------------
def annotate_by_rule(task, args, out):
    if args.responses:
        records = read_responses(args.responses)
        examples = examples_of(records, task, args)
    else:
        examples, records = sample_responses(task, args, out)
    rule = rule_critic(task)
    for example, record in zip(examples, tqdm(records, desc="annotating", unit="record")):
        [feedback] = rule([example], [record["response"]])
        feedback = feedback if args.severity else feedback.plain()
        spans = {"good_spans": feedback.good, "poor_spans": feedback.poor}
        record |= {"critique": feedback.critique, **spans, "status": "ok", "reason": ""}
    write_whole(out, records)
    print(f"annotations: {out}, {len(records)} records")


def annotate_by_server(task, args, out):
    """Annotates responses by a model behind a server, and writes each record as it arrives."""
    server.client(args.base_url, args.timeout, args.max_retries)  # fails before sampling
    given = args.responses
    records = read_responses(given) if given else keep_responses(task, args, out)
    with Notes(out) as notes:
        spent = sum(map(annotator.tokens_of, notes.records.values()), server.Tokens())
        criteria = getattr(task, "CRITERIA", annotator.CRITERIA)
        asking = annotator.Annotator(args, criteria, spent)
        todo = add_test_logs(notes.left(records, args.retry_failed), task, args)
        bar = tqdm(total=len(records), initial=len(records) - len(todo), desc="annotating")

        def save(record):
            notes.add(record)
            bar.set_postfix_str(f"{annotator.price(asking.spent, args):.4f} spent", refresh=False)
            bar.update()

        try:
            with bar:
                asking.annotate_all(todo, save)
        except server.Stop as error:
            cli.fail(f"{error}; the same command continues from {out}")
        failed = sum(record["status"] == "failed" for record in notes.records.values())
        counts = f"{len(notes.records)} records, {failed} failed"
        cost = f"{sum(asking.spent)} tokens, {annotator.price(asking.spent, args):.4f} spent"
        print(f"annotations: {out}, {counts}, {cost}")
        if left := len(notes.left(records)):
            print(f"{left} records are left: the budget is reached; raise --budget to continue")
        if failed:
            print("--retry_failed asks again about failed records, each of which has a reason")


def keep_responses(task, args, out) -> list[dict]:
    """Samples responses into a file beside --out, where an interrupted run finds them again."""
    path = out.with_suffix(".responses.jsonl")
    if path.exists():
        dist.first_only()
        print(f"responses: {path} (sampled before; move it away to sample anew)")
        return read_responses(path)
    if out.exists():
        cli.fail(f"{out} exists without its responses {path}; move it away or change --out")
    _, records = sample_responses(task, args, out)
    write_whole(path, records)
    return records


if __name__ == "__main__":
    main()
