"""The starter set: a few small games of every type, made at first use and kept in the user's cache."""

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gflowvlm.envs.household.generation import generate, missing, specs
from gflowvlm.shared.errors import UserError

CACHE_VARIABLE = "GFLOWVLM_CACHE"
NAME = "starter-2"
"""Another name whenever the games change: an instance is a seed of a known set."""
GAMES = {"train": 36, "valid_seen": 24, "valid_unseen": 24}
SEED, SIZE = 0, "small"
SAY_EVERY = 12
LONGEST_WAIT_S = 600.0


def cache_folder() -> Path:
    """Returns the folder for what can be made again: ``$GFLOWVLM_CACHE``, else ``gflowvlm`` in the user's cache."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gflowvlm"


def starter_set() -> Path:
    """Returns the root of the starter set, made here if it is not there yet, with a word about it on stderr.

    Processes that want it at the same time wait for the one that makes it; a stopped one is gone on with.

    Raises:
        UserError: The cache cannot be written, or another process takes too long.
    """
    root = cache_folder() / "alfworld" / NAME
    finished = root / "finished"
    if finished.is_file():
        return root
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root / "lock"):
            if not finished.is_file():
                _make(root)
                finished.touch()
    except OSError as error:
        raise UserError(f"{root}: cannot be written ({error.strerror}); set {CACHE_VARIABLE} to a folder") from None
    return root


def _make(root: Path) -> None:
    left = missing(root, specs(GAMES, SIZE, SEED))
    for made, _ in enumerate(generate(root, left, workers=1)):
        if made % SAY_EVERY == 0:
            print(f"alfworld: making a starter set of games in {root}, {made + 1}/{len(left)}", file=sys.stderr)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds a lock between processes; the system gives it back when its holder dies."""
    deadline = time.monotonic() + LONGEST_WAIT_S
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{path}: waited {LONGEST_WAIT_S:.0f} s for the process that makes the starter games; "
                        "stop it, or remove the folder"
                    ) from None
                time.sleep(0.2)
        yield
