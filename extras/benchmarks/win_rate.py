"""How often a judge prefers the responses of A to those of B, with and without what length explains.

    python benchmark.py win_rate runs/qa/ppo runs/qa/ppo_scalar --task qa --data FILE --judge NAME --base_url http://localhost:8000/v1
    python benchmark.py win_rate A.jsonl B.jsonl --judge NAME       # responses that exist: lines of {"prompt", "response"}

Each pair is judged in both orders. An item's score is the mean of its two verdicts for A, 1 for a win, 1/2 for a tie, 0 for a
defeat; so two verdicts that follow the order and not the response make 1/2. An item with a verdict that could not be read does
not count.

    win_rate            mean of the items' scores
    length_controlled   the same were both responses equally long: y = sigma(a + b x) is fitted to the items' scores y, with
                        x = tanh(d / sd(d)) and d = len(A) - len(B) in characters, and sigma(a) is told
    ties, inconsistent, first_position    share of ties among the verdicts; share of items in which each order names another
                        winner; share of the verdicts that are no tie which go to the response that stands first, 1/2 without bias
    unreadable          verdicts that could not be read, after all that the judge was asked again

The length-controlled rate is in the spirit of AlpacaEval 2 (Dubois et al. 2024) and not the same number: there, a term for the
difficulty of each prompt, known from many models, stands in the exponent too, the slope is held by verbose and concise answers of
the baseline and by an L1 penalty that cross-validation chooses, each pair is judged in one order, at random, and prompts, baseline
and judge are fixed. Here no such term stands, the penalty is b^2 / 8 (a prior of b ~ N(0, 2^2)), and both orders are judged. It
pulls the rate a little back to the raw one where length decides all, and where one side is longer nearly everywhere, no fit can
tell length from quality.
"""

import re

import numpy as np
import torch

from extras.benchmarks import judge
from t2g import cli, policy, tasks
from t2g.log import read_jsonl
from t2g.metrics import bootstrapped, mean_bootstrap, resamples
from t2g.respond import respond

QUESTION = """\
Two responses to the same prompt follow. Say which of them serves the one who asked better.

Weigh whether it does what was asked, whether it is true, and whether it is clear and complete. A longer response is not better for
its length, and which one stands first means nothing. Compare them in a few sentences. Then end with a line that holds the verdict
and nothing else: [[A]] if response A is better, [[B]] if response B is, [[tie]] if neither is.

### Prompt
{prompt}

### Response A
{first}

### Response B
{second}
"""
AGAIN = "I find no single verdict in that. Answer with one line and nothing else: [[A]], [[B]] or [[tie]]."
VERDICTS = {"A": "first", "B": "second", "tie": "tie"}
SCORES = {
    ("AB", "first"): 1.0,
    ("AB", "second"): 0.0,
    ("BA", "first"): 0.0,
    ("BA", "second"): 1.0,
}  # for A; a tie is 1/2


def add_flags(add):
    tasks.add_flags(add)
    add(
        "--response_length",
        type=cli.positive(int),
        help="most tokens of a response; the task's own if not given",
    )
    add(
        "--eval_samples",
        type=cli.positive(int),
        default=500,
        help="held-out prompts, if no file brings its own",
    )
    add(
        "--temperature",
        type=cli.between(0, 2),
        default=0.0,
        help="the models' sampling temperature; 0 takes the likeliest token",
    )
    judge.add_flags(add)


def run(args) -> dict:
    """{"win_rate", "length_controlled": {"value", "low", "high"}, "items", "ties", "inconsistent", "first_position", "unreadable",
    "characters": [of A, of B], "judge"}."""
    if len(args.models) != 2:
        cli.fail("win_rate compares two, each a model or a .jsonl file of responses")
    path = judge.check(args, "win_rate")
    pairs = responses(args, path)
    records = [
        {
            "id": f"{judge.digest(prompt)} {order}",
            "prompt": prompt,
            "response": [a, b] if order == "AB" else [b, a],
            "order": order,
        }
        for prompt, (a, b) in pairs.items()
        for order in ("AB", "BA")
    ]
    said = judge.verdicts(path, records, question, read, AGAIN, args)
    result = {**rates(list(pairs.values()), said, args.seed), "judge": args.judge}
    report(result, args.models)
    return result


def question(record) -> list[dict]:
    first, second = record["response"]
    return [
        {
            "role": "user",
            "content": QUESTION.format(prompt=record["prompt"], first=first, second=second),
        }
    ]


def read(text: str) -> str | None:
    """The verdict in a judge's answer, None unless there is exactly one.

    >>> read("A is wrong. [[B]]"), read("[[A]] or [[B]]?"), read("B")
    ('second', None, None)
    """
    found = set(re.findall(r"\[\[(A|B|tie)\]\]", text))
    return VERDICTS[found.pop()] if len(found) == 1 else None


# ---- responses -----------------------------------------------------------------------------------------------------------


def responses(args, path) -> dict[str, tuple[str, str]]:
    """{prompt: (A's response, B's)}. Prompts are those that the files share, or else held-out ones of the task."""
    files = {name: of_file(name) for name in args.models if name.endswith(".jsonl")}
    if files:
        prompts = [
            prompt
            for prompt in next(iter(files.values()))
            if all(prompt in found for found in files.values())
        ]
        alone = len(set().union(*files.values())) - len(prompts)
        if not prompts:
            cli.fail(f"{' and '.join(files)} share no prompt")
        if alone:
            print(f"{alone} prompts stand in one file only and are left out")
    else:
        tokenizer, _ = policy.load(args.models[0])
        examples = tasks.short_enough(
            tasks.load_task(args.task).load(args)[1], tokenizer, args.max_prompt_length
        )
        prompts = [example.prompt for example in examples[: args.eval_samples]]
    a, b = (files.get(name) or of_model(name, prompts, args, path) for name in args.models)
    return {prompt: (a[prompt], b[prompt]) for prompt in prompts}


def of_file(path) -> dict[str, str]:
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row.get(name), str) for name in ("prompt", "response")):
            cli.fail(f"line {number} of {path} needs the texts prompt and response")
        if re.search("[\ud800-\udfff]", row["prompt"] + row["response"]):
            cli.fail(
                f"line {number} of {path} holds half of a surrogate pair, which is no text; mend it or leave it out"
            )
    found = {row["prompt"]: row["response"] for row in rows}
    if len(found) < len(rows):
        cli.fail(f"{path} answers a prompt twice; each prompt needs one response")
    return found


def of_model(name, prompts, args, path) -> dict[str, str]:
    defaults = getattr(tasks.load_task(args.task), "DEFAULTS", {}).get("eval", {})
    length = args.response_length or defaults.get("response_length", 64)

    def make():
        tokenizer, model = policy.load(name, policy.device())
        generator = torch.Generator(model.device).manual_seed(args.seed)
        sampling = dict(temperature=args.temperature, bf16=args.bf16, generator=generator)
        texts, _ = respond(model, tokenizer, prompts, length, desc=f"{name} answers", **sampling)
        return [{"prompt": prompt, "response": text} for prompt, text in zip(prompts, texts)]

    settings = {"response_length": length, "temperature": args.temperature, "seed": args.seed}
    return {
        row["prompt"]: row["response"] for row in judge.kept(path, name, settings, prompts, make)
    }


# ---- verdicts ------------------------------------------------------------------------------------------------------------


def rates(pairs, said, seed=0) -> dict:
    """What verdicts come to. pairs: (A's response, B's) of each item; said: the two records of each, first AB and then BA."""
    both = list(zip(said[::2], said[1::2], strict=True))
    there = [i for i, two in enumerate(both) if all(record["verdict"] for record in two)]
    if not there:
        cli.fail(
            "not one pair of verdicts could be read; see the judgments in the file of verdicts"
        )
    orders = np.array([[score(record) for record in both[i]] for i in there])
    scores, weights = orders.mean(1), resamples(len(there), seed)
    decided = [record["verdict"] for record in said if record["verdict"] in ("first", "second")]
    lengths = np.array([[len(text) for text in pairs[i]] for i in there], dtype=float)
    return {
        "win_rate": bootstrapped(mean_bootstrap(scores, weights)),
        "length_controlled": bootstrapped(
            length_controlled(scores, lengths[:, 0] - lengths[:, 1], weights)
        ),
        "items": len(there),
        "ties": float((orders == 0.5).mean()),
        "inconsistent": float((np.abs(orders[:, 0] - orders[:, 1]) == 1).mean()),
        "first_position": decided.count("first") / len(decided) if decided else None,
        "unreadable": sum(record["verdict"] is None for record in said),
        "characters": lengths.mean(0).tolist(),
    }


def score(record) -> float:
    """What a verdict says for A."""
    return SCORES.get((record["order"], record["verdict"]), 0.5)


def length_controlled(scores, longer, weights) -> np.ndarray:
    """sigma(a) on each row of weights: the win rate of A were both responses equally long.

        min over a, b of  sum_i w_i (log(1 + exp(z_i)) - y_i z_i) + b^2 / 8,    z_i = a + b tanh(d_i / sd(d))

    Args: scores (n,), y of each item in [0, 1]; longer (n,), d in characters; weights (draws, n). Without a spread of d, it is
    the win rate itself.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    if len(set(longer)) < 2:
        return mean_bootstrap(scores, weights)
    x = np.tanh(longer / longer.std(ddof=1))

    def loss(ab, w):
        z = ab[0] + ab[1] * x
        slope = w * (expit(z) - scores)
        return w @ (np.logaddexp(0, z) - scores * z) + ab[1] ** 2 / 8, np.array(
            [slope.sum(), slope @ x + ab[1] / 4]
        )

    fits = [minimize(loss, np.zeros(2), (w,), jac=True, method="L-BFGS-B").x[0] for w in weights]
    return expit(fits)


def report(result, models):
    print(
        f"\n{models[0]} against {models[1]}, {result['items']} prompts, both orders, judged by {result['judge']}"
    )
    for name in ("win_rate", "length_controlled"):
        print(f"  {name:18}" + "{value:7.3f}  [{low:.3f}, {high:.3f}]".format(**result[name]))
    for name in ("ties", "inconsistent", "first_position"):
        print(f"  {name:18}" + ("      -" if result[name] is None else f"{result[name]:7.3f}"))
    print(
        f"  {'characters':18}{result['characters'][0]:7.0f}  against {result['characters'][1]:.0f}"
    )
    if result["unreadable"]:
        print(
            f"{result['unreadable']} verdicts could not be read: their items do not count; --retry_failed asks again"
        )
