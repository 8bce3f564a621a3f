"""Text2Grad in plain PyTorch: critique -> quoted spans -> token rewards -> PPO.

Read feedback, align and ppo, which know no model, no file and no network, then ../train_ppo.py.
README.md has a map of the rest.
"""

import sys


def end_quietly(kind, error, traceback):
    """Ends a script without a traceback on Ctrl-C, also while its imports take seconds."""
    if kind is not KeyboardInterrupt or hasattr(sys, "ps1"):  # Python's prompt, which goes on
        return sys.__excepthook__(kind, error, traceback)
    print("\ninterrupted", file=sys.stderr)
    raise SystemExit(130)


sys.excepthook = end_quietly
