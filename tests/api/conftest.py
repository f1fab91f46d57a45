"""A small finished run that the tests of the Python interface read."""

from pathlib import Path

import pytest

from tests.api.made_run import make_run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two learner steps; read-only to all tests."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    make_run(directory)
    return directory
