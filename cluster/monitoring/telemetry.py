"""The run's figures on their way out: Prometheus through Ray, and TensorBoard."""

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ray.util.metrics import Gauge
from torch.utils.tensorboard import SummaryWriter

from gflowvlm.shared.metrics import ALL_METRICS, PROMETHEUS_PREFIX

FOLDERS = {"step": "train", "rollout": "rollout", "evaluation": "evaluation"}
"""TensorBoard's folder by kind of row; rows of other kinds have no figures."""

_PRINTABLE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


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
        self._directory = directory
        # Opened by the first row, which says from which step on earlier sessions' rows are undone.
        self._writer: SummaryWriter | None = None
        self._tags = {"run": as_tag(run_name), "split": ""}
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
        """Sends one row's known metrics; others (texts, extra timings) are left out.

        The first row of a session takes the place of all that an earlier one wrote of its step and later ones.
        """
        if self._writer is None:
            self._open(step)
        for (name, split), value in self._write(kind, values, step, None):
            self._latest[name, split] = value
            self._set(name, split)

    def rewrite_after(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes back what TensorBoard has of later steps, and gives it what the run's log has of them.

        Args:
            step: The step that a learner has gone back to; -1 for all there is, as at a resume: what a driver that died
                had not written to disk, or had written and was undone, is put right by the log.
            rows: The run's log, without what was undone.
        """
        self._close()
        self._open(step + 1)
        for row in rows:
            if row["kind"] in FOLDERS and row.get("step", -1) > step:
                self._write(FOLDERS[row["kind"]], row, row["step"], row["time"])

    def _open(self, purge_step: int) -> None:
        self._writer = SummaryWriter(str(self._directory), purge_step=purge_step)

    def _write(
        self, kind: str, values: Mapping[str, Any], step: int, walltime: float | None
    ) -> list[tuple[tuple[str, str], float]]:
        """Writes a row's figures for TensorBoard; returns them by name and split."""
        if self._writer is None:
            raise ValueError("telemetry: no step to begin with")
        split = str(values.get("split", ""))
        folder = f"{kind}_{split}" if split else kind
        known = {
            (name, split): float(values[name]) for name in self._gauges if isinstance(values.get(name), (int, float))
        }
        for (name, _), value in known.items():
            self._writer.add_scalar(f"{folder}/{name}", value, step, walltime)
        return list(known.items())

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
            self._close()
        finally:
            threading.excepthook = self._shown

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _show(self, failed: threading.ExceptHookArgs) -> None:
        """Leaves out what TensorBoard's writing thread keeps and raises again in `send`, where it is handled."""
        if failed.exc_value is None or getattr(failed.thread, "exception", None) is not failed.exc_value:
            self._shown(failed)


def as_tag(text: str) -> str:
    """Returns a text as Ray takes it for a metric's tag: printable ASCII as it is, all else percent-encoded."""
    return quote(text, safe=_PRINTABLE, errors="surrogatepass")
