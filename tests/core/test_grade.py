"""exercises/: right answers get full marks, the stubs none, and mistakes are named in words."""

import ast
import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXERCISES = Path(__file__).parents[2] / "exercises"
STUBS = (EXERCISES / "stubs.py").read_text(encoding="utf-8")
STUDENT = {  # a student's right answers, written otherwise than the project's
    "resolve": """
def resolve(text, feedback):
    spans = []
    for sign, quotes in ((1.0, feedback.good), (-1.0, feedback.poor)):
        for quote in sorted(set(quotes)):
            pattern = r"(?<!\\w)" + re.escape(quote.strip()) + r"(?!\\w)"
            places = [match.span() for match in re.finditer(pattern, text)]
            n = quotes.count(quote)
            for place in places[:n] if sign > 0 else places[-n:]:
                spans.append((*place, sign))
    return spans
""",
    "span_rewards": """
def span_rewards(offsets, spans):
    rewards = []
    for s, e in offsets:
        scores = [score for start, end, score in spans if s < e and start < e and s < end]
        rewards.append(min(scores, default=0.0))
    return torch.tensor(rewards, dtype=torch.float32)
""",
    "kl_penalty": """
def kl_penalty(logprobs, ref_logprobs, kind):
    x = (ref_logprobs - logprobs).exp()
    if kind == "full":
        return torch.where(logprobs.isfinite(), logprobs.exp() * -x.log(), 0).sum(-1)
    return {"k1": -x.log(), "k2": x.log() ** 2 / 2, "k3": x - 1 - x.log()}[kind]
""",
    "gae": """
def gae(rewards, values, mask, gamma, lam):
    advantages, V, A = torch.zeros_like(rewards), 0, 0
    for t in range(rewards.shape[1] - 1, -1, -1):
        inside = mask[:, t].float()
        A = (rewards[:, t] + gamma * V - values[:, t] + gamma * lam * A) * inside
        V = values[:, t] * inside
        advantages[:, t] = A
    return advantages, (advantages + values) * mask
""",
    "whiten": """
def whiten(x, mask):
    n = mask.sum()
    mean = (x * mask).sum() / n
    variance = ((x - mean) ** 2 * mask).sum() / n
    return (x - mean) / (variance + 1e-8).sqrt() * mask
""",
    "policy_loss": """
def policy_loss(logprobs, old_logprobs, advantages, mask, cliprange):
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    gain = torch.min(ratio * advantages, clipped * advantages)
    return -(gain * mask).sum() / mask.sum()
""",
}
MISTAKES = [  # exercise, what is replaced by what, words of the sentence
    ("resolve", "places[:n] if sign > 0 else places[-n:]", "places", "every place of a quote"),
    ("resolve", "places[:n] if sign > 0 else places[-n:]", "places[:n]", "poor quotes .* first"),
    ("resolve", "n = quotes.count(quote)", "n = 1", "k times"),
    ("resolve", "quote.strip()", "quote", "white space"),
    ("resolve", r'r"(?<!\w)" + ', "", "cuts a word"),
    ("resolve", "return spans", "return tuple(spans)", "a list of tuples"),
    ("resolve", "return spans", "return spans or [(-1, 3, 1.0)]", r"span \(-1, 3, 1.0\) should not"),
    ("span_rewards", "start < e and s < end", "start <= s and e <= end", "one character is enough"),
    ("span_rewards", "start < e and s < end", "start <= e and s <= end", "its tokens alone"),
    ("span_rewards", "s < e and ", "", "without characters.* of token 1 is 1 and should be 0"),
    ("span_rewards", "min(scores, default=0.0)", "sum(scores)", "scores are added"),
    ("span_rewards", "min(scores, default=0.0)", "max(scores, default=0.0)", "the lowest score"),
    ("span_rewards", "min(scores, default=0.0)", "min([*scores, 0.0])", "praise is lost"),
    ("span_rewards", "min(scores, default=0.0)", "[0.0, *scores][-1]", "the lowest score"),
    ("span_rewards", ", dtype=torch.float32", ", dtype=torch.float64", "torch.float32 of shape"),
    ("kl_penalty", "x - 1 - x.log()", "x - 1 + x.log()", "sign of log x"),
    ("kl_penalty", "x - 1 - x.log()", "1 / x - 1 + x.log()", "pi_ref are swapped"),
    ("kl_penalty", "ref_logprobs - logprobs", "logprobs - ref_logprobs", "sign of log x"),
    ("kl_penalty", "logprobs.isfinite()", "x > 0", "log pi = -inf adds 0.* is nan"),
    ("gae", ".float()", ".float() * 0 + 1", "cross the end .* mask is ignored: .* row 1, token 0"),
    ("gae", "V = values[:, t] * inside", "V = values[:, t]", "V of the padding"),
    ("gae", "gamma, lam):", "lam, gamma):", "gamma and lam are swapped"),
    ("gae", "advantages + values", "advantages", r"returns are A \+ V"),
    ("gae", "inside = ", "rewards *= mask; inside = ", "argument 1 of .* in place"),
    ("gae", "return advantages, ", "return ", "a tuple of two"),
    ("whiten", "n = mask.sum()", "mask = mask | True; n = mask.sum()", "padding is in the mean"),
    ("whiten", "n = mask.sum()", "n = x.numel(); x = x * mask", "under the mask"),
    ("whiten", "* mask).sum() / n\n    return", "* mask).sum() / (n - 1)\n    return", "by n - 1"),
    ("whiten", "(variance + 1e-8)", "variance", "same everywhere .* is nan"),
    ("whiten", ".sqrt() * mask", ".sqrt()", "0 off the mask"),
    ("policy_loss", "torch.min", "torch.max", "min and max are swapped"),
    ("policy_loss", "-(gain * mask).sum() / mask.sum()",
     "-((gain * mask).sum(1) / mask.sum(1)).mean()", "mean over the means"),
    ("policy_loss", "-(gain * mask).sum() / mask.sum()", "-gain.mean()", "padding is counted"),
    ("policy_loss", "-(gain", "(gain", "sign is wrong"),
    ("policy_loss", "clipped = ratio.clamp(1 - cliprange, 1 + cliprange)", "clipped = ratio",
     "nothing is clipped"),
    ("policy_loss", "ratio = (logprobs", "ratio = (logprobs.detach()", "has a gradient"),
    ("policy_loss", "gain = ", "return policy_loss(logprobs, 0, 0, mask, 0); gain = ", "Recursion"),
]  # fmt: skip


@pytest.fixture(scope="module")
def grade():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXERCISES)
        import grade

        yield grade


def defined(source, name):
    scope = {}
    exec(f"import re, torch\n{source}", scope)
    return scope[name]


@pytest.mark.parametrize("name", STUDENT)
def test_right_answers_get_full_marks(grade, name):
    for function in (grade.SOLUTIONS[name], defined(STUDENT[name], name)):
        assert grade.judge(name, function) == (len(grade.RULES[name]), "")


@pytest.mark.parametrize(("name", "right", "wrong", "words"), MISTAKES)
def test_a_mistake_costs_points_and_is_named(grade, name, right, wrong, words):
    assert right in STUDENT[name]
    points, sentence = grade.judge(name, defined(STUDENT[name].replace(right, wrong), name))
    assert points < len(grade.RULES[name])
    assert re.search(words, sentence), sentence


def test_what_is_not_written_yet_costs_its_own_points_alone(grade):
    full = "return torch.where(logprobs.isfinite(), logprobs.exp() * -x.log(), 0).sum(-1)"
    source = STUDENT["kl_penalty"].replace(full, "raise NotImplementedError")
    points, sentence = grade.judge("kl_penalty", defined(source, "kl_penalty"))
    assert 0 < points < len(grade.RULES["kl_penalty"]) and sentence == "not written yet"


def test_the_stubs_hold_no_solution_and_their_examples_are_right(grade):
    functions = [f for f in ast.parse(STUBS).body if isinstance(f, ast.FunctionDef)]
    assert [f.name for f in functions] == list(grade.RULES) == list(STUDENT)
    for function in functions:
        (_, stop), name = function.body, function.name
        assert isinstance(stop, ast.Raise)
        scope = {"torch": torch, name: defined(STUDENT[name], name)}
        examples = ast.get_docstring(function)
        test = doctest.DocTestParser().get_doctest(examples, scope, name, None, 0)
        assert test.examples and doctest.DocTestRunner().run(test).failed == 0


def test_files_are_graded_in_processes_that_may_do_anything(tmp_path):
    wild = f"""
import os, sys, time, torch
print("noise")
def resolve(text, feedback): time.sleep(1000)
def span_rewards(offsets, spans): os._exit(0)
def kl_penalty(*arguments): sys.exit("enough")
def whiten(x, mask):
    return x.nothing
{STUDENT["gae"]}
"""
    (tmp_path / "wild.py").write_text(wild)
    (tmp_path / "broken.py").write_text("def gae(:")

    def graded(*files):
        command = [sys.executable, EXERCISES / "grade.py", "--seconds", "3", *files]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0 and "noise" not in done.stdout + done.stderr, done.stderr
        *lines, last = done.stdout.splitlines()
        return lines, json.loads(last)

    (*lines, total), points = graded("wild.py")
    assert [line.split(maxsplit=1)[1] for line in lines] == [
        "0/6  it does not end within 3 seconds",
        "0/4  it exits the Python process",
        "0/5  SystemExit in line 6: enough",
        "5/5  ",
        "0/4  AttributeError in line 8: 'Tensor' object has no attribute 'nothing'",
        "0/4  AttributeError: module 'submission' has no attribute 'policy_loss'",
    ]
    assert total.startswith("wild.py  5/28") and points["wild.py"]["gae"] == 5
    lines, points = graded(EXERCISES / "stubs.py", "broken.py")
    assert len(lines) == len(points) == 2 and not any(points["broken.py"].values())
