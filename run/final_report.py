"""The evaluations that end a run: which rows of its summary are of the policy before training, which of that after."""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from gflowvlm.run.log import Row
from gflowvlm.shared.task_settings import TaskSettings, task_names, task_settings_class
from gflowvlm.shared.trajectory import BASE_VERSION


class BeforeAfter(NamedTuple):
    """A split's two rows; both of the base model, with samples of their own, where no adapter was better than none."""

    before: Row | None
    after: Row | None


def measured_on(tasks: Collection[str]) -> str:
    """Returns what the final reports of runs of some tasks are measured on, as the end of "... on"."""
    places = [task_settings_class(name).measured_on for name in task_names() if name in tasks]
    return " and on ".join(dict.fromkeys(places)) or TaskSettings.measured_on


def before_and_after(report: Iterable[Row], best: int | None) -> dict[str, BeforeAfter]:
    """Returns the rows of a final report by split, whatever order they were played in.

    Args:
        report: Rows with ``split`` and ``version``.
        best: Version of the best adapter.

    Raises:
        KeyError: A row lacks one of these.
    """
    by_split: dict[str, list[Row]] = {}
    for row in report:
        by_split.setdefault(row["split"], []).append(row)
    return {split: _before_and_after(rows, best) for split, rows in by_split.items()}


def ordered(report: Iterable[Row], best: int) -> list[Row]:
    """Returns the rows of a final report split by split, before training first."""
    found = before_and_after(report, best)
    return [row for _, pair in sorted(found.items()) for row in pair if row is not None]


def _before_and_after(rows: Sequence[Row], best: int | None) -> BeforeAfter:
    before = next((row for row in rows if row["version"] == BASE_VERSION), None)
    after = next((row for row in reversed(rows) if row["version"] == best), None)
    return BeforeAfter(before, after)
