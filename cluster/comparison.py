"""Several runs side by side: every loss with every seed, each a whole run of its own, and one table of them all."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console

from actors.sampling import BASE_VERSION
from cluster.evaluation import REPORT_SEED_OFFSET
from cluster.plots import headless_pyplot, save_picture
from cluster.run_log import read_rows
from cluster.run_setup import new_run, write_whole
from cluster.tables import csv_text, spread
from shared.config import RunConfig
from shared.config_io import dump_config, load_config
from shared.errors import UserError
from shared.run_folder import RunFolder

TABLE, RAW, CURVES = "table.md", "runs.csv", "curves.png"

EXACT = "exact.json"
"""In a run's folder: its exact match to the target, before and after training."""

EXACT_COMPARED = ("total_variation", "sequence_total_variation", "uncovered")
"""Figures of the exact match that are compared."""

COMPARED = ("success", "div_at_n", "total_variation", "malformed_rate")
"""Figures of the final report that are compared, before and after, in and out of distribution."""


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison.

    Attributes:
        loss: Its loss.
        seed: Its seed.
        config: Its configuration.
        folder: Its folder, whether it is there yet or not.
    """

    loss: str
    seed: int
    config: RunConfig
    folder: RunFolder

    @classmethod
    def of(cls, config: RunConfig, out: Path) -> "ComparedRun":
        """Returns the run of a configuration in the comparison's folder."""
        loss, seed = config.objective.loss, config.seed
        return cls(loss, seed, config, RunFolder((out / f"{loss}-{seed}").resolve()))

    @property
    def exact(self) -> Path:
        """File of its exact match."""
        return self.folder.root / EXACT

    @property
    def finished(self) -> bool:
        """Whether its final report is written."""
        return self.folder.summary.exists()

    def prepare(self) -> None:
        """Makes the run's folder, or checks that the one there belongs to this comparison.

        Raises:
            UserError: Another configuration made the folder.
        """
        if not self.folder.config.exists():
            new_run(self.config, self.folder.root)
        elif dump_config(load_config(self.folder.config)) != dump_config(self.config):
            raise UserError(f"{self.folder.root}: made with other settings; compare them in another --out")


def figures(run: ComparedRun) -> dict[str, float | int | str | None]:
    """Returns what a finished run reached: one row of `RAW`.

    Keys: ``loss``, ``seed``, ``steps``, ``versions``, ``env_steps``, ``minutes``, ``peak_memory_gib``, for each
    split and each figure of `COMPARED` ``SPLIT_FIGURE_before`` and ``SPLIT_FIGURE_after``, and where they were
    measured the same with ``exact_FIGURE`` for `EXACT_COMPARED`.

    Raises:
        UserError: Its summary cannot be read.
    """
    try:
        summary = json.loads(run.folder.summary.read_text(encoding="utf-8"))
        row: dict[str, float | int | str | None] = {
            "loss": run.loss,
            "seed": run.seed,
            "steps": summary["steps"],
            "versions": sum(path.is_dir() for path in run.folder.adapters.iterdir()),
            "minutes": None if summary.get("wall_s") is None else summary["wall_s"] / 60,
            "peak_memory_gib": summary["peak_memory_gib"],
        }
        for report in summary["report"]:
            when = "before" if report["version"] == BASE_VERSION else "after"
            row |= {f"{report['split']}_{name}_{when}": report[name] for name in COMPARED}
        played = [r["env_steps"] for r in read_rows(run.folder.metrics) if r["kind"] == "rollout"]
        row["env_steps"] = max(played, default=None)
        if run.exact.exists():
            exact = json.loads(run.exact.read_text(encoding="utf-8"))
            row |= {f"exact_{n}_{when}": exact[when][n] for when in ("before", "after") for n in EXACT_COMPARED}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{run.folder.summary}: is no summary of a run ({error}); remove it and run again") from None
    return row


def measure_exact(run: ComparedRun, runs: Sequence[ComparedRun], instances: int, console: Console) -> None:
    """Writes a finished run's exact match to the target into its folder; nothing where its tree is too large.

    Before training all runs of a comparison have the same policy, so that part is taken over from any of them.

    Args:
        run: The run.
        runs: All runs of the comparison.
        instances: Instances to expand: the first of the final report.
        console: Where progress is shown.
    """
    # Brings torch, which the comparison does without otherwise.
    from cluster.run_evaluation import exact_figures

    known = [json.loads(other.exact.read_text(encoding="utf-8")) for other in runs if other.exact.exists()]
    before = next((made["before"] for made in known if made["instances"] == instances), None)
    best = int(json.loads(run.folder.summary.read_text(encoding="utf-8"))["version"])
    found = exact_figures(
        run.folder.root,
        split="id",
        seed=run.config.evaluation.seed + REPORT_SEED_OFFSET,
        instances=instances,
        versions=[best] if before is not None else sorted({BASE_VERSION, best}),
        console=console,
    )
    if found is None:
        return
    before = found[BASE_VERSION] if before is None else before
    figures_of_both = {"instances": instances, "version": best, "before": before, "after": found[best]}
    write_whole(run.exact, json.dumps(figures_of_both, indent=1))


def write_comparison(runs: Sequence[ComparedRun], out: Path) -> str:
    """Writes table, raw figures and curves of the finished runs into `out`; returns the table (Markdown)."""
    done = [run for run in runs if run.finished]
    rows = [figures(run) for run in done]
    table = markdown_table(rows)
    write_whole(out / TABLE, table)
    write_whole(out / RAW, csv_text(rows))
    draw_curves(done, out / CURVES)
    return table


def markdown_table(rows: Sequence[dict[str, float | int | str | None]]) -> str:
    """Returns a Markdown table with one line a loss, mean ± standard deviation over its seeds."""
    by_loss: dict[str, list[dict[str, float | int | str | None]]] = defaultdict(list)
    for row in rows:
        by_loss[str(row["loss"])].append(row)
    columns = {
        "success": "id_success",
        "Div@N": "id_div_at_n",
        "total variation": "id_total_variation",
        "exact, outcomes": "exact_total_variation",
        "exact, sequences": "exact_sequence_total_variation",
        "out-of-distribution success": "ood_success",
        "malformed": "id_malformed_rate",
    }
    totals = {
        "environment steps": ("env_steps", 0),
        "versions": ("versions", 0),
        "minutes": ("minutes", 1),
        "peak GiB": ("peak_memory_gib", 1),
    }
    heads = ["loss", "seeds", *(f"{name}, before → after" for name in columns), *totals]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for loss, group in by_loss.items():
        cells = [loss, str(len(group))]
        for name in columns.values():
            digits = 3 if name.endswith("rate") else 2
            cells.append(" → ".join(_spread(group, f"{name}_{when}", digits) for when in ("before", "after")))
        cells += [_spread(group, name, digits) for name, digits in totals.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_curves(runs: Iterable[ComparedRun], path: Path) -> None:
    """Draws success, diversity and distribution match over learner steps: mean and spread over each loss's seeds."""
    pyplot = headless_pyplot()
    by_loss: dict[str, dict[int, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for row in read_rows(run.folder.metrics):
            if row["kind"] == "evaluation" and row["split"] == "id":
                by_loss[run.loss][row["step"]].append(row)
    panels = {"success": "success at temperature 1", "div_at_n": "Div@N", "total_variation": "total variation to R/Z"}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 4), layout="constrained")
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        for loss, at in by_loss.items():
            steps = sorted(step for step, rows in at.items() if all(row[name] is not None for row in rows))
            values = [[row[name] for row in at[step]] for step in steps]
            middle = [mean(v) for v in values]
            deviations = [stdev(v) if len(v) > 1 else 0.0 for v in values]
            (line,) = axis.plot(steps, middle, "o-", label=f"{loss} ({max(map(len, values), default=0)} seeds)")
            low, high = ([m + sign * s for m, s in zip(middle, deviations, strict=True)] for sign in (-1, 1))
            axis.fill_between(steps, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        axis.set(title=title, xlabel="learner step")
        axis.set_ylim(bottom=0, top=None if name == "div_at_n" else 1.02)
        axis.legend(fontsize=8)
    save_picture(figure, path)


def _spread(rows: Sequence[dict[str, float | int | str | None]], key: str, digits: int) -> str:
    """Returns ``mean ± sd`` of the rows that have the figure, ``-`` when none has."""
    values = [float(value) for row in rows if (value := row.get(key)) is not None]
    # A whole number that is the same in all runs, such as the versions, has no deviation worth a column.
    return spread(values if digits > 0 else [mean(values)] if values else [], digits)
