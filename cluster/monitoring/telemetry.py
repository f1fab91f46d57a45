"""The run's figures on their way out: Prometheus through Ray, and TensorBoard."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge
from torch.utils.tensorboard import SummaryWriter

from gflowvlm.shared.metrics import ALL_METRICS, PROMETHEUS_PREFIX


class Telemetry:
    """Sends rows of the run's log to Prometheus and TensorBoard.

    Args:
        directory: Where TensorBoard's event files go.
        run_name: Value of the ``run`` tag in Prometheus.

    Raises:
        OSError: TensorBoard's files cannot be written; from `send` and `close`.
    """

    def __init__(self, directory: Path, run_name: str) -> None:
        self._shown = threading.excepthook
        threading.excepthook = self._show
        self._writer = SummaryWriter(str(directory))
        self._tags = {"run": run_name, "split": ""}
        self._latest: dict[tuple[str, str], float] = {}
        self._gauges = {
            spec.name: Gauge(
                PROMETHEUS_PREFIX + spec.name,
                description=f"{spec.description} [{spec.unit}]",
                tag_keys=("run", "split"),
            )
            for spec in ALL_METRICS
        }

    def send(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Sends one row's known metrics; others (texts, extra timings) are left out."""
        split = str(values.get("split", ""))
        folder = f"{kind}_{split}" if split else kind
        for name in self._gauges:
            value = values.get(name)
            if isinstance(value, (int, float)):
                self._latest[name, split] = float(value)
                self._set(name, split)
                self._writer.add_scalar(f"{folder}/{name}", float(value), step)

    def repeat(self) -> None:
        """Gives Prometheus the newest value of every metric again.

        Ray's exporter forgets a value some twenty seconds after it was set, and learner steps and evaluations are
        further apart than that.
        """
        for name, split in self._latest:
            self._set(name, split)

    def _set(self, name: str, split: str) -> None:
        self._gauges[name].set(self._latest[name, split], tags={**self._tags, "split": split})

    def close(self) -> None:
        """Writes what is pending to disk."""
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._shown

    def _show(self, failed: threading.ExceptHookArgs) -> None:
        """Leaves out what TensorBoard's writing thread keeps and raises again in `send`, where it is handled."""
        if failed.exc_value is None or getattr(failed.thread, "exception", None) is not failed.exc_value:
            self._shown(failed)
