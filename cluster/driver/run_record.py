"""What a run writes about itself while it runs: its log, its saved state, its best adapter, its curve."""

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from gflowvlm.cluster.driver.learner_reports import STARTED, STEP, Report
from gflowvlm.evaluation.learning_curve import draw_learning_curve
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.log import Row, append_row, read_rows
from gflowvlm.run.state import SavedState, load_state, save_state
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.files import write_whole


class RunRecord:
    """Writes a run's records. The driver's loop and its receiver of reports have the one writer in common.

    Args:
        folder: The run's folder.
        is_due: Whether an evaluation is due at a learner step.

    Raises:
        UserError: The run's saved state or its best evaluation is damaged, or cannot be written.
    """

    def __init__(self, folder: RunFolder, is_due: Callable[[int], bool]) -> None:
        self._folder, self._is_due = folder, is_due
        self._lock = threading.Lock()
        self._saved = load_state(folder)
        if not folder.state.exists():
            save_state(folder, self._saved)
        self._best = self._load_best()

    @property
    def saved(self) -> SavedState:
        """What a resumed run goes on with."""
        return self._saved

    def append(self, kind: str, content: Mapping[str, Any], *, durable: bool = False) -> None:
        """Appends a row to the log; see `append_row`."""
        with self._lock:
            append_row(self._folder.metrics, kind, content, durable=durable)

    def append_report(self, report: Report) -> None:
        """Writes a learner's report down, for good: once this returns, a checkpoint may be built on it.

        Raises:
            UserError: It cannot be written.
        """
        self.append(report.kind, report.content, durable=True)
        if report.kind == STEP:
            self._note_step(int(report.content["step"]), int(report.content["version"]))
        elif report.kind == STARTED:
            self._note_start(int(report.content["step"]))

    def _note_step(self, step: int, version: int) -> None:
        if self._is_due(step) and step not in self._saved.evaluated:
            self._save(lambda saved: {"due": {**saved.due, step: version}})

    def _note_start(self, first: int) -> None:
        if any(step > first for step in self._saved.due):
            # Undone; due again when they are done again.
            self._save(lambda saved: {"due": {step: version for step, version in saved.due.items() if step <= first}})

    def note_snapshot(self, content: Mapping[str, Any], env_steps: int, response_tokens: int) -> None:
        """Writes a snapshot of the rollouts down, and how much was played so far."""
        self.append("rollout", content)
        self._save(lambda _: {"env_steps": env_steps, "response_tokens": response_tokens})

    def note_evaluated(self, step: int) -> None:
        """The evaluation of a learner step is finished, and written down."""
        self._save(
            lambda saved: {
                "due": {due: version for due, version in saved.due.items() if due != step},
                "evaluated": saved.evaluated | {step},
            }
        )

    def best(self) -> Row | None:
        """Returns the evaluation of the best adapter so far, None before the first."""
        return self._best

    def note_best(self, evaluation: Row) -> None:
        """An evaluation was as good as the best before it, or better."""
        write_whole(self._folder.best, json.dumps(evaluation, indent=1), durable=True)
        self._best = evaluation
        self._save(lambda _: {"best": evaluation})

    def _load_best(self) -> Row | None:
        """Returns the best evaluation that is written down; where that is lost, the saved state has it."""
        path = self._folder.best
        try:
            best: Row = json.loads(path.read_text(encoding="utf-8"))
            return {**best, "version": int(best["version"]), "success": float(best["success"])}
        except FileNotFoundError:
            return self._saved.best
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: damaged ({error}); remove it, and the run goes on with the best evaluation that its "
                "state.json has"
            ) from None

    def rows(self) -> list[Row]:
        """Returns what was written, for those who show it; nothing may be decided by it."""
        return read_rows(self._folder.metrics)

    def draw_curve(self) -> None:
        """Draws the learning curve anew."""
        draw_learning_curve(self.rows(), self._folder.learning_curve, self._folder.root.name)

    def _save(self, changes: Callable[[SavedState], dict[str, Any]]) -> None:
        with self._lock:
            self._saved = self._saved.model_copy(update=changes(self._saved))
            save_state(self._folder, self._saved)
