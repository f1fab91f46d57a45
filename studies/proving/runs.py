"""The proving ground's runs: trained cell by cell, kept in a file, made into a table and curves."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from gflowvlm.evaluation.learning_curve import headless_pyplot, save_picture
from gflowvlm.run.log import append_row, read_rows
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.files import write_whole
from gflowvlm.studies.proving.experiments import EXPERIMENTS, PROBLEMS, Case
from gflowvlm.studies.proving.state_graph import StateGraph
from gflowvlm.studies.proving.training import Measured, train
from gflowvlm.studies.tables import csv_text, spread

CELLS, TABLE, RAW, CURVES = "cells.jsonl", "table.md", "curves.csv", "curves.png"

CLOSE = 0.05
"""The total variation that a policy is asked to reach."""


@dataclass(frozen=True)
class Cell:
    """A case with one seed.

    Attributes:
        case: What is trained on what.
        seed: Of weights and sampling.
    """

    case: Case
    seed: int

    @property
    def key(self) -> str:
        """What makes its figures; cells of different experiments may have the same one and are trained once."""
        content = {"problem": self.case.problem, "training": asdict(self.case.training), "seed": self.seed}
        return json.dumps(content, sort_keys=True)


@dataclass(frozen=True)
class Finished:
    """What a cell's training has shown.

    Attributes:
        curve: Measured from before the first step to the end.
        modes: How many modes there are.
    """

    curve: tuple[Measured, ...]
    modes: int

    @property
    def last(self) -> Measured:
        """The end of training."""
        return self.curve[-1]

    @property
    def reached(self) -> Measured | None:
        """The first measurement at or below `CLOSE`, None when there is none."""
        return next((point for point in self.curve if point.total_variation <= CLOSE), None)


class ProvingFolder:
    """Where the figures go. Finished cells are kept whatever happens.

    Args:
        root: The folder; made when it is not there.

    Raises:
        UserError: It cannot be made, or holds cells that cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {root}: cannot be made ({error.strerror}); choose another folder") from None
        self.finished: dict[str, Finished] = {}
        for row in read_rows(root / CELLS):
            try:
                curve = tuple(Measured(**point) for point in row["curve"])
                self.finished[row["key"]] = Finished(curve, row["modes"])
            except (KeyError, TypeError) as error:
                raise UserError(f"{root / CELLS}: a line is no cell of this program ({error}); remove it") from None
        self._graphs: dict[str, StateGraph] = {}

    def train(self, cell: Cell) -> Iterator[Measured]:
        """Trains one cell, yields what is measured on the way, and keeps it all at the end."""
        if cell.case.problem not in self._graphs:
            self._graphs[cell.case.problem] = PROBLEMS[cell.case.problem]()
        graph = self._graphs[cell.case.problem]
        curve = []
        for point in train(graph, cell.case.training, cell.seed):
            curve.append(point)
            yield point
        finished = Finished(tuple(curve), int(graph.is_mode.sum()))
        row = {"key": cell.key, "modes": finished.modes, "curve": [asdict(point) for point in curve]}
        append_row(self.root / CELLS, "cell", row)
        self.finished[cell.key] = finished

    def write(self, cells: Sequence[Cell]) -> str:
        """Writes table, raw figures and curves of those of the cells that are finished; returns the table."""
        done = [(cell, self.finished[cell.key]) for cell in cells if cell.key in self.finished]
        table = markdown_table(done)
        write_whole(self.root / TABLE, table)
        write_whole(self.root / RAW, _raw(done))
        if done:
            draw_curves(done, self.root / CURVES)
        return table


def markdown_table(done: Sequence[tuple[Cell, Finished]]) -> str:
    """Returns a Markdown table for each experiment, one line a case, mean ± standard deviation over its seeds.

    Trajectories and seconds to the threshold are of the seeds that reached it; where not all did, it says how many.
    """
    heads = [
        "case",
        "seeds",
        f"trajectories to TV ≤ {CLOSE:g}",
        f"seconds to TV ≤ {CLOSE:g}",
        "trajectories",
        "TV at the end",
        "JS at the end, nats",
        "modes found",
        "seconds",
    ]
    lines: list[str] = []
    for name, cases in _by_case(done):
        lines += [
            f"## {name}: {EXPERIMENTS[name].question}",
            "",
            "| " + " | ".join(heads) + " |",
            "|---" * len(heads) + "|",
        ]
        for label, group in cases.items():
            last = [finished.last for finished in group]
            reached = [point for finished in group if (point := finished.reached) is not None]
            share = "" if len(reached) == len(group) else f" ({len(reached)} of {len(group)} seeds)"
            cells = [
                label,
                str(len(group)),
                spread([point.trajectories for point in reached], 0) + share,
                spread([point.seconds for point in reached], 2),
                str(last[0].trajectories),
                spread([point.total_variation for point in last], 4),
                spread([point.jensen_shannon for point in last], 5),
                f"{spread([point.modes for point in last], 1)} of {group[0].modes}",
                spread([point.seconds for point in last], 2),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def draw_curves(done: Sequence[tuple[Cell, Finished]], path: Path) -> None:
    """Draws total variation and modes found over trajectories, a row an experiment: mean and spread over seeds."""
    pyplot = headless_pyplot()
    experiments = list(_by_case(done))
    figure, axes = pyplot.subplots(
        len(experiments), 2, figsize=(15, 4.2 * len(experiments)), layout="constrained", squeeze=False
    )
    colours = pyplot.get_cmap("tab20").colors
    for (left, right), (name, cases) in zip(axes, experiments, strict=True):
        for (label, group), colour in zip(cases.items(), [*colours] * len(cases), strict=False):
            columns = list(zip(*(finished.curve for finished in group), strict=True))
            at = [points[0].trajectories for points in columns]
            distances = [[point.total_variation for point in points] for points in columns]
            found = [mean(point.modes for point in points) / max(1, group[0].modes) for points in columns]
            left.plot(at, [mean(values) for values in distances], color=colour)
            lows, highs = [min(values) for values in distances], [max(values) for values in distances]
            left.fill_between(at, lows, highs, color=colour, alpha=0.15, linewidth=0)
            right.plot(at, found, color=colour, label=f"{label} ({len(group)})")
        left.axhline(CLOSE, color="black", linewidth=0.8, linestyle=":")
        left.set(title=f"{name}: {EXPERIMENTS[name].question}", yscale="log")
        left.set(xlabel="trajectories", ylabel="total variation to R/Z, mean and range")
        right.set(title="share of modes found", xlabel="trajectories", ylim=(0, 1.05))
        right.legend(fontsize=8, title="case (seeds)", loc="center left", bbox_to_anchor=(1.01, 0.5))
    save_picture(figure, path, dpi=100)


def _by_case(done: Sequence[tuple[Cell, Finished]]) -> Iterator[tuple[str, dict[str, list[Finished]]]]:
    """Yields each experiment's name with the finished seeds of each of its cases, by label."""
    for name in EXPERIMENTS:
        cases: dict[str, list[Finished]] = {}
        for cell, finished in done:
            if cell.case.experiment == name:
                cases.setdefault(cell.case.label, []).append(finished)
        if cases:
            yield name, cases


def _raw(done: Sequence[tuple[Cell, Finished]]) -> str:
    """Returns one CSV line for each measurement of each cell, after a line of names."""
    rows: list[dict[str, object]] = []
    for cell, finished in done:
        case = cell.case
        for point in finished.curve:
            figures = asdict(point)
            row: dict[str, object] = {"experiment": case.experiment, "case": case.label, "problem": case.problem}
            row |= {"loss": case.training.loss, "seed": cell.seed, "modes_in_all": finished.modes}
            rows.append({**row, "loss_value": figures.pop("loss"), **figures})
    return csv_text(rows)
