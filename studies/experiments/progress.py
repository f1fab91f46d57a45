"""How far an experiment is: bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from gflowvlm.run.log import REPORT, RowTail
from gflowvlm.studies.experiments.description import Scale
from gflowvlm.studies.experiments.sweep import report_figures
from gflowvlm.studies.experiments.trials import Trial

_PLAIN_INTERVAL_S = 30.0
_POLL_S = 1.0

TINY_RUN_MINUTES = 7.0
"""What a run of the default preset takes on two cores (README); steps of other runs are taken to be as long."""

_TINY_RUN_STEPS = 60


def expected_minutes(finished: Sequence[Trial], scale: Scale, steps: int) -> float | None:
    """Returns what a run is expected to take, minutes.

    Args:
        finished: The experiment's finished trials, which tell best.
        scale: Without them, the scale's usual run tells; only that of ``tiny`` is known.
        steps: Learner steps of the run.

    Returns:
        None where nothing is known.
    """
    minutes = [m for trial in finished if (m := report_figures(trial.run.folder)["minutes"]) is not None]
    if len(minutes) > 0:
        return mean(float(m) for m in minutes)
    return TINY_RUN_MINUTES * steps / _TINY_RUN_STEPS if scale == "tiny" else None


def minutes_left(done: Sequence[float], per_run: float | None, concurrent: int) -> float | None:
    """Returns how long the trials will take, minutes.

    Args:
        done: For each unfinished trial, the share of it that is done.
        per_run: What a whole one takes; None where it is not known.
        concurrent: How many run at a time.
    """
    if per_run is None:
        return None
    return per_run * sum(1.0 - share for share in done) / max(1, min(concurrent, len(done)))


def minutes_text(minutes: float | None) -> str:
    """Returns a time as text."""
    if minutes is None:
        return "unknown"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


@dataclass
class TrialProgress:
    """A running trial as its log tells.

    Attributes:
        trial: The trial.
        step: Learner steps done.
        success: Newest success: of the last evaluation, or of the newest rollouts.
        changed: Whether something came in since it was last shown.
    """

    trial: Trial
    step: int = 0
    success: float | None = None
    changed: bool = False
    _tail: RowTail = field(init=False)

    def __post_init__(self) -> None:
        self._tail = RowTail(self.trial.run.folder.metrics)

    @property
    def share(self) -> float:
        """Share of the learner steps that is done."""
        return min(1.0, self.step / self.trial.run.config.learner.steps)

    def update(self) -> None:
        """Reads what came in."""
        for row in self._tail.new_rows():
            self.changed = True
            if row["kind"] in ("step", "learner"):
                self.step = int(row["step"])
            # The final report has the untrained model's figures too.
            if row["kind"] != REPORT:
                self.success = row.get("success", row.get("rollout_success", self.success))

    def describe(self) -> str:
        """Returns where it stands as text."""
        success = "-" if self.success is None else f"{self.success:.2f}"
        return f"{self.trial.name}  step {self.step}/{self.trial.run.config.learner.steps}  success {success}"


class ExperimentDisplay:
    """Shows which trials run, where they stand, and how long it will take. A context manager.

    Args:
        console: Where to show it.
        trials: The unfinished trials by name.
        done: How many others were finished before.
        per_run: Minutes that a run is expected to take, None where it is not known.
        concurrent: How many trials run at a time.
    """

    def __init__(
        self, console: Console, trials: Mapping[str, Trial], done: int, per_run: float | None, concurrent: int
    ) -> None:
        self._console, self._trials, self._done = console, trials, done
        self._per_run, self._concurrent = per_run, concurrent
        self._following: dict[str, TrialProgress] = {}
        self._finished: set[str] = set()
        self._bars: dict[str, TaskID] = {}
        self._printed_at = 0.0
        self._polled_at = 0.0
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "ExperimentDisplay":
        total = self._done + len(self._trials)
        self._all = self._progress.add_task("all runs", total=total, completed=self._done, note="")
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bars."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def finish(self, name: str, per_run: float | None) -> None:
        """Notes that a trial is finished, and what a run is expected to take from now on."""
        self._finished.add(name)
        self._per_run = per_run
        self.say(f"finished {self._done + len(self._finished)} of {self._done + len(self._trials)}: {name}")

    def update(self, running: Sequence[str]) -> None:
        """Shows the trials that run now; does nothing when called again at once."""
        now = time.monotonic()
        if now - self._polled_at < _POLL_S:
            return
        self._polled_at = now
        for name in set(self._following) - set(running):
            del self._following[name]
            if name in self._bars:
                self._progress.remove_task(self._bars.pop(name))
        for name in running:
            if name not in self._following:
                self._following[name] = TrialProgress(self._trials[name])
            self._following[name].update()
        left = f"time left {minutes_text(self._minutes_left())}"
        if self._console.is_terminal:
            self._show_bars(left)
        elif now - self._printed_at >= _PLAIN_INTERVAL_S:
            self._show_lines(left)

    def _minutes_left(self) -> float | None:
        unfinished = [name for name in self._trials if name not in self._finished]
        done = [self._following[name].share if name in self._following else 0.0 for name in unfinished]
        return minutes_left(done, self._per_run, self._concurrent)

    def _show_bars(self, left: str) -> None:
        done = self._done + len(self._finished)
        self._progress.update(self._all, completed=done, note=f"{done} of {self._done + len(self._trials)}  {left}")
        for name, following in self._following.items():
            if name not in self._bars:
                self._bars[name] = self._progress.add_task("", total=1.0, note="")
            self._progress.update(self._bars[name], completed=following.share, note=following.describe())

    def _show_lines(self, left: str) -> None:
        for following in self._following.values():
            if following.changed:
                following.changed = False
                self._printed_at = time.monotonic()
                self.say(f"{following.describe()}  {left}")
