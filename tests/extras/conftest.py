"""What the tests of the extras share."""

import json
import os
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def public_data():
    """public_data(name) is a published file in the folder PUBLIC_DATA; the test skips without it."""

    def path_of(name):
        path = Path(os.environ.get("PUBLIC_DATA", "public_data"), name)
        if not path.is_file():
            pytest.skip(f"{path} is not here; the variable PUBLIC_DATA names its folder")
        return path

    return path_of


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
