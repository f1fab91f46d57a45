"""Making, locking and reopening run folders."""

import difflib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gflowvlm.run.folder import RunFolder
from gflowvlm.run.folder_lock import LOCK, folder_lock
from gflowvlm.run.paths import check_absolute
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.config_io import dump_config, load_config
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.files import write_whole
from gflowvlm.shared.shell import quoted


def new_run(config: RunConfig, directory: Path | None) -> RunFolder:
    """Makes a run's folder and writes its configuration.

    Args:
        config: The resolved configuration.
        directory: Where; by default ``runs/NAME-DATE-TIME``.

    Raises:
        UserError: The folder holds a run already, or cannot be made, or a path of the configuration is relative.
    """
    check_absolute(config)
    root = directory if directory is not None else Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_new_run(root)
    folder = RunFolder(root.resolve())
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        for path in (folder.trajectories, folder.adapters, folder.checkpoints, folder.tensorboard):
            path.mkdir(exist_ok=True)
        write_whole(folder.config, dump_config(config))
    except OSError as error:
        raise UserError(f"{root}: cannot make the run's folder ({error.strerror or error})") from None
    return folder


def check_new_run(directory: Path) -> None:
    """Makes sure that a new run would not be started over another.

    Raises:
        UserError: The folder holds a run already.
    """
    if RunFolder(directory.resolve()).config.exists():
        raise UserError(
            f"{directory}: holds a run already; go on with `gflowvlm train --resume {quoted(directory)}`, or choose "
            "another"
        )


def open_run(directory: Path) -> tuple[RunFolder, RunConfig]:
    """Returns a run's folder and configuration.

    Raises:
        UserError: There is no run in it.
    """
    folder = RunFolder(directory.resolve())
    if not folder.config.exists():
        meant = _run_meant(directory)
        if meant is not None:
            raise UserError(f"{directory}: no run there (no config.yaml); did you mean {quoted(meant)}?")
        raise UserError(
            f"{directory}: no run there (no config.yaml); `gflowvlm train --run {quoted(directory)}` starts one"
        )
    return folder, load_config(folder.config)


def _run_meant(directory: Path) -> Path | None:
    """Returns the run that was probably meant: the newest in the folder, that of the name in ``runs``, or one beside it
    that is called nearly so; None where there is none.
    """
    inside = _runs_in(directory)
    if inside:
        return max(inside, key=lambda run: os.path.getmtime(RunFolder(run).config))
    named = Path("runs") / directory
    if os.path.isfile(RunFolder(named).config):
        return named
    beside = {run.name: run for folder in (directory.parent, Path("runs")) for run in _runs_in(folder)}
    close = difflib.get_close_matches(directory.name, beside, n=1)
    return beside[close[0]] if close else None


def _runs_in(folder: Path) -> list[Path]:
    return [config.parent for config in folder.glob(f"*/{RunFolder(folder).config.name}")]


@contextmanager
def run_lock(folder: RunFolder) -> Iterator[None]:
    """Holds the run for one driver; the lock goes with the process, however it ends.

    Raises:
        UserError: Another driver is running it.
    """
    held = UserError(f"{folder.root}: another `gflowvlm train` is running this run")
    with folder_lock(folder.root, held) as descriptor:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, socket.gethostname().encode(), 0)
        yield


def driver_holds(folder: RunFolder) -> bool | None:
    """Returns whether a driver is running the run; None where that cannot be told from this machine.

    Not every shared file system shows one machine the locks of another.
    """
    try:
        descriptor = os.open(folder.root / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        host = os.read(descriptor, 256).decode(errors="replace")
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False if host in ("", socket.gethostname()) else None
