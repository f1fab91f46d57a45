"""The live display of a run: a progress bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from gflowvlm.run.log import Row
from gflowvlm.run.plain_progress import PLAIN_INTERVAL_S

NOTED_SHARE, WARNED_SHARE = 0.01, 0.2
"""Shares of malformed and of cut-off responses in an evaluation from which on they are noted, and warned of."""


def evaluation_lines(row: Row) -> Iterator[str]:
    """Yields the lines that say what an evaluation while training found."""
    bound = "" if row["success_bound"] is None else f" (perfect sampler {row['success_bound']:.2f})"
    malformed, cut = row["malformed_rate"], row["cut_rate"]
    yield (
        f"evaluation at step {row['step']}: success {row['success']:.2f}{bound}, greedy {row['success_greedy']:.2f}, "
        f"Div@{row['samples']} {row['div_at_n']:.2f}"
        + (f", malformed responses {malformed:.0%}" if malformed >= NOTED_SHARE else "")
        + (f", cut off by a limit of tokens {cut:.0%}" if cut >= NOTED_SHARE else "")
    )
    if cut >= WARNED_SHARE:
        yield (
            "limits of tokens cut many trajectories off, and how they would have gone on is not learned from: raise "
            "policy.max_response_tokens or sampler.max_model_len"
        )
    if malformed >= WARNED_SHARE and row["step"] == 0:
        yield (
            "the model seldom answers in the form that it is asked for, and learns only from answers that can be read: "
            "try the other task.answer_format, or teach it the form with `gflowvlm sft` first"
        )
    elif malformed >= WARNED_SHARE:
        yield (
            "the policy loses the form of its answers, and may not find it again: stop, and begin anew with a lower "
            "learner.learning_rate, or as docs/operations.md says under Malformed responses"
        )


@dataclass(frozen=True)
class ProgressState:
    """What the display shows.

    Attributes:
        step: Learner steps done.
        version: Newest adapter version.
        staleness: Mean staleness of the last batch, versions.
        loss: Loss of the last step.
        success: Success of the newest rollouts, None before there are any.
        tokens_per_s: Sampler throughput.
        env_steps: Environment steps played.
        note: What else is going on.
    """

    step: int = 0
    version: int = 0
    staleness: float = 0.0
    loss: float | None = None
    success: float | None = None
    tokens_per_s: float = 0.0
    env_steps: int = 0
    note: str = ""

    def figures(self) -> str:
        """Returns the figures as one line, which fits into 80 columns."""
        loss = "-" if self.loss is None else f"{self.loss:.2f}"
        success = "-" if self.success is None else f"{self.success:.2f}"
        return (
            f"success {success}  loss {loss}  version {self.version}  staleness {self.staleness:.1f}  "
            f"{self.tokens_per_s:.0f} tokens/s"
        )

    def played(self) -> str:
        """Returns how much has been played, and what else is going on."""
        steps = f"{self.env_steps} env steps"
        return f"{steps}  {self.note}" if self.note else steps


class _TwoLines(Progress):
    """A progress bar with a line of figures under it: beside it they would crowd out the step and the time left."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.figures:
            yield Text(self.figures, no_wrap=True, overflow="ellipsis")


class RunDisplay:
    """Shows a run's progress.

    Args:
        console: Where to show it.
        total: Learner steps of the whole run.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total = console, total
        self.state = ProgressState()
        self._printed_at = 0.0
        self._printed_step = -1
        self._started_at: float | None = None
        self._first_step = 0
        self._progress: _TwoLines | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "RunDisplay":
        if self._console.is_terminal:
            self._progress = _TwoLines(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=20),
                TimeRemainingColumn(),
                TextColumn("left  {task.description}"),
                console=self._console,
            )
            self._task = self._progress.add_task("starting", total=self._total)
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, **changes: object) -> None:
        """Changes fields of the state and shows it."""
        self.state = replace(self.state, **changes)  # type: ignore[arg-type]
        if self._started_at is None and self.state.step > 0:
            self._started_at, self._first_step = time.monotonic(), self.state.step
        if self._progress is not None and self._task is not None:
            self._progress.figures = self.state.figures()
            self._progress.update(self._task, completed=self.state.step, description=self.state.played())
            return
        now = time.monotonic()
        if self.state.step != self._printed_step and now - self._printed_at >= PLAIN_INTERVAL_S:
            self._printed_at, self._printed_step = now, self.state.step
            described = f"{self.state.figures()}  {self.state.played()}"
            self.say(f"step {self.state.step}/{self._total}  {described}  {self._time_left()}")

    def _time_left(self) -> str:
        if self._started_at is None or self.state.step <= self._first_step:
            return "time left -"
        pace = (time.monotonic() - self._started_at) / (self.state.step - self._first_step)
        return f"time left {pace * (self._total - self.state.step):.0f} s"
