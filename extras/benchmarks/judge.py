"""A model behind a server as the judge of responses: each verdict is a line of a file, and nothing is asked twice.

    records with a prompt and what was responded -> verdicts() -> the same with "verdict", None where none could be read

The asking is that of annotations: options that a server refuses are given up, the budget holds, and a server that falls silent
ends the run. An answer without a verdict is asked for again, at most max_retries times. A judge is another model than the
annotator whose feedback was learnt, for a policy may please the one that taught it.

Left out: what is asked, and what verdicts come to (t2g/benchmarks/win_rate.py and mt_bench.py).
"""

import asyncio
import hashlib
import json
from pathlib import Path

from tqdm import tqdm

from t2g import cli, server
from t2g.annotator import Annotator, annotate_all, finished, tokens_of
from t2g.log import read_jsonl
from t2g.notes import Notes, write_whole, writing
from t2g.server import OverBudget, added


def add_flags(add):
    add("--judge", help="the judge's name at the server")
    add(
        "--base_url",
        help="any server that speaks OpenAI's API, such as http://localhost:8000/v1; OpenAI if not given",
    )
    add(
        "--annotations",
        help="what the reward model learnt from: its annotator must not be the judge",
    )
    add(
        "--same_judge",
        action="store_true",
        help="let the annotator of --annotations judge all the same",
    )
    add(
        "--judge_tokens",
        type=cli.positive(int),
        default=2048,
        help="most tokens of a judge's answer",
    )
    add("--concurrency", type=cli.positive(int), default=16, help="requests at once")
    add(
        "--max_retries",
        type=cli.positive(int),
        default=5,
        help="how often a request is sent again, and a question put again",
    )
    add("--timeout", type=cli.positive(float), default=120.0, help="seconds to wait for an answer")
    add(
        "--input_price",
        type=cli.between(0, 1e9),
        default=0.0,
        help="money for a million tokens of prompts",
    )
    add(
        "--output_price",
        type=cli.between(0, 1e9),
        default=0.0,
        help="money for a million tokens of answers",
    )
    add(
        "--budget",
        type=cli.between(0, 1e9),
        help="stop before the verdicts cost more money than this, earlier runs included",
    )
    add(
        "--retry_failed",
        action="store_true",
        help="ask again for the verdicts that could not be read",
    )


def check(args, benchmark) -> Path:
    """The file of verdicts, beside --out. Ends the program with a sentence if the flags name no judge, or the annotator as it."""
    if not args.judge:
        cli.fail("--judge is missing: the judge's name at the server")
    if args.budget is not None and not args.input_price + args.output_price:
        cli.fail("--budget needs --input_price and --output_price, the money for a million tokens")
    path = Path(args.out or f"runs/{benchmark}/result.json").with_suffix(".verdicts.jsonl")
    cli.make_folder(path.parent, "--out")
    server.client(
        args.base_url, args.timeout, args.max_retries
    )  # a wrong address or a missing key shows now
    if not args.annotations:
        return path
    names = {
        record["annotator"]
        for record in read_jsonl(args.annotations)
        if isinstance(record.get("annotator"), str)
    }
    if not names:
        print(
            f"{args.annotations} does not say who annotated, so nobody can tell whether the judge did"
        )
    if short(args.judge) in map(short, names) and not args.same_judge:
        cli.fail(f"{args.judge} wrote {args.annotations}: it taught the policy that it would judge; choose another --judge, "
                 "or --same_judge if that is what you want")  # fmt: skip
    return path


def short(model: str) -> str:
    """A model's name without its owner: the same model may be gpt-4o here and openai/gpt-4o there."""
    return model.rpartition("/")[2].casefold()


class Judge(Annotator):
    """Asks for one verdict at a time; what it learns of the server it keeps for all the others."""

    def __init__(self, client, args, question, read, again, meter):
        self.client, self.meter, self.question, self.read, self.again = (
            client,
            meter,
            question,
            read,
            again,
        )
        self.max_retries, self.max_tokens = args.max_retries, args.judge_tokens
        self.options = {"model": args.judge, "max_tokens": args.judge_tokens, "temperature": 0}
        self.answered, self.silence = False, 0

    async def annotate(self, record) -> dict:
        """The record with its verdict, "ok" or "failed". Raises: Stop; OverBudget before anything of this record was paid."""
        opening, used, said, reason = self.question(record), (0, 0), "", ""
        messages = opening
        for _ in range(self.max_retries + 1):
            try:
                answer, paid = await self.ask(messages)
            except server.Unreadable as error:
                reason, used = str(error), added(used, self.most(messages))
                await asyncio.sleep(1)
                continue
            except server.NoAnswer as error:  # the client has asked again already
                reason = str(error)
                self.silence += used == (0, 0)
                break
            except OverBudget:
                if used == (0, 0):
                    raise
                reason = "the budget was reached before a verdict could be read"
                break
            used, said = added(used, paid), answer.text
            verdict = self.read(
                said.rpartition("</think>")[2]
            )  # some servers leave a model's own thoughts in
            if verdict is not None:
                return finished(record, {"verdict": verdict, "judgment": said}, used)
            reason = "no verdict can be read in the answer"
            again = {"role": "user", "content": self.again}
            messages = [*opening, {"role": "assistant", "content": said.strip() or "..."}, again]
        return finished(record, {"verdict": None, "judgment": said}, used, reason)


def verdicts(path, records, question, read, again, args) -> list[dict]:
    """The records with their verdicts, in order: from path where they stand there, else asked for and written there at once.

    Args: records, each with an id, a prompt and a response, of any kind; question(record), the messages that the judge gets;
        read(text), the verdict in an answer, None if there is none; again, what is said to the judge in that case.
    """
    records = [{**r, "judge": args.judge, "asked": digest(question(r))} for r in records]
    with writing(path), Notes(path) as notes:
        for record in records:
            there = notes.records.get(record["id"])
            if there and any(there.get(name) != record[name] for name in ("judge", "asked")):
                cli.fail(
                    f"{path} holds verdicts of another judge, or on other responses or questions; choose another --out"
                )
        todo = notes.left(records, args.retry_failed)
        spent = [sum(column) for column in zip((0, 0), *map(tokens_of, notes.records.values()))]
        meter = server.Meter((args.input_price, args.output_price), args.budget, spent)
        bar = tqdm(
            total=len(records),
            initial=len(records) - len(todo),
            desc=f"{args.judge} judges",
            unit="verdict",
        )

        def save(record):
            notes.add(record)
            bar.update()

        judge = Judge(
            server.client(args.base_url, args.timeout, args.max_retries),
            args,
            question,
            read,
            again,
            meter,
        )
        try:
            asyncio.run(annotate_all(todo, save, judge, args.concurrency))
        except server.Stop as error:
            bar.close()
            cli.fail(
                f"{error}. The same command goes on from the {len(notes.records)} verdicts in {path}"
            )
        except KeyboardInterrupt:
            bar.close()
            print(
                f"stopped; the same command goes on from the {len(notes.records)} verdicts in {path}"
            )
            raise SystemExit(130) from None
        bar.close()
        print(
            f"verdicts: {path}, {meter.tokens[0]} + {meter.tokens[1]} tokens, {meter.money(meter.tokens):.4f} spent"
        )
        if left := len(notes.left(records)):
            cli.fail(
                f"{left} verdicts are left, for the next request could pass the budget; a larger --budget goes on from there"
            )
        return [notes.records[record["id"]] for record in records]


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def kept(verdicts: Path, model: str, settings: dict, prompts: list, make) -> list[dict]:
    """What a model answered, in a file beside the verdicts, so that a run that goes on judges the same; make() if it is not there.

    make() returns a record for each prompt, with that "prompt". The file says how they were made, and serves no other settings.
    """
    path = verdicts.with_name(
        verdicts.name.replace(".verdicts.", f".{Path(model).name}-{digest(model)}.")
    )
    settings = {"model": model, **settings}
    if path.exists():
        print(
            f"answers: {path} (made before; move it away to have {model} answer anew)", flush=True
        )
    else:
        write_whole(path, [{**record, "settings": settings} for record in make()])
    records = read_jsonl(path)
    if [(record.get("prompt"), record.get("settings")) for record in records] != [
        (prompt, settings) for prompt in prompts
    ]:
        cli.fail(
            f"{path} holds answers to other prompts, or of other flags; move it away or choose another --out"
        )
    return records
