"""Small sets of demonstrations, made as `gflowvlm demonstrate` makes them."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gflowvlm.actors.demonstration_set import DemonstrationRequest, DemonstrationSet
from gflowvlm.shared.task_settings import TaskSettings, default_settings
from gflowvlm.shared.trajectory import Trajectory, from_arrow, read_parquet, write_parquet
from gflowvlm.warm_starts.recording import make_demonstrations


def make_set(folder: Path, task: str | TaskSettings = "numberline", **options: Any) -> DemonstrationSet:
    """Makes a set of six trajectories, or as the options say."""
    chosen = default_settings(task) if isinstance(task, str) else task
    settings = {"task": chosen, "trajectories": 6, **options}
    return make_demonstrations(DemonstrationRequest.model_validate(settings), folder, lambda _: None, lambda _: None)


def files(folder: Path) -> list[Path]:
    """Returns a set's trajectory files."""
    return sorted((folder / "trajectories").glob("*.parquet"))


def content(folder: Path) -> dict[str, bytes]:
    """Returns every file of a folder, by its name below the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def copied(made: DemonstrationSet, folder: Path) -> Path:
    """Copies a set, for a test that damages it, and returns the copy's folder."""
    shutil.copytree(made.folder, folder)
    return folder


def rewrite(folder: Path, *trajectories: Trajectory) -> None:
    """Puts other trajectories into a set's first file."""
    write_parquet(trajectories, files(folder)[0])


def stored(folder: Path) -> list[Trajectory]:
    """Returns a set's trajectories as its files have them, unchecked."""
    return [t for path in files(folder) for t in from_arrow(read_parquet(path))]


def truncate(path: Path) -> None:
    """Cuts a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage(path: Path) -> None:
    """Overwrites data in the middle of a Parquet file; its footer stays readable."""
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(0).column(6).data_page_offset
    content[start : start + 400] = bytes(400)
    path.write_bytes(content)
