"""A run's log as data frames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from gflowvlm.run.log import REPORT, Row
from gflowvlm.shared.metrics import EVALUATION_METRICS, ROLLOUT_METRICS, STEP_METRICS, MetricSpec

PLAN_COLUMNS = ("step", "version", "split", "final", "instances", "samples", "temperature")
"""What an evaluation was of; `final` says whether it is one of those that end a run."""


def step_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Returns the learner steps, indexed by step."""
    return _frame([r for r in rows if r["kind"] == "step"], ("step", *_names(STEP_METRICS))).set_index("step")


def rollout_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Returns the snapshots of the rollouts, in order; several may be of one learner step."""
    return _frame([r for r in rows if r["kind"] == "rollout"], ("step", *_names(ROLLOUT_METRICS)))


def evaluation_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Returns the evaluations, in order."""
    found = [{**r, "final": r["kind"] == REPORT} for r in rows if r["kind"] in ("evaluation", REPORT)]
    return _frame(found, (*PLAN_COLUMNS, *_names(EVALUATION_METRICS)))


def figures_row(figures: Row) -> pd.Series:
    """Returns one evaluation's figures in the order of `evaluation_frame`, what has no place there last."""
    order = [*PLAN_COLUMNS, *_names(EVALUATION_METRICS)]
    known = [name for name in order if name in figures]
    return pd.Series({name: figures[name] for name in [*known, *(n for n in figures if n not in order)]}, dtype=object)


def _names(metrics: Sequence[MetricSpec]) -> tuple[str, ...]:
    return tuple(metric.name for metric in metrics)


def _frame(rows: list[Row], known: Sequence[str]) -> pd.DataFrame:
    """Returns rows as a frame: known columns first, also where no row has them, `time` as a UTC timestamp last."""
    names = dict.fromkeys([*known, *(name for row in rows for name in row)])
    found = {name for row in rows for name in row}
    # A loss reports some figures only: a column that no row has would say nothing, unless there are no rows.
    columns = [n for n in names if n not in ("kind", "time") and (n in found or not rows)]
    frame = pd.DataFrame(rows, columns=[*columns, "time"])
    frame["time"] = pd.to_datetime(frame["time"], unit="s", utc=True).dt.round("ms")
    return frame
