"""Text2Grad in plain PyTorch: critique -> quoted spans -> token rewards -> PPO.

    feedback, align, ppo          the idea and the maths: no model, no file, no network
    policy, rollout, critics      a model and its log-probabilities; sampling; feedback
    supervised, annotator         the one supervised loop; annotation by any OpenAI-like server
    dist, checkpoint              many processes as one; resuming a killed run
    data, log, cli, page          rows of data; metrics; flags and errors; the page of a run
    tasks                         toy, summarize, qa: prompts, scores and rules

Read feedback, align, ppo, then ../train_ppo.py.
"""

import sys


def end_quietly(kind, error, traceback):
    """Ends a script without a traceback on Ctrl-C, also while its imports take seconds."""
    if kind is not KeyboardInterrupt or hasattr(sys, "ps1"):  # Python's prompt, which goes on
        return sys.__excepthook__(kind, error, traceback)
    print("\ninterrupted", file=sys.stderr)
    raise SystemExit(130)


sys.excepthook = end_quietly
