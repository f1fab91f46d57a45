"""The state of a run that runs: its learner's step, its newest version, its counts. There is one, the driver's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gflowvlm.actors.admission import Admission
from gflowvlm.shared.trajectory import BASE_VERSION


@dataclass
class RunState:
    """What is decided by: told by the learner's reports and by acknowledged groups, asked for by everyone else.

    The adapter store hands out version numbers and replicas serve what it holds: that is data. Which version is a
    training group's or an evaluation's is decided by this one.

    Attributes:
        admission: What was accepted and what is running, under the run's pacing.
        step: Learner steps done; goes back with a learner that goes back to its checkpoint.
        version: Newest version that the learner has reported.
        learning: Whether a learner has started since the driver did.
    """

    admission: Admission
    step: int = 0
    version: int = BASE_VERSION
    learning: bool = False

    def note_started(self, report: Mapping[str, Any]) -> bool:
        """A learner has started; returns whether steps were undone by it."""
        undone = report["step"] < self.step
        self.step, self.version, self.learning = report["step"], report["version"], True
        return undone

    def note_step(self, report: Mapping[str, Any]) -> None:
        """A learner step was done."""
        self.step, self.version = report["step"], report["version"]
        self.admission.note_learned(self.step)
