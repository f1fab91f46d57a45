"""How a finished run spent its time, from its log."""

from pathlib import Path

from gflowvlm.run.log import Row, read_rows
from gflowvlm.run.setup import open_run
from gflowvlm.shared.errors import UserError
from gflowvlm.studies.benchmarks.measurement import Measurement

PART = "run"


def bench_run(directory: Path) -> list[Measurement]:
    """Returns the shares of a run in which the learner waited for data and the sampler had nothing to do.

    Raises:
        UserError: There is no run, or it took no learner step.
    """
    folder, _ = open_run(directory)
    rows = read_rows(folder.metrics)
    steps = [row for row in rows if row["kind"] == "step"]
    total = sum(row["step_s"] for row in steps)
    if total <= 0:
        raise UserError(f"{directory}: the run's log has no learner step yet; nothing to measure")
    measurements = [
        Measurement(PART, "run_learner_wait_share", sum(row["wait_s"] for row in steps) / total, "share", _of(steps)),
        Measurement(PART, "run_learner_steps_per_s", len(steps) / total, "steps/s", "waiting included"),
    ]
    idle = [row["sampler_idle_share"] for row in rows if row.get("sampler_idle_share") is not None]
    if idle:
        what = f"no request in flight; mean of {len(idle)} snapshots of the rollouts"
        measurements.append(Measurement(PART, "run_sampler_idle_share", sum(idle) / len(idle), "share", what))
    return measurements


def _of(steps: list[Row]) -> str:
    return f"of the time of {len(steps)} learner steps, waiting for a batch"
