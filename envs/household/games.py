"""Where games come from: ALFWorld's own data, a folder of generated ones, or the starter set."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gflowvlm.envs.household.engine import read_game
from gflowvlm.envs.household.tasks import Task, TaskType
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.shell import quoted

DATA_VARIABLE = "ALFWORLD_DATA"
ALFWORLD_CACHE = Path("~/.cache/alfworld")
"""Where `alfworld-download` puts the official games, and what alfworld sets the variable to."""
VERSION_FOLDER = "json_2.1.1"
TRAIN_FOLDER, SEEN_FOLDER, UNSEEN_FOLDER = "train", "valid_seen", "valid_unseen"
GAME_FILE, TASK_FILE = "game.tw-pddl", "traj_data.json"
LEFT_OUT = ("movable", "Sliced")
"""Words in the path of games that ALFWorld's environments skip."""
_SOLVABLE = re.compile(r'"solvable"\s*:\s*true')


@dataclass(frozen=True)
class Game:
    """One game on disk.

    Attributes:
        folder: The folder with ``game.tw-pddl`` and ``traj_data.json``.
        name: The folder below the split's, with ``/``.
        task_type: Its task type.
    """

    folder: Path
    name: str
    task_type: TaskType

    def content(self) -> dict[str, Any]:
        """Returns the content of its ``game.tw-pddl``, see `read_game`."""
        return read_game(self.folder / GAME_FILE)

    def task(self) -> Task:
        """Returns what is to be done.

        Raises:
            UserError: The file that says so is missing or not ALFRED's.
        """
        path = self.folder / TASK_FILE
        try:
            params = json.loads(path.read_text(encoding="utf-8"))["pddl_params"]
            return Task(self.task_type, params["object_target"], params["parent_target"], params["toggle_target"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: says no task ({error!r}); remove or restore the game") from None


def official_data() -> Path | None:
    """Returns the root of ALFWorld's data, None where none was installed.

    Raises:
        UserError: ``ALFWORLD_DATA`` names a folder without games.
    """
    default = ALFWORLD_CACHE.expanduser()
    root = Path(os.environ.get(DATA_VARIABLE) or default)
    if (root / VERSION_FOLDER).is_dir():
        return root
    # alfworld itself sets the variable to its default when it is imported.
    if root != default:
        raise UserError(
            f"{DATA_VARIABLE}={root}: no folder {VERSION_FOLDER} in it; `gflowvlm alfworld generate {quoted(root)}` "
            "makes games there, and without the variable a starter set is played"
        )
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable game ({error}); remove or restore it") from None


def find_games(root: Path, folder: str, task_types: tuple[TaskType, ...]) -> tuple[Game, ...]:
    """Returns the games of a split, see `games_there`.

    Raises:
        UserError: There is no such game, or one cannot be read.
    """
    games = games_there(root, folder, task_types)
    if len(games) == 0:
        types = ", ".join(task_type.value for task_type in task_types)
        raise UserError(
            f"{root / VERSION_FOLDER / folder}: no game of {types}; `gflowvlm alfworld generate {quoted(root)}` makes "
            "some"
        )
    return games


@lru_cache(64)
def games_there(root: Path, folder: str, task_types: tuple[TaskType, ...]) -> tuple[Game, ...]:
    """Returns the games of a split, in an order that is the same on every machine and spreads each type evenly.

    The same games are left out as by ``AlfredTWEnv``: movable and sliced ones, and unsolvable ones.

    Args:
        root: The folder that holds ``json_2.1.1``.
        folder: ``train``, ``valid_seen`` or ``valid_unseen``.
        task_types: The task types wanted.

    Returns:
        The games, none where there are none.

    Raises:
        UserError: A game cannot be read.
    """
    split = root / VERSION_FOLDER / folder
    wanted = {task_type.value: task_type for task_type in task_types}
    games = []
    for path in split.glob(f"*/*/{GAME_FILE}"):
        name = path.parent.relative_to(split).as_posix()
        task_type = wanted.get(name.split("-")[0])
        if task_type is None or any(word in name for word in LEFT_OUT) or not (path.parent / TASK_FILE).is_file():
            continue
        if _SOLVABLE.search(_text(path)) is not None:
            games.append(Game(path.parent, name, task_type))
    return _spread(games, task_types)


def _spread(games: Sequence[Game], task_types: Sequence[TaskType]) -> tuple[Game, ...]:
    """Returns games in an order in which any few that follow one another are of each type as often as all are."""
    places: list[tuple[float, int, Game]] = []
    for index, task_type in enumerate(task_types):
        same = [game for game in games if game.task_type is task_type]
        same.sort(key=lambda game: hashlib.sha256(game.name.encode()).digest())
        places += [((rank + 0.5) / len(same), index, game) for rank, game in enumerate(same)]
    return tuple(game for _, _, game in sorted(places, key=lambda place: place[:2]))
