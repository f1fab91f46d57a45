"""The learning curve as a figure."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.figure import Figure

from gflowvlm.evaluation.learning_curve import SIZE, plot_learning_curve
from gflowvlm.run.log import Row


class ShownFigure(Figure):
    """A figure that a notebook shows whether pyplot is in use there or not."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def learning_curve(rows: Sequence[Row], title: str) -> Figure:
    """Returns the learning curve of a run's log."""
    figure = ShownFigure(figsize=SIZE, layout="constrained")
    plot_learning_curve(rows, title, figure)
    return figure
