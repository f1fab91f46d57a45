"""An experiment's figures as a picture, the paper's beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from gflowvlm.evaluation.learning_curve import headless_pyplot, save_picture
from gflowvlm.studies.experiments.description import Bars, Column, Experiment, Line, Variant
from gflowvlm.studies.experiments.sweep import Figures

_PANEL_WIDTH, _HEIGHT = 4.5, 4.0


def draw_plot(experiment: Experiment, grouped: Mapping[str, Sequence[Figures]], path: Path) -> None:
    """Draws the columns that the experiment's picture names: means, standard deviations, and the paper's figures.

    Args:
        experiment: The experiment.
        grouped: Rows of finished trials by variant.
        path: Where the picture goes (PNG).
    """
    pyplot = headless_pyplot()
    columns = [column for column in experiment.columns if column.key in experiment.picture.columns]
    variants = [variant for variant in experiment.variants if variant.name in grouped]
    height = max(_HEIGHT, 1.0 + 0.3 * len(variants))
    figure, axes = pyplot.subplots(
        1, len(columns), figsize=(_PANEL_WIDTH * len(columns), height), layout="constrained", squeeze=False
    )
    figure.suptitle(f"{experiment.name}: {experiment.title}", fontsize=10)
    for panel, column in zip(axes[0], columns, strict=True):
        points = [_spread(grouped[variant.name], column) for variant in variants]
        match experiment.picture:
            case Bars():
                _draw_bars(panel, variants, points, column, first=panel is axes[0][0])
            case Line(axis=axis):
                _draw_line(panel, variants, points)
                panel.set(xlabel=axis, ylabel=_title(column))
    save_picture(figure, path)


def _draw_bars(
    panel: Any, variants: Sequence[Variant], points: Sequence[tuple[float, float]], column: Column, *, first: bool
) -> None:
    # From the top down, in the order of the table.
    places = [-float(index) for index in range(len(variants))]
    middle, deviations = [p[0] for p in points], [p[1] for p in points]
    panel.barh(places, middle, xerr=deviations, color="C0", alpha=0.8, height=0.6, label="ours")
    known = [(v.paper[column.key], at) for v, at in zip(variants, places, strict=True) if column.key in v.paper]
    if known:
        panel.plot([x for x, _ in known], [at for _, at in known], "kD", markersize=5, label="paper")
        panel.legend(fontsize=8)
    panel.set_yticks(places, [variant.name for variant in variants] if first else [""] * len(variants), fontsize=8)
    panel.set(xlabel=_title(column))
    panel.set_xlim(left=0, right=102 if column.percent else None)


def _draw_line(panel: Any, variants: Sequence[Variant], points: Sequence[tuple[float, float]]) -> None:
    at = [(v.value, *p) for v, p in zip(variants, points, strict=True) if v.value is not None]
    panel.errorbar([x for x, _, _ in at], [y for _, y, _ in at], [d for _, _, d in at], marker="o", capsize=3)
    panel.set_ylim(bottom=0)


def _spread(rows: Sequence[Figures], column: Column) -> tuple[float, float]:
    """Returns mean and standard deviation as they are shown; 0 deviation of a single value, NaN of none."""
    factor = 100.0 if column.percent else 1.0
    values = [factor * float(value) for row in rows if (value := row[column.key]) is not None]
    if len(values) == 0:
        return float("nan"), 0.0
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def _title(column: Column) -> str:
    return f"{column.title}, %" if column.percent else column.title
