"""Asks a judge behind an OpenAI-compatible server which of two models answers better.

    python -m extras.benchmarks.win_rate A.json B.json --judge NAME \\
        --base_url http://localhost:8000/v1

A.json and B.json hold rows of {"instruction", "output"}, as extras.benchmarks.answers writes
them. For length-controlled rates against a published baseline, use alpaca_eval.

Each pair is judged in both orders. The score of a prompt is the mean of its two verdicts for A:
1 for a win, 1/2 for a tie, 0 for a loss.

    win_rate          mean score of the prompts
    ties              share of verdicts that are ties
    inconsistent      share of prompts whose two verdicts contradict each other
    first_position    share of the other verdicts that prefer the first response; unbiased: 1/2

Readable verdicts are kept in --out. The same command resumes, and asks again for the others.
Choose a judge that did not annotate the training data: a policy may please its own teacher.
"""

import asyncio
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from extras import benchmarks
from t2g import cli, data, server
from t2g.notes import Notes

QUESTION = """\
Two responses to the same prompt follow. Say which of them serves the one who asked better.

Weigh whether it does what was asked, whether it is true, and whether it is clear and complete.
A longer response is not better for its length, and which one stands first means nothing. Compare
them in a few sentences. Then end with a line that holds the verdict and nothing else: [[A]] if
response A is better, [[B]] if response B is, [[tie]] if neither is.

### Prompt
{prompt}

### Response A
{first}

### Response B
{second}
"""
SCORES = {("AB", "A"): 1, ("AB", "B"): 0, ("BA", "A"): 0, ("BA", "B"): 1}  # for model A


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("a", metavar="A", help="answers of model A")
    parser.add_argument("b", metavar="B", help="answers of model B")
    add = cli.flags(parser)
    add("--judge", None, "the judge's name on the server", required=True)
    add("--base_url", None, "address of the server; default: OpenAI")
    add("--out", "runs/win_rate/verdicts.jsonl", "file of the verdicts")
    add("--concurrency", 16, "requests at the same time")
    add("--max_retries", 5, "retries of a failed request")
    add("--timeout", 120.0, "seconds to wait for an answer")
    args = parser.parse_args()
    server.client(args.base_url, args.timeout, args.max_retries)  # fails early for a bad address
    records = both_orders(read_answers(args.a), read_answers(args.b), args.judge)
    if not records:
        cli.fail(f"{args.a} and {args.b} share no prompt")
    judged = judge_all(records, args)
    pairs = [pair for pair in zip(judged[::2], judged[1::2]) if all(r["verdict"] for r in pair)]
    if not pairs:
        cli.fail("no prompt has two readable verdicts; see --judge and --base_url")
    unreadable = sum(record["verdict"] is None for record in judged)
    benchmarks.report({"judge": args.judge, "unreadable": unreadable, **rates(pairs)})


def read_answers(path) -> dict[str, str]:
    """Returns {prompt: answer} of a file."""
    rows = data.read_rows(path)
    if not all({"instruction", "output"} <= row.keys() for row in rows):
        cli.fail(f"each row of {path} needs instruction and output")
    answers = {row["instruction"]: row["output"] for row in rows}
    if len(answers) < len(rows):
        cli.fail(f"{path} answers a prompt twice; each prompt needs one answer")
    return answers


def both_orders(a, b, judge) -> list[dict]:
    """Returns what is to be judged: of each shared prompt one record with A first, one with B."""
    shared, records = [prompt for prompt in a if prompt in b], []
    alone = len(a) + len(b) - 2 * len(shared)
    print(f"{len(shared)} prompts; {alone} that only one file answers are left out")
    for prompt in shared:
        for order, answers in (("AB", (a, b)), ("BA", (b, a))):
            response = [answer[prompt] for answer in answers]
            record = {"id": f"{order} {judge} {prompt}", "order": order, "prompt": prompt}
            records.append({**record, "response": response})
    return records


def judge_all(records, args) -> list[dict]:
    """Returns the records with their "verdict", None where the judge gave none."""
    path = Path(args.out)
    cli.make_folder(path.resolve().parent, "--out")
    with Notes(path) as notes:
        try:
            asyncio.run(ask_judge(notes.left(records), notes, args))
        except server.Stop as error:
            cli.fail(f"{error}. The same command resumes from the verdicts in {path}")
        return [{"verdict": None} | notes.records.get(r["id"], r) for r in records]


async def ask_judge(records, notes, args):
    """Asks for the verdict on each record and adds those that can be read to notes."""
    slots = asyncio.Semaphore(args.concurrency)
    bar = tqdm(total=len(records), desc=args.judge, unit="verdict")

    async def ask_one(record):
        first, second = record["response"]
        question = QUESTION.format(prompt=record["prompt"], first=first, second=second)
        request = {"model": args.judge, "messages": [{"role": "user", "content": question}]}
        async with slots:
            try:
                try:
                    answer = await server.ask(client, temperature=0, **request)
                except server.Refused:  # Some models take no temperature.
                    answer = await server.ask(client, **request)
            except server.NoAnswer as error:
                tqdm.write(f"no verdict: {error}")
                return
        if verdict := read_verdict(answer.text.rpartition("</think>")[2]):
            notes.add({**record, "verdict": verdict, "judgment": answer.text, "status": "ok"})
        bar.update()

    async with server.client(args.base_url, args.timeout, args.max_retries) as client:
        await asyncio.gather(*map(ask_one, records))
    bar.close()


def read_verdict(text: str) -> str | None:
    """Returns the verdict in a judge's answer, None unless there is exactly one.

    >>> read_verdict("A is wrong. [[B]]"), read_verdict("[[A]] or [[B]]?"), read_verdict("B")
    ('B', None, None)
    """
    found = set(re.findall(r"\[\[(A|B|tie)\]\]", text))
    return found.pop() if len(found) == 1 else None


def rates(pairs) -> dict:
    """Returns the win rate of A and the judge's biases, from pairs of judged records."""
    scores = np.array([[SCORES.get((r["order"], r["verdict"]), 0.5) for r in p] for p in pairs])
    verdicts = [record["verdict"] for pair in pairs for record in pair]
    decided = [verdict for verdict in verdicts if verdict != "tie"]
    return {
        "scores": {"A": {"win_rate": benchmarks.interval(scores.mean(1))}},
        "prompts": len(pairs),
        "ties": verdicts.count("tie") / len(verdicts),
        "inconsistent": float((abs(scores[:, 0] - scores[:, 1]) == 1).mean()),
        "first_position": decided.count("A") / len(decided) if decided else None,
    }


if __name__ == "__main__":
    main()
