"""What the tests of the extras share."""

import os
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
