"""Grades submissions: points for each exercise, and one sentence about what is still wrong.

    python exercises/grade.py                    # exercises/stubs.py
    python exercises/grade.py students/*.py      # one line for each file

The last line is JSON: {file: {exercise: points}}. Each exercise of a file runs in a process of its
own, but with your rights: grade the files of strangers in a container.
"""

import argparse
import copy
import importlib.util
import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from checks import MISTAKES, RULES, SOLUTIONS


# ---- What is wrong with an answer --------------------------------------------------------------
def problem(part, answer, right, mask=None):
    """Says in words where a part of an answer differs from the right one; None if nowhere."""
    if isinstance(right, tuple):
        if not isinstance(answer, tuple) or len(answer) != 2:
            return "the answer must be a tuple of two values"
        place = part == "return"
        answer, right = answer[place], right[place]
    if part == "spans":
        return problem_of_spans(answer, right)
    if not isinstance(answer, torch.Tensor):
        return f"the {part} must be a tensor and is of type {type(answer).__name__}"
    if (answer.shape, answer.dtype) != (right.shape, right.dtype):
        wanted, given = (f"{x.dtype} of shape {list(x.shape)}" for x in (right, answer))
        return f"the {part} must be {wanted} and is {given}"
    is_wrong = ~torch.isclose(answer, right, rtol=1e-3, atol=1e-5)
    for place in (is_wrong if mask is None else is_wrong & mask).nonzero().tolist():
        where = ("", " of token {}", " of row {}, token {}")[len(place)].format(*place)
        answer, right = answer[tuple(place)].item(), right[tuple(place)].item()
        return f"the {part}{where} is {answer:.4g} and should be {right:.4g}"
    return None


def problem_of_spans(answer, right):
    spans = answer if isinstance(answer, list) else [None]
    if not all(isinstance(span, tuple) and len(span) == 3 for span in spans):
        return "the answer must be a list of tuples (start, end, score)"
    for span in [*answer, *right]:
        if answer.count(span) != right.count(span):
            return f"the span {tuple(span)} {'is missing' if span in right else 'should not be'}"
    return None


def ask(function, part, arguments):
    """Returns the answer of a function, or the gradient of its loss."""
    if part != "gradient":
        return function(*arguments)
    logprobs = arguments[0].requires_grad_()
    loss = function(*arguments)
    return torch.autograd.grad(loss, logprobs)[0] if loss.requires_grad else 0 * logprobs


def judge_case(name, function, rule, part, arguments):
    """Returns what is wrong with the answer of a function to one case, or None."""
    mask = None
    if part in ("advantage", "result", "padding"):
        mask = next(x for x in arguments if getattr(x, "dtype", None) == torch.bool)
        mask = ~mask if part == "padding" else mask
    own = copy.deepcopy(arguments)
    answer = ask(function, part, own)
    for number, (x, before) in enumerate(zip(own, arguments), start=1):
        if not (torch.equal(x, before) if torch.is_tensor(x) else x == before):
            return f"argument {number} of the function is changed in place"
    right = ask(SOLUTIONS[name], part, copy.deepcopy(arguments))
    detail = problem(part, answer, right, mask)
    if detail and not any(map(torch.is_tensor, arguments)):
        detail += f", for {', '.join(map(repr, arguments))}"
    for mistake, mistaken in MISTAKES[name] if detail else ():
        wrong = ask(mistaken, part, copy.deepcopy(arguments))
        if problem(part, wrong, right, mask) and not problem(part, answer, wrong, mask):
            return f"{mistake}: {detail}"
    return detail and f"it must hold that {rule}; but {detail}"


def judge(name, function, path=""):
    """Returns the points of a function, and one sentence about the first rule that it breaks."""
    points, sentence = 0, ""
    for rule, part, cases in RULES[name]:
        try:
            problems = (judge_case(name, function, rule, part, case) for case in cases)
            broken = next(filter(None, problems), "")
        except NotImplementedError:
            broken = "not written yet"
        except (Exception, SystemExit) as error:  # a submission may raise anything
            broken = raised(error, path)
        points += not broken
        sentence = sentence or broken
    return points, sentence


def raised(error, path):
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    where = f" in line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{where}: {' '.join(str(error).split())[:200]}"


# ---- Processes and points ----------------------------------------------------------------------
def judge_file(path, name, sender):
    """Sends a word when the imports are done, and then the points and the sentence."""
    torch.set_num_threads(1)
    path = os.path.abspath(path)
    sender.send("ready")
    for stream in (1, 2):  # hides what a submission prints
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    spec = importlib.util.spec_from_file_location("submission", path)
    module = sys.modules["submission"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        sender.send(judge(name, getattr(module, name), path))
    except (Exception, SystemExit) as error:  # a submission may raise anything
        sender.send((0, raised(error, path)))


def grade(path, name, seconds):
    """Returns (points, sentence) of an exercise, from a process that is killed after a time."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch"])
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=judge_file, args=(path, name, sender), daemon=True)
    process.start()
    sender.close()
    try:
        receiver.recv()
        if receiver.poll(seconds):
            return receiver.recv()
        return 0, f"it does not end within {seconds:g} seconds"
    except EOFError:
        return 0, "it exits the Python process"
    finally:
        process.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    stubs = os.path.relpath(Path(__file__).with_name("stubs.py"))
    parser.add_argument("files", nargs="*", default=[stubs], help="submissions (default: stubs.py)")
    parser.add_argument("--seconds", type=float, default=10, help="time for one exercise")
    args, scores = parser.parse_args(), {}
    if missing := [path for path in args.files if not Path(path).is_file()]:
        parser.error(f"there is no file {missing[0]}")
    for path in args.files:
        results = {name: grade(path, name, args.seconds) for name in RULES}
        scores[path] = {name: points for name, (points, _) in results.items()}
        if len(args.files) == 1:
            for name, (points, sentence) in results.items():
                print(f"{name:14}{points}/{len(RULES[name])}  {sentence}")
        points = "  ".join(f"{name} {points}" for name, points in scores[path].items())
        print(f"{path}  {sum(scores[path].values())}/{sum(map(len, RULES.values()))}  {points}")
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
