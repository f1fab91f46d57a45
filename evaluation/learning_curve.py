"""The learning curve of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gflowvlm.run.log import Row

SIZE = (13, 4)
"""Width and height of the picture, inches."""


def draw_learning_curve(rows: Sequence[Row], path: Path, title: str) -> None:
    """Writes success (evaluated and of the batches), diversity and distribution match, and loss as a PNG.

    Args:
        rows: The run's log (`read_rows`).
        path: Where to write; replaced atomically.
        title: Title of the picture.
    """
    figure = headless_pyplot().figure(figsize=SIZE, layout="constrained")
    plot_learning_curve(rows, title, figure)
    save_picture(figure, path)


def plot_learning_curve(rows: Sequence[Row], title: str, figure: Any) -> None:
    """Draws the same onto a figure of matplotlib's.

    Args:
        rows: The run's log (`read_rows`).
        title: Title of the picture.
        figure: An empty figure, best of `SIZE` and with the layout ``constrained``.
    """
    steps = [r for r in rows if r["kind"] == "step"]
    evaluations = [r for r in rows if r["kind"] == "evaluation" and r["split"] == "id"]
    success, match, loss = figure.subplots(1, 3)
    figure.suptitle(title)

    if steps:
        success.plot(_column(steps, "step"), _column(steps, "batch_success"), color="0.75", label="training batches")
    if evaluations:
        at = _column(evaluations, "step")
        success.plot(at, _column(evaluations, "success"), "o-", label="evaluation, temperature 1")
        success.plot(at, _column(evaluations, "success_greedy"), "s--", label="evaluation, greedy")
        if evaluations[0]["success_bound"] is not None:
            success.axhline(evaluations[0]["success_bound"], color="k", ls=":", label="perfect sampler of the target")
        match.plot(at, _column(evaluations, "div_at_n"), "o-", color="C2", label=f"Div@{evaluations[0]['samples']}")
        if evaluations[0]["total_variation"] is not None:
            distance = match.twinx()
            distance.plot(at, _column(evaluations, "total_variation"), "s-", color="C3", label="total variation")
            distance.plot(at, _column(evaluations, "total_variation_floor"), ":", color="C3", label="its noise floor")
            distance.set(ylim=(0, 1), ylabel="total variation to R/Z")
            lines = [*match.get_lines(), *distance.get_lines()]
            # On the second axis: its lines would run over a legend of the first.
            distance.legend(lines, [str(line.get_label()) for line in lines], loc="center right", fontsize=8)
        else:
            match.legend(loc="lower right", fontsize=8)
        match.set_ylim(bottom=0)
    success.set(ylim=(0, 1.02), xlabel="learner step", title="success")
    if steps or evaluations:
        success.legend(loc="lower right", fontsize=8)
    match.set(xlabel="learner step", title="diversity and distribution match", ylabel="distinct solutions")
    if steps:
        loss.plot(_column(steps, "step"), _column(steps, "loss"))
        # A batch with an invalid response has a loss hundreds of times that of its neighbours. The baselines' loss is
        # of another kind, and may be negative.
        if all(row["loss"] > 0 for row in steps):
            loss.set_yscale("log")
    loss.set(xlabel="learner step", title="loss")


def headless_pyplot() -> Any:
    """Returns matplotlib's pyplot for drawing into files; imported here, because it is slow to import."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_picture(figure: Any, path: Path, dpi: int = 110) -> None:
    """Writes a figure as a PNG, replacing an older one at once, and closes it."""
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=dpi, format="png")
    headless_pyplot().close(figure)
    partial.replace(path)


def _column(rows: Sequence[Row], key: str) -> list[float]:
    return [row[key] for row in rows]
