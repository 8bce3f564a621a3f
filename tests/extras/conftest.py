"""What the tests of the extras share."""

import os
import time
from pathlib import Path

import pytest

from extras.code import sandbox


@pytest.fixture(scope="session")
def public_data():
    """public_data(name) is a published file in the folder PUBLIC_DATA; the test skips without it."""

    def path_of(name):
        path = Path(os.environ.get("PUBLIC_DATA", "public_data"), name)
        if not path.is_file():
            pytest.skip(f"{path} is not here; the variable PUBLIC_DATA names its folder")
        return path

    return path_of


@pytest.fixture(params=[True, False], ids=["namespaces", "container"])
def namespaces(request):
    """With namespaces, if this machine has them, and without, as in most containers."""
    if request.param and not sandbox.has_namespaces():
        pytest.skip("this machine has no namespaces")
    return request.param


@pytest.fixture
def sandboxed(namespaces):
    """Runs programs; afterwards another program must pass as usual, and soon."""

    def launch(program, timeout_s=3, memory_mb=512, files=None):
        return sandbox.launch(program, timeout_s, memory_mb, files or {}, namespaces)

    yield launch
    start = time.monotonic()
    assert launch("import os\nassert os.listdir() == [] and sum(range(10)) == 45").passed
    assert time.monotonic() - start < 2
