"""What the tests of the extras share."""

import json
import sys

import pytest


@pytest.fixture
def run_main(monkeypatch, capsys):
    """run_main(module, *arguments) runs a command that ends well or in one sentence.

    Returns the JSON object of its last line, None if there is none, and all that it printed.
    """

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        try:
            module.main()
        except SystemExit as stopped:
            assert stopped.code == 2
        out, err = capsys.readouterr()
        last = out.rstrip().rpartition("\n")[2]
        return json.loads(last) if last.startswith("{") else None, out + err

    return run
