"""Runs that belong together: each a whole run with a folder of its own, told apart by variant and seed."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from types import MappingProxyType
from typing import Any, Literal, Self

from gflowvlm.evaluation.learning_curve import headless_pyplot, save_picture
from gflowvlm.run.adapters import adapter_versions
from gflowvlm.run.final_report import before_and_after
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.log import Row, read_rows
from gflowvlm.run.setup import new_run
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.config_io import dump_config, load_config
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import BASE_VERSION
from gflowvlm.studies.tables import spread

Figures = dict[str, float | int | str | None]
"""What a run reached, by name: one row of a sweep's CSV file."""

REPORTED = ("success", "div_at_n", "total_variation", "malformed_rate")
"""Figures of a run's final report that are compared, before and after, in and out of distribution."""

PANELS: Mapping[str, str] = MappingProxyType(
    {"success": "success at temperature 1", "div_at_n": "Div@N", "total_variation": "total variation to R/Z"}
)

Axis = Literal["step", "env_steps"]

_LEGEND_INSIDE = 6
"""Variants that a legend inside a panel has room for."""

_LINES = ("-", "--", ":")

_AXIS_TITLES: Mapping[Axis, str] = {"step": "learner step", "env_steps": "environment steps"}


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        variant: What it is a run of.
        seed: Its seed.
        config: Its configuration.
        folder: Its folder, whether it is there yet or not.
    """

    variant: str
    seed: int
    config: RunConfig
    folder: RunFolder

    @classmethod
    def in_folder(cls, out: Path, variant: str, config: RunConfig) -> Self:
        """Returns the run of a variant in the sweep's folder: it stands in ``OUT/VARIANT-SEED``."""
        return cls(variant, config.seed, config, RunFolder((out / f"{variant}-{config.seed}").resolve()))

    @property
    def finished(self) -> bool:
        """Whether its final report is written."""
        return self.folder.summary.exists()

    @property
    def prepared(self) -> bool:
        """Whether its folder is there and was made with its configuration."""
        path = self.folder.config
        return path.exists() and dump_config(load_config(path)) == dump_config(self.config)

    def prepare(self) -> None:
        """Makes the run's folder, or checks that the one there is its own.

        Raises:
            UserError: Another configuration made the folder.
        """
        if not self.folder.config.exists():
            new_run(self.config, self.folder.root)
        elif not self.prepared:
            raise UserError(f"{self.folder.root}: made with other settings; compare them in another --out")


def report_figures(folder: RunFolder) -> Figures:
    """Returns what a finished run reached, by its own final report.

    Keys: ``steps``, ``versions``, ``minutes``, ``peak_memory_gib``, for each split and each figure of `REPORTED`
    ``SPLIT_FIGURE_before`` and ``SPLIT_FIGURE_after``, and ``env_steps``.

    Raises:
        UserError: Its summary cannot be read.
    """
    try:
        summary = json.loads(folder.summary.read_text(encoding="utf-8"))
        figures: Figures = {
            "steps": summary["steps"],
            # Numbered without reuse, and the newest is never removed.
            "versions": max(adapter_versions(folder), default=BASE_VERSION),
            "minutes": None if summary.get("wall_s") is None else summary["wall_s"] / 60,
            "peak_memory_gib": summary["peak_memory_gib"],
        }
        for split, pair in before_and_after(summary["report"], summary["version"]).items():
            for when, row in pair._asdict().items():
                if row is not None:
                    figures |= {f"{split}_{name}_{when}": reported(row, name) for name in REPORTED}
        played = [row["env_steps"] for row in read_rows(folder.metrics) if row["kind"] == "rollout"]
        return {**figures, "env_steps": max(played, default=None)}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder.summary}: is no summary of a run ({error}); remove it and run again") from None


def reported(row: Row, figure: str) -> Any:
    """Returns a figure of an evaluation; None for Div@N where nothing was solved, of which it is a mean."""
    return None if figure == "div_at_n" and row["success"] == 0.0 else row[figure]


@dataclass(frozen=True)
class EvaluatedAt:
    """One evaluation while a run trained.

    Attributes:
        step: Learner steps done.
        env_steps: Environment steps played for training until then.
        row: Its figures.
    """

    step: int
    env_steps: int
    row: Row


_Curves = dict[str, dict[int, list[EvaluatedAt]]]
"""By variant and learner step, the evaluations of its seeds."""


def evaluations(folder: RunFolder) -> list[EvaluatedAt]:
    """Returns the evaluations in distribution that were made while a run trained, in their order."""
    rows = read_rows(folder.metrics)
    played = [(row["step"], row["env_steps"]) for row in rows if row["kind"] == "rollout"]
    found = []
    for row in rows:
        if row["kind"] == "evaluation" and row["split"] == "id":
            # Rollouts that run while the base model is evaluated have taught the policy nothing yet.
            before = [env_steps for step, env_steps in played if step <= row["step"]] if row["step"] > 0 else []
            found.append(EvaluatedAt(row["step"], max(before, default=0), row))
    return found


def cell(rows: Sequence[Figures], key: str, digits: int, factor: float = 1.0) -> str:
    """Returns ``mean ± sd`` of the rows that have a figure, and how many have where not all do; ``-`` when none has.

    Args:
        rows: One a seed.
        key: The figure.
        digits: Digits after the point.
        factor: What it is multiplied by.
    """
    values = [factor * float(value) for row in rows if (value := row.get(key)) is not None]
    # A whole number that is the same in all runs, such as the versions, has no deviation worth a column.
    text = spread(values if digits > 0 or len(set(values)) > 1 else values[:1], digits)
    return text if len(values) in (0, len(rows)) else f"{text} ({len(values)} of {len(rows)})"


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*rows, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def draw_curves(
    runs: Iterable[SweepRun],
    path: Path,
    names: Mapping[str, str] | None = None,
    axis: Axis = "step",
) -> None:
    """Draws success, diversity and distribution match while training: mean and spread over a variant's seeds.

    Each task has a row of panels. What no evaluation has, as the distribution match where the target is not known, has
    no panel.

    Args:
        runs: The runs; those without evaluations are left out.
        path: Where the picture goes (PNG).
        names: What variants are called in it; by default as they are.
        axis: What the figures are drawn over. Seeds are averaged at equal learner steps.
    """
    pyplot = headless_pyplot()
    by_task: dict[str, _Curves] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for run in runs:
        for evaluated in evaluations(run.folder):
            by_task[run.config.task.name][run.variant][evaluated.step].append(evaluated)
    curves = list(by_task.values()) or [{}]
    most = max(len(by_variant) for by_variant in curves)
    crowded = most > _LEGEND_INSIDE
    rows = [e.row for by_variant in curves for at in by_variant.values() for found in at.values() for e in found]
    shown = {name: title for name, title in PANELS.items() if any(row[name] is not None for row in rows)} or PANELS
    size = (16 if crowded else 13, len(curves) * max(4.0, 0.22 * most))
    figure, axes = pyplot.subplots(len(curves), len(shown), figsize=size, layout="constrained", squeeze=False)
    for panels, by_variant in zip(axes, curves, strict=True):
        for panel, (name, title) in zip(panels, shown.items(), strict=True):
            _draw_panel(panel, by_variant, name, names, axis)
            panel.set(title=title, xlabel=_AXIS_TITLES[axis])
            panel.set_ylim(bottom=0, top=None if name == "div_at_n" else 1.02)
            if panel.lines and not crowded:
                panel.legend(fontsize=8)
        if crowded:
            outside = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0)}
            panels[-1].legend(*panels[0].get_legend_handles_labels(), fontsize=8, **outside)
    save_picture(figure, path)


def _draw_panel(panel: Any, by_variant: _Curves, name: str, names: Mapping[str, str] | None, axis: Axis) -> None:
    for index, (variant, at) in enumerate(by_variant.items()):
        steps = sorted(step for step, found in at.items() if all(reported(e.row, name) is not None for e in found))
        if len(steps) > 0:
            label = variant if names is None else names[variant]
            style = {"color": f"C{index % 10}", "linestyle": _LINES[index // 10 % len(_LINES)]}
            _draw_curve(panel, [at[step] for step in steps], name, label, axis, style)


def _draw_curve(
    panel: Any,
    points: Sequence[Sequence[EvaluatedAt]],
    name: str,
    label: str,
    axis: Axis,
    style: Mapping[str, str],
) -> None:
    at = [mean(e.step if axis == "step" else e.env_steps for e in point) for point in points]
    values = [[e.row[name] for e in point] for point in points]
    middle = [mean(v) for v in values]
    deviations = [stdev(v) if len(v) > 1 else 0.0 for v in values]
    seeds = max(map(len, values))
    (line,) = panel.plot(at, middle, marker="o", **style, label=f"{label} ({seeds} seed{'s' if seeds > 1 else ''})")
    low, high = ([m + sign * s for m, s in zip(middle, deviations, strict=True)] for sign in (-1, 1))
    panel.fill_between(at, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
