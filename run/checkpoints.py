"""The run's learner checkpoints on disk: which there are, which is newest, which may go."""

import re
import shutil
from pathlib import Path

_NAME = re.compile(r"step-(\d{8})")

_LEFTOVER = re.compile(r"\.step-\d{8}\..+\.(partial|old)")


def checkpoint_steps(directory: Path) -> dict[int, Path]:
    """Returns the whole checkpoints by step, in order; a half-written one has another name."""
    if not directory.is_dir():
        return {}
    found = {int(m[1]): p for p in directory.iterdir() if (m := _NAME.fullmatch(p.name)) is not None}
    return dict(sorted(found.items()))


def latest_checkpoint(directory: Path, step: int | None = None) -> Path | None:
    """Returns the newest checkpoint, or the one of a step, or None."""
    steps = checkpoint_steps(directory)
    if step is not None:
        return steps.get(step)
    return steps[max(steps)] if steps else None


def prune_checkpoints(directory: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what learners that were killed have left half-written.

    For the one learner that writes here, between two of its checkpoints.
    """
    for path in list(checkpoint_steps(directory).values())[:-keep]:
        shutil.rmtree(path)
    for path in directory.iterdir():
        if _LEFTOVER.fullmatch(path.name) is not None:
            shutil.rmtree(path, ignore_errors=True)
