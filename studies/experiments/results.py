"""What an experiment's finished trials reached: table, raw figures and pictures."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from gflowvlm.run.final_report import measured_on
from gflowvlm.run.log import Row
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.files import write_whole
from gflowvlm.studies.experiments.description import PAPER, PAPER_MODEL, Column, Experiment
from gflowvlm.studies.experiments.plots import draw_plot
from gflowvlm.studies.experiments.sweep import (
    Figures,
    cell,
    draw_curves,
    evaluations,
    markdown,
    report_figures,
    reported,
)
from gflowvlm.studies.experiments.trials import Trial
from gflowvlm.studies.tables import csv_text

TABLE, RAW, PICTURE, CURVES = "table.md", "runs.csv", "figure.png", "curves.png"

GOOD_SUCCESS = 0.75
"""Success whose environment steps are counted."""

STEPS_TO_GOOD = "env_steps_to_75"

AT_START, AT_END = "success_at_start", "success_at_end"
"""Success on the instances by which the best adapter is chosen: of the base model, and when training had ended."""

LOST = 0.5
"""A run is lost when it ends with less than this share of the success that it began with."""

_TOTALS = {
    "environment steps": "env_steps",
    f"environment steps to {100 * GOOD_SUCCESS:g} %": STEPS_TO_GOOD,
    "minutes": "minutes",
}


def write_results(experiment: Experiment, trials: Sequence[Trial], out: Path) -> str:
    """Writes table, raw figures, picture and training curves of finished trials into `out`.

    Returns:
        The table, with what it is of (Markdown).

    Raises:
        UserError: What a trial reached cannot be read.
    """
    rows = [figures(experiment, trial) for trial in trials]
    text = page(experiment, rows)
    write_whole(out / TABLE, text)
    write_whole(out / RAW, csv_text(rows))
    draw_plot(experiment, by_variant(rows), out / PICTURE)
    names = {variant.slug: variant.name for variant in experiment.variants}
    draw_curves([trial.run for trial in trials], out / CURVES, names, experiment.axis)
    return text


def figures(experiment: Experiment, trial: Trial) -> Figures:
    """Returns what a finished trial reached: one row of `RAW`.

    Keys: ``variant``, ``seed``, ``model``, those of the experiment's columns (shares as shares, None where a figure
    is not known), those of `report_figures` that are no figures of an evaluation, `STEPS_TO_GOOD`, `AT_START` and
    `AT_END`.

    Raises:
        UserError: What it reached cannot be read.
    """
    config = trial.run.config
    row: Figures = {"variant": trial.variant.name, "seed": config.seed, "model": config.policy.model}
    for column in experiment.columns:
        row[column.key] = _figure(trial, column)
    reached = report_figures(trial.run.folder)
    row |= {name: reached[name] for name in ("steps", "versions", "env_steps", "minutes", "peak_memory_gib")}
    course = evaluations(trial.run.folder)
    good = (e.env_steps for e in course if e.row["success"] >= GOOD_SUCCESS)
    begun = course[0].row["success"] if course and course[0].step == 0 else None
    ended = course[-1].row["success"] if course else None
    return {**row, STEPS_TO_GOOD: next(good, None), AT_START: begun, AT_END: ended}


def page(experiment: Experiment, rows: Sequence[Figures]) -> str:
    """Returns the table with what it is of, as Markdown."""
    models = sorted({Path(str(row["model"])).name for row in rows})
    played = {row["variant"] for row in rows}
    tasks = {variant.task for variant in experiment.variants if variant.name in played}
    known = any(variant.paper for variant in experiment.variants)
    said = [
        f"# {experiment.name}: {experiment.title}",
        "",
        f"{experiment.source} of {PAPER}. Ours: {', '.join(models) or 'no run yet'}; mean ± standard deviation over "
        f"the seeds, of the adapter that evaluated best, on {measured_on(tasks)}. "
        + (f"Paper: {PAPER_MODEL}, four seeds. " if known else "")
        + "Shares are in percent.",
        "",
        table(experiment, rows),
    ]
    return "\n".join([*said, *(f"* {note}" for note in (*experiment.notes, *lost_runs(rows)))]) + "\n"


def table(experiment: Experiment, rows: Sequence[Figures]) -> str:
    """Returns a Markdown table with a line for each variant that has a run; the paper's figures stand beside ours."""
    grouped = by_variant(rows)
    with_paper = {key for variant in experiment.variants for key in variant.paper}
    heads = ["variant", "seeds"]
    for column in experiment.columns:
        heads += [column.title, "paper"] if column.key in with_paper else [column.title]
    lines = []
    for variant in experiment.variants:
        group = grouped.get(variant.name, [])
        if len(group) == 0:
            continue
        cells = [variant.name, str(len(group))]
        for column in experiment.columns:
            digits, factor = (1, 100.0) if column.percent else (2, 1.0)
            cells.append(cell(group, column.key, digits, factor))
            if column.key in with_paper:
                known = variant.paper.get(column.key)
                cells.append("-" if known is None else f"{known:.{digits}f}")
        cells += [cell(group, key, 1 if key == "minutes" else 0) for key in _TOTALS.values()]
        lines.append(cells)
    return markdown([*heads, *_TOTALS], lines)


def lost_runs(rows: Sequence[Figures]) -> list[str]:
    """Returns a line for each variant with a run that unlearned what it began with: the table has its best adapter."""
    lines = []
    for variant, group in by_variant(rows).items():
        lost = [row for row in group if _is_lost(row)]
        if len(lost) > 0:
            fell = f"{cell(lost, AT_START, 1, 100.0)} percent to {cell(lost, AT_END, 1, 100.0)}"
            lines.append(
                f"{variant}: in {len(lost)} of {len(group)} runs success fell from {fell} while training; "
                "the table has the best adapter, which came before, or is the start itself."
            )
    return lines


def by_variant(rows: Sequence[Figures]) -> dict[str, list[Figures]]:
    """Returns the rows by the name of their variant."""
    grouped: dict[str, list[Figures]] = defaultdict(list)
    for row in rows:
        grouped[str(row["variant"])].append(row)
    return grouped


def _is_lost(row: Figures) -> bool:
    begun, ended = row[AT_START], row[AT_END]
    return isinstance(begun, int | float) and isinstance(ended, int | float) and ended < LOST * begun


def _figure(trial: Trial, column: Column) -> float | None:
    found = trial.report(column.split, column.before) if column.temperature == 1.0 else _evaluation(trial, column)
    # Runs of earlier releases have no figures by kind of task.
    value = reported(found, column.figure) if column.figure in found else None
    if column.category is not None and value is not None:
        value = value.get(column.category)
    return value if value is None else float(value)


def _evaluation(trial: Trial, column: Column) -> Row:
    path = trial.evaluation(column.split, column.temperature)
    try:
        row: Row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is no evaluation ({error}); remove it, and the same command makes it again") from None
    return row
