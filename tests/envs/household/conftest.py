"""Games for ALFWorld's tests: made once, small, of all six types, seen and unseen."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from gflowvlm.envs.household.environment import AlfworldEnv
from gflowvlm.envs.household.generation import generate, specs
from gflowvlm.envs.household.settings import AlfworldSettings


@pytest.fixture(scope="session")
def games_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two games of each type to train on and one of each in the two other splits."""
    if find_spec("alfworld") is None:
        pytest.skip("alfworld is not installed: make alfworld")
    root = tmp_path_factory.mktemp("games")
    list(generate(root, specs({"train": 12, "valid_seen": 6, "valid_unseen": 6}, "small", seed=7), workers=1))
    return root


@pytest.fixture
def make_env(games_root: Path) -> Callable[..., AlfworldEnv]:
    """Makes an environment that plays the session's games."""

    def make(**changes: object) -> AlfworldEnv:
        return AlfworldEnv(AlfworldSettings.model_validate({"games": str(games_root), **changes}))

    return make
