"""Where things stand in a run's folder."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run.

    Attributes:
        root: The run's folder.
    """

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration (YAML)."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """The record: one JSON object a line (learner steps, evaluations, events)."""
        return self.root / "metrics.jsonl"

    @property
    def state(self) -> Path:
        """What a resumed run goes on with, besides checkpoint and trajectories (JSON)."""
        return self.root / "state.json"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.root / "tensorboard"

    @property
    def trajectories(self) -> Path:
        """The replay buffer's Parquet files."""
        return self.root / "trajectories"

    @property
    def adapters(self) -> Path:
        """Published adapters in PEFT format, one folder a version."""
        return self.root / "adapters"

    @property
    def checkpoints(self) -> Path:
        """Learner checkpoints."""
        return self.root / "checkpoints"

    @property
    def best(self) -> Path:
        """Which adapter version evaluated best, and its evaluation (JSON)."""
        return self.root / "best.json"

    @property
    def summary(self) -> Path:
        """Before and after, written at the end (JSON)."""
        return self.root / "summary.json"

    @property
    def learning_curve(self) -> Path:
        """The learning curve (PNG)."""
        return self.root / "learning_curve.png"

    def adapter(self, version: int) -> Path:
        """The PEFT folder of one adapter version."""
        return self.adapters / f"v{version:08d}"
