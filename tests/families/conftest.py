"""Instances of all families, each made once."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.families.factory import build_family

try:
    import_module("torchvision.transforms.v2")
except ImportError:
    # Most processors need it; scripts/set_up.py installs one that works.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a maker of model folders: ``family_folder("qwen2_5_vl")``."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = build_family(name, tmp_path_factory.mktemp("families") / name)
        return made[name]

    return folder
