"""The wheel that the tests here look at."""

from pathlib import Path

import pytest

from tests.packaging.builds import build_wheel, copy_tree


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree."""
    source = tmp_path_factory.mktemp("source")
    copy_tree(source)
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))
