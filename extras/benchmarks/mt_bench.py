"""MT-Bench: questions of two turns, each answer rated from 1 to 10 by a judge (Zheng et al. 2023, single-answer grading).

    python benchmark.py mt_bench MODEL ... --judge NAME --base_url http://localhost:8000/v1 --questions question.jsonl \\
        --references gpt-4.jsonl --judge_prompts judge_prompts.jsonl

The three files are FastChat's (fastchat/llm_judge/data). A model answers the first turn, then the second one with the first before
it, at FastChat's temperature for the category; --greedy takes the likeliest tokens. The judge sees the answer to the first turn
alone, that to the second one with all before it, and for mathematics, reasoning and coding also the reference answers.

Scores are means of ratings over both turns, over each turn and each category, with 95% intervals: a bootstrap over questions, for
the two turns of one are not independent. From the second model on, its difference to the first one is told, on the same draws.

Other than FastChat: a rating must stand in [[ ]], lie in 1 ... 10 and be the only one, or the judge is asked again; what stays
without one is counted and left out, where FastChat would average a -1. An answer that is cut off at --response_length is counted.
"""

import re
from itertools import groupby

import numpy as np
import torch
from tqdm import tqdm

from extras.benchmarks import judge
from t2g import cli, policy
from t2g.log import read_jsonl
from t2g.metrics import bootstrapped, mean_bootstrap, resamples
from t2g.policy import autocast, context_length

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "extraction": 0.0, "math": 0.0, "coding": 0.0,
                "reasoning": 0.0}  # fmt: skip
OTHER_TEMPERATURE = 0.7
WITH_REFERENCE = ("math", "reasoning", "coding")
PROMPTS = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
AGAIN = 'I find no single rating in that. Answer with one line and nothing else, such as: "Rating: [[5]]".'
BATCH = 16  # questions that are answered together


def add_flags(add):
    add("--questions", help='question.jsonl: lines of {"question_id", "category", "turns"}')
    add("--references", help='reference answers: lines of {"question_id", "choices": [{"turns"}]}')
    add(
        "--judge_prompts",
        help='judge_prompts.jsonl: lines of {"name", "system_prompt", "prompt_template"}',
    )
    add("--greedy", action="store_true", help="take the likeliest tokens, whatever the category")
    add("--response_length", type=cli.positive(int), default=1024, help="most tokens of an answer")
    judge.add_flags(add)


def run(args) -> dict:
    """{"scores": {model: {"overall", "turn_1", "turn_2", each category, "unreadable", "cut_off"}}, "differences": {model: figure},
    "judge"}; a figure is {"value", "low", "high"}."""
    if missing := [
        name for name in ("questions", "references", "judge_prompts") if not getattr(args, name)
    ]:
        cli.fail(
            f"--{missing[0]} is missing; the three files of MT-Bench lie in fastchat/llm_judge/data of FastChat"
        )
    if not args.models:
        cli.fail("mt_bench needs a model")
    path = judge.check(args, "mt_bench")
    questions, references = read_questions(args.questions), read_references(args.references)
    prompts = read_prompts(args.judge_prompts)
    if absent := [
        q["question_id"]
        for q in questions
        if q["category"] in WITH_REFERENCE and q["question_id"] not in references
    ]:
        cli.fail(
            f"{args.references} has no answer to question {absent[0]}, which is judged against one"
        )

    def asked(record):
        return judge_question(record, references.get(record["question_id"]), prompts)

    models, scores, overall = list(dict.fromkeys(args.models)), {}, {}
    weights = resamples(len(questions), args.seed)
    said = {model: answers(model, questions, args, path) for model in models}
    records = [
        record for model in models for record in ratings_wanted(model, questions, said[model])
    ]
    rated = iter(judge.verdicts(path, records, asked, read, AGAIN, args))
    for model in models:
        table = np.array(
            [[next(rated)["verdict"] for _ in range(2)] for _ in questions], dtype=float
        )  # None is nan
        found = figures(table, [q["category"] for q in questions], weights)
        overall[model] = found["overall"]
        scores[model] = {name: bootstrapped(values) for name, values in found.items()}
        scores[model]["unreadable"] = int(np.isnan(table).sum())
        scores[model]["cut_off"] = sum(sum(answer["cut_off"]) for answer in said[model])
    differences = {model: bootstrapped(overall[model] - overall[models[0]]) for model in models[1:]}
    report(scores, differences)
    return {"scores": scores, "differences": differences, "judge": args.judge}


# ---- FastChat's files ----------------------------------------------------------------------------------------------------


def read_questions(path) -> list[dict]:
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if (
            not isinstance(row.get("category"), str)
            or "question_id" not in row
            or not two_texts(row.get("turns"))
        ):
            cli.fail(f"line {number} of {path} needs question_id, category and two turns")
    if not rows or len({row["question_id"] for row in rows}) < len(rows):
        cli.fail(f"{path} holds no question, or a question_id twice")
    return rows


def read_references(path) -> dict:
    """{question_id: the two reference answers}."""
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        choices = row.get("choices")
        if (
            "question_id" not in row
            or not isinstance(choices, list)
            or not choices
            or not two_texts(choices[0].get("turns"))
        ):
            cli.fail(
                f"line {number} of {path} needs question_id and choices, the first of them with two turns"
            )
    return {row["question_id"]: row["choices"][0]["turns"] for row in rows}


def read_prompts(path) -> dict:
    rows = {row.get("name"): row for row in read_jsonl(path)}
    for name in PROMPTS:
        if not all(
            isinstance(rows.get(name, {}).get(field), str)
            for field in ("system_prompt", "prompt_template")
        ):
            cli.fail(f"{path} has no prompt {name} with a system_prompt and a prompt_template")
    return rows


def two_texts(turns) -> bool:
    return (
        isinstance(turns, list) and len(turns) == 2 and all(isinstance(turn, str) for turn in turns)
    )


# ---- answers -------------------------------------------------------------------------------------------------------------


def answers(name, questions, args, path) -> list[dict]:
    """A model's {"prompt": its two turns, "response": its two answers, "cut_off": whether each was} to each question."""

    def make():
        tokenizer, model = policy.load(name, policy.device())
        torch.manual_seed(args.seed)
        found = [
            {"prompt": question["turns"], "response": [], "cut_off": []} for question in questions
        ]
        temperatures = [
            0.0 if args.greedy else TEMPERATURES.get(q["category"], OTHER_TEMPERATURE)
            for q in questions
        ]
        for turn in range(2):
            chats = [chat(record, turn) for record in found]
            said = respond_to_chats(
                model, tokenizer, chats, temperatures, args, f"{name}, turn {turn + 1}"
            )
            for record, (text, cut_off) in zip(found, said):
                record["response"].append(text)
                record["cut_off"].append(cut_off)
        return found

    settings = {"response_length": args.response_length, "greedy": args.greedy, "seed": args.seed}
    return judge.kept(path, name, settings, [question["turns"] for question in questions], make)


def chat(record, turn) -> list[dict]:
    """The messages up to a turn's question, with the model's own answers between them."""
    said = [{"role": "user", "content": text} for text in record["prompt"][: turn + 1]]
    for i, text in enumerate(record["response"][:turn]):
        said.insert(2 * i + 1, {"role": "assistant", "content": text})
    return said


def respond_to_chats(model, tokenizer, chats, temperatures, args, desc) -> list[tuple[str, bool]]:
    """An answer to each chat at its temperature, and whether it was cut off, by --response_length or by the context.

    Chats of one temperature and of like length go together. Sampling is that of transformers, without top-k.
    """
    texts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for messages in chats
    ]
    order = sorted(range(len(texts)), key=lambda i: (temperatures[i], len(texts[i])))
    said, bar = {}, tqdm(total=len(texts), desc=desc, unit="answer")
    for t, same in groupby(order, key=temperatures.__getitem__):
        same = list(same)
        for index in (same[i : i + BATCH] for i in range(0, len(same), BATCH)):
            batch = tokenizer(
                [texts[i] for i in index],
                add_special_tokens=False,
                padding=True,
                return_tensors="pt",
            )
            length = batch["input_ids"].shape[1]
            room = min(args.response_length, context_length(model) - length)
            if room < 1:
                cli.fail(f"a question with what was said before has {length} tokens and leaves no room in the context of "
                         f"{context_length(model)}; allow shorter answers with --response_length")  # fmt: skip
            sampling = (
                {"do_sample": True, "temperature": t, "top_k": 0} if t else {"do_sample": False}
            )
            with torch.no_grad(), autocast(args.bf16):
                ids, mask = (
                    batch[name].to(model.device) for name in ("input_ids", "attention_mask")
                )
                out = model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=room, **sampling
                )
            for i, ids in zip(index, out[:, length:].tolist()):
                ended = not set(model.generation_config.eos_token_id).isdisjoint(ids)
                said[i] = tokenizer.decode(ids, skip_special_tokens=True).strip(), not ended
            bar.update(len(index))
    bar.close()
    return [said[i] for i in range(len(texts))]


# ---- ratings -------------------------------------------------------------------------------------------------------------


def ratings_wanted(model, questions, said) -> list[dict]:
    """A record for each turn of each question, with what was asked and answered up to it."""
    wanted = []
    for question, answer in zip(questions, said):
        for turn in (1, 2):
            name = f"{model} {question['question_id']} turn {turn}"
            known = {"question_id": question["question_id"], "category": question["category"]}
            wanted.append(
                {
                    "id": name,
                    **known,
                    "prompt": answer["prompt"][:turn],
                    "response": answer["response"][:turn],
                }
            )
    return wanted


def judge_question(record, reference, prompts) -> list[dict]:
    """The judge's own prompt for this turn and category, filled in."""
    asked, said, guided = record["prompt"], record["response"], record["category"] in WITH_REFERENCE
    name = ("single-math-v1" if guided else "single-v1") + (
        "-multi-turn" if len(asked) == 2 else ""
    )
    fields = {"question": asked[0], "answer": said[0]}
    fields |= {f"question_{i}": text for i, text in enumerate(asked, 1)} | {
        f"answer_{i}": text for i, text in enumerate(said, 1)
    }
    fields |= {f"ref_answer_{i}": text for i, text in enumerate(reference, 1)} if guided else {}
    try:
        text = prompts[name]["prompt_template"].format(**fields)
    except (LookupError, ValueError) as error:
        cli.fail(f"the prompt_template {name} of --judge_prompts cannot be filled in: {error}")
    return [
        {"role": "system", "content": prompts[name]["system_prompt"]},
        {"role": "user", "content": text},
    ]


def read(text: str) -> float | None:
    """The rating in a judge's answer, None unless there is exactly one, from 1 to 10.

    >>> read("Clear and right. Rating: [[8]]"), read("[[8]], or rather [[7]]"), read("Rating: 8"), read("[[11]]")
    (8.0, None, None, None)
    """
    found = set(map(float, re.findall(r"\[\[(\d+(?:\.\d+)?)\]\]", text)))
    return found.pop() if len(found) == 1 and 1 <= min(found) <= max(found) <= 10 else None


def figures(table, categories, weights) -> dict[str, np.ndarray]:
    """Means of the ratings (questions, 2) on each row of weights (draws, questions): overall, of each turn and of each category."""
    categories = np.array(categories)
    groups = {"overall": slice(None)} | {
        category: categories == category for category in dict.fromkeys(categories.tolist())
    }
    means = {
        name: mean_bootstrap(table[rows].ravel(), np.repeat(weights[:, rows], 2, axis=1))
        for name, rows in groups.items()
    }
    return means | {
        f"turn_{turn + 1}": mean_bootstrap(table[:, turn], weights) for turn in range(2)
    }


def report(scores, differences):
    for model, found in scores.items():
        print(f"\n{model}")
        for name, figure in found.items():
            print(f"  {name:12}" + (f"{figure:7}" if isinstance(figure, int) else in_words(figure)))
    for model, figure in differences.items():
        print(f"\n{model} less {next(iter(scores))}, overall: {in_words(figure)}")


def in_words(figure) -> str:
    return (
        "      -"
        if figure["value"] is None
        else "{value:7.2f}  [{low:.2f}, {high:.2f}]".format(**figure)
    )
