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

import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from extras import benchmarks
from t2g import cli, server
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
MAX_RETRIES, TIMEOUT_S = 5, 120
MAX_FAILURES = 10  # requests in succession without an answer: then the server is at fault


@cli.friendly_errors()
def main():
    parser = cli.parser(__doc__)
    parser.add_argument("a", metavar="A", help="answers of model A")
    parser.add_argument("b", metavar="B", help="answers of model B")
    parser.add_argument("--judge", required=True, help="the judge's name on the server")
    add = cli.flags(parser)
    add("--base_url", None, "address of the server; OpenAI's if not given")
    add("--out", "runs/win_rate/verdicts.jsonl", "file of the verdicts")
    add("--concurrency", 16, "requests at the same time")
    args = parser.parse_args()
    path = Path(args.out)
    cli.make_folder(path.resolve().parent, "--out")
    server.client(args.base_url, TIMEOUT_S, MAX_RETRIES)  # fails early for a bad address
    records = both_orders(read_answers(args.a), read_answers(args.b), args.judge)
    with Notes(path) as notes:
        try:
            ask_judge(notes.left(records), notes, args)
        except server.Stop as error:
            cli.fail(f"{error}. The same command resumes from the verdicts in {path}")
        verdicts = [notes.records.get(record["id"], {}).get("verdict") for record in records]
    benchmarks.report({"judge": args.judge, **rates(verdicts[::2], verdicts[1::2])})


def read_answers(path) -> dict[str, str]:
    """Returns {prompt: answer} of a file."""
    rows = benchmarks.read_texts(path, "instruction", "output")
    answers = {row["instruction"]: row["output"] for row in rows}
    if len(answers) < len(rows):
        cli.fail(f"{path} answers a prompt twice; each prompt needs one answer")
    return answers


def both_orders(a, b, judge) -> list[dict]:
    """Returns what is to be judged: of each shared prompt one record with A first, one with B."""
    shared, records = [prompt for prompt in a if prompt in b], []
    alone = len(a) + len(b) - 2 * len(shared)
    print(f"{len(shared)} prompts; {alone} that only one file answers are left out", flush=True)
    if not shared:
        cli.fail("the two files share no prompt")
    for prompt in shared:
        for order, answers in (("AB", (a, b)), ("BA", (b, a))):
            response = [answer[prompt] for answer in answers]
            name = f"{order} {judge} {prompt}"
            records.append({"id": name, "prompt": prompt, "response": response})
    return records


def ask_judge(records, notes, args):
    """Asks for the verdict on each record and adds those that can be read to notes."""
    client = server.client(args.base_url, TIMEOUT_S, MAX_RETRIES)
    bar, failures = tqdm(total=len(records), desc=args.judge, unit="verdict"), []

    async def ask_one(record):
        first, second = record["response"]
        question = QUESTION.format(prompt=record["prompt"], first=first, second=second)
        request = {"model": args.judge, "messages": [{"role": "user", "content": question}]}
        try:
            try:
                answer = await server.ask(client, temperature=0, **request)
            except server.Refused:  # Some models take no temperature.
                answer = await server.ask(client, **request)
        except server.NoAnswer as error:
            failures.append(error)
            if len(failures) >= MAX_FAILURES:
                raise server.Stop(f"{error}, {len(failures)} times in succession") from None
            return
        failures.clear()
        if verdict := read_verdict((answer.text or "").rpartition("</think>")[2]):
            notes.add({**record, "verdict": verdict, "judgment": answer.text, "status": "ok"})
        bar.update()

    with bar:
        server.ask_all(client, records, ask_one, args.concurrency)


def read_verdict(text: str) -> str | None:
    """Returns the verdict in a judge's answer, None unless there is exactly one.

    >>> read_verdict("A is wrong. [[B]]"), read_verdict("[[A]] or [[B]]?"), read_verdict("B")
    ('B', None, None)
    """
    found = set(re.findall(r"\[\[(A|B|tie)\]\]", text))
    return found.pop() if len(found) == 1 else None


def rates(a_first, b_first) -> dict:
    """Returns the win rate of A and the judge's biases, from each prompt's verdict per order."""
    pairs = [pair for pair in zip(a_first, b_first) if all(pair)]
    if not pairs:
        cli.fail("no prompt has two readable verdicts; see --judge and --base_url")
    points = {"A": 1.0, "B": 0.0, "tie": 0.5}
    scores = np.array([[points[first], 1 - points[second]] for first, second in pairs])
    verdicts = [verdict for pair in pairs for verdict in pair]
    decided = [verdict for verdict in verdicts if verdict != "tie"]
    return {
        "scores": {"A": {"win_rate": benchmarks.interval(scores.mean(1))}},
        "prompts": len(pairs),
        "unreadable": [*a_first, *b_first].count(None),
        "ties": verdicts.count("tie") / len(verdicts),
        "inconsistent": float((abs(scores[:, 0] - scores[:, 1]) == 1).mean()),
        "first_position": decided.count("A") / len(decided) if decided else None,
    }


if __name__ == "__main__":
    main()
