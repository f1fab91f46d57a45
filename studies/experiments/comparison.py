"""Losses side by side: every loss with every seed, each a whole run of its own, and one table of them all."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from gflowvlm.evaluation.metrics import REPORT_SEED_OFFSET
from gflowvlm.run.adapters import published_adapter
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.files import write_whole
from gflowvlm.shared.trajectory import BASE_VERSION
from gflowvlm.studies.experiments.sweep import (
    PANELS,
    EvaluatedAt,
    Figures,
    SweepRun,
    cell,
    draw_curves,
    evaluations,
    markdown,
    report_figures,
    reported,
)
from gflowvlm.studies.tables import csv_text

if TYPE_CHECKING:
    from gflowvlm.evaluation.exact_check import ExactCheck

TABLE, RAW, CURVES = "table.md", "runs.csv", "curves.png"

EXACT = "exact.json"
"""In a run's folder: its exact match to the target, before and after training."""

EXACT_COMPARED = (
    "div_at_n",
    "target_div_at_n",
    "aim_div_at_n",
    "total_variation",
    "sequence_total_variation",
    "aim_total_variation",
    "aim_sequence_total_variation",
    "uncovered",
)
"""Figures of the exact match that are compared."""


BEFORE, TARGET, AIM = "before training", "R^β / Z", "what training aims at"
"""Lines of a table that are of the runs' start and of what they are measured against."""

_REACHED = {
    "success": "id_success",
    "Div@N": "id_div_at_n",
    "out-of-distribution success": "ood_success",
    "malformed": "id_malformed_rate",
    "total variation": "id_total_variation",
    "exact: Div@N": "exact_div_at_n",
    "exact: outcomes": "exact_total_variation",
    "exact: sequences": "exact_sequence_total_variation",
    "exact: outcomes, to the aim": "exact_aim_total_variation",
    "exact: sequences, to the aim": "exact_aim_sequence_total_variation",
    "exact: left uncovered": "exact_uncovered",
}
"""Columns of the first table; each has a figure before and one after training."""

_TOOK = {
    "success": "success_at_env_steps",
    "Div@N": "div_at_n_at_env_steps",
    "total variation": "total_variation_at_env_steps",
    "environment steps in all": "env_steps",
    "versions": "versions",
    "minutes": "minutes",
    "peak GiB": "peak_memory_gib",
}
"""Columns of the second table."""

_DIGITS = {"id_malformed_rate": 3, "env_steps": 0, "versions": 0, "minutes": 1, "peak_memory_gib": 1}
"""Digits after the point, where they are not two."""


@dataclass(frozen=True)
class ComparedRun(SweepRun):
    """One run of a comparison; its variant is its loss."""

    @classmethod
    def of(cls, config: RunConfig, out: Path) -> "ComparedRun":
        """Returns the run of a configuration in the comparison's folder: it stands in ``OUT/LOSS-SEED``."""
        return cls.in_folder(out, config.objective.loss, config)

    @property
    def exact(self) -> Path:
        """File of its exact match."""
        return self.folder.root / EXACT


def figures(run: ComparedRun) -> Figures:
    """Returns what a finished run reached: one row of `RAW`.

    Keys: ``loss``, ``seed``, those of `report_figures`, and where it was measured ``exact_FIGURE_before`` and
    ``exact_FIGURE_after`` for `EXACT_COMPARED`.

    Raises:
        UserError: Its summary cannot be read.
    """
    row: Figures = {"loss": run.variant, "seed": run.seed, **report_figures(run.folder)}
    with _exact_of(run) as exact:
        if exact is not None:
            row |= {f"exact_{n}_{when}": exact[when][n] for when in ("before", "after") for n in EXACT_COMPARED}
    return row


def exact_of(run: ComparedRun) -> int:
    """Returns of how many instances a run's exact match is; 0 where it was not measured.

    Raises:
        UserError: It cannot be read.
    """
    with _exact_of(run) as exact:
        return 0 if exact is None else int(exact["instances"])


@contextmanager
def _exact_of(run: ComparedRun) -> Iterator[dict[str, Any] | None]:
    """Yields a run's exact match; what is missing inside is the file's fault."""
    try:
        yield json.loads(run.exact.read_text(encoding="utf-8")) if run.exact.exists() else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{run.exact}: is no exact match ({error}); remove it and run again") from None


def exact_check(config: RunConfig, instances: int, console: Console) -> "ExactCheck":
    """Returns what measures the runs of a comparison: the first instances of their final reports."""
    # Brings torch, which the comparison does without otherwise.
    from gflowvlm.evaluation.exact_check import ExactCheck

    seed = config.evaluation.seed + REPORT_SEED_OFFSET
    return ExactCheck(config, split="id", seed=seed, instances=instances, console=console)


def measure_exact(run: ComparedRun, check: "ExactCheck") -> None:
    """Writes a finished run's exact match to the target into its folder; nothing where its tree is too large.

    Args:
        run: The run.
        check: The instances, and the base model that all runs of a comparison start from.
    """
    if check.base is None:
        return
    best = int(json.loads(run.folder.summary.read_text(encoding="utf-8"))["version"])
    match = check.base if best == BASE_VERSION else check.measure(published_adapter(run.folder, best))
    before_and_after = {"before": check.base.as_dict(), "after": match.as_dict()}
    measured = {"instances": check.instances, "version": best, **before_and_after}
    write_whole(run.exact, json.dumps(measured, indent=1))


def write_comparison(runs: Sequence[ComparedRun], out: Path) -> str:
    """Writes table, raw figures and curves of the finished runs into `out`; returns the table (Markdown)."""
    done = [run for run in runs if run.finished]
    evaluated = [evaluations(run.folder) for run in done]
    budget = min((found[-1].env_steps for found in evaluated if found), default=0)
    rows = [{**figures(run), **at_env_steps(found, budget)} for run, found in zip(done, evaluated, strict=True)]
    table = markdown_table(rows, budget)
    write_whole(out / TABLE, table)
    write_whole(out / RAW, csv_text(rows))
    draw_curves(done, out / CURVES, axis="env_steps")
    return table


def at_env_steps(evaluated: Sequence[EvaluatedAt], env_steps: int) -> Figures:
    """Returns a run's figures after so many environment steps, linear between the evaluations around.

    Keys: ``at_env_steps``, and ``FIGURE_at_env_steps`` for success, diversity and total variation; None where the run
    has no such evaluations.

    Args:
        evaluated: The run's evaluations while it trained, in their order.
        env_steps: Not more than the last one's.
    """
    found: Figures = {"at_env_steps": env_steps}
    for name in PANELS:
        points = [(e.env_steps, value) for e in evaluated if (value := reported(e.row, name)) is not None]
        at, values = [float(step) for step, _ in points], [float(value) for _, value in points]
        found[f"{name}_at_env_steps"] = float(np.interp(env_steps, at, values)) if points else None
    return found


def markdown_table(rows: Sequence[Figures], env_steps: int) -> str:
    """Returns two Markdown tables with one line a loss, mean ± standard deviation over its seeds.

    The first is of the final reports, and begins with the policies before training. Runs of as many learner steps
    do not play as many environment steps: where trajectories become shorter, they play fewer. So the second has
    their figures after equally many, with what the runs took.

    Args:
        rows: A run each: `figures` and `at_env_steps`.
        env_steps: Environment steps after which runs are compared: those of the run that played fewest.
    """
    by_loss: dict[str, list[Figures]] = defaultdict(list)
    for row in rows:
        by_loss[str(row["loss"])].append(row)
    heads = ["loss", "seeds"]
    reached = [
        [BEFORE, str(len(rows)), *(_cell(rows, f"{name}_before") for name in _REACHED.values())],
        *(_measured_against(rows, name, key) for name, key in ((TARGET, "target"), (AIM, "aim"))),
        *(
            [loss, str(len(of)), *(_cell(of, f"{name}_after") for name in _REACHED.values())]
            for loss, of in by_loss.items()
        ),
    ]
    took = [[loss, str(len(of)), *(_cell(of, name) for name in _TOOK.values())] for loss, of in by_loss.items()]
    first, second = markdown([*heads, *_REACHED], reached), markdown([*heads, *_TOOK], took)
    return f"{first}\nAfter {env_steps:,} environment steps, and in all:\n\n{second}"


def _measured_against(rows: Sequence[Figures], name: str, key: str) -> list[str]:
    """Returns the line of a distribution that policies are compared with: how diverse it is itself."""
    known = {"exact: Div@N": _cell(rows, f"exact_{key}_div_at_n_before")}
    return [name, "-", *(known.get(column, "-") for column in _REACHED)]


def _cell(rows: Sequence[Figures], name: str) -> str:
    return cell(rows, name, _DIGITS.get(name.removesuffix("_after").removesuffix("_before"), 2))
