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
    first_position    share of verdicts, ties aside, for the response shown first; unbiased: 1/2

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
Two responses to the same prompt follow. Say which response is more useful to the person
who asked.

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
POINTS = {"A": 1.0, "tie": 0.5, "B": 0.0}  # of the response that is shown first


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
    path.resolve().parent.mkdir(parents=True, exist_ok=True)
    client = server.client(args.base_url, TIMEOUT_S, MAX_RETRIES)
    records = both_orders(read_answers(args.a), read_answers(args.b), args.judge)
    with Notes(path) as notes:
        try:
            ask_judge(client, notes.left(records), notes, args)
        except server.Stop as error:
            cli.fail(f"{error}. The same command resumes from the verdicts in {path}")
        verdicts = [notes.records.get(record["id"], {}).get("verdict") for record in records]
    win_rate, biases = rates(verdicts[::2], verdicts[1::2])
    benchmarks.report({"A": {"win_rate": win_rate}}, judge=args.judge, **biases)


def read_answers(path) -> dict[str, str]:
    """Returns {prompt: answer}."""
    rows = benchmarks.read_texts(path, "instruction", "output")
    answers = {row["instruction"]: row["output"] for row in rows}
    if len(answers) < len(rows):
        cli.fail(f"{path} answers a prompt twice; each prompt needs one answer")
    return answers


def both_orders(a, b, judge) -> list[dict]:
    """Returns two records for each shared prompt: one with A's answer first, one with B's."""
    shared, records = [prompt for prompt in a if prompt in b], []
    alone = len(a) + len(b) - 2 * len(shared)
    print(f"{len(shared)} prompts; {alone} that only one file answers are left out", flush=True)
    if not shared:
        cli.fail("the two files share no prompt")
    for prompt in shared:
        pair = [a[prompt], b[prompt]]
        for order, response in (("AB", pair), ("BA", pair[::-1])):
            name = f"{order} {judge} {prompt}"
            records.append({"id": name, "prompt": prompt, "response": response})
    return records


def ask_judge(client, records, notes, args):
    """Asks for the verdict on each record and adds the readable ones to notes."""
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
    verdicts = set(re.findall(r"\[\[(A|B|tie)\]\]", text))
    return verdicts.pop() if len(verdicts) == 1 else None


def rates(a_first, b_first) -> tuple[dict, dict]:
    """Returns the win rate of A, and the judge's biases, from the two verdicts on each prompt."""
    pairs = [pair for pair in zip(a_first, b_first) if all(pair)]
    if not pairs:
        cli.fail("no prompt has two readable verdicts; see --judge and --base_url")
    points = np.array([[POINTS[first], POINTS[second]] for first, second in pairs])
    scores = np.stack([points[:, 0], 1 - points[:, 1]])  # of A, in each order
    ties = points == POINTS["tie"]
    biases = {
        "prompts": len(pairs),
        "unreadable": [*a_first, *b_first].count(None),
        "ties": float(ties.mean()),
        "inconsistent": float((abs(scores[0] - scores[1]) == 1).mean()),
        "first_position": None if ties.all() else float(points[~ties].mean()),
    }
    return benchmarks.bootstrap(scores.mean(0)), biases


if __name__ == "__main__":
    main()
