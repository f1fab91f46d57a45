"""`gflowvlm experiment`: the paper's experiments, by name."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gflowvlm.cli.option_errors import refuse_overrides
from gflowvlm.run.console import terminal
from gflowvlm.run.interruption import INTERRUPTED
from gflowvlm.shared.errors import UserError

if TYPE_CHECKING:
    from gflowvlm.studies.experiments.trials import Selection


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def experiment(
        name: Annotated[str | None, typer.Argument(help="Which one; --list shows all.", show_default=False)] = None,
        overrides: Annotated[
            list[str] | None,
            typer.Argument(metavar="[KEY=VALUE]...", help="Settings of all runs.", show_default=False),
        ] = None,
        scale: Annotated[
            str, typer.Option(help="`tiny`: the shipped models on two cores; `paper`: the 7B presets on GPUs.")
        ] = "tiny",
        seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant, with seeds 0, 1, …")] = 4,
        only: Annotated[
            list[str] | None,
            typer.Option(metavar="VARIANT", help="Run only this variant; can be given again.", show_default=False),
        ] = None,
        out: Annotated[
            Path | None,
            typer.Option(file_okay=False, help="Folder [default: runs/experiments/NAME-SCALE].", show_default=False),
        ] = None,
        concurrent: Annotated[int, typer.Option(min=1, max=1024, help="Runs at a time.")] = 1,
        retries: Annotated[int, typer.Option(min=0, max=100, help="How often a failed run is tried again.")] = 1,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Only show the runs, their settings and how long they will take.")
        ] = False,
        list_all: Annotated[bool, typer.Option("--list", help="Only list the experiments.")] = False,
    ) -> None:
        """Rerun an experiment of the paper: every variant with every seed, one table beside the paper's.

        Each run is a whole `gflowvlm train` with a folder of its own in --out, which `gflowvlm report`, `eval`
        and `replay` take. The same command goes on where it was stopped: finished runs are kept, unfinished
        ones resumed. After each run `table.md`, `runs.csv`, `figure.png` and `curves.png` are written anew,
        of all finished runs in the folder.

        Examples: `gflowvlm experiment motivating`, `gflowvlm experiment cot-weight --seeds 2 --dry-run`,
        `gflowvlm experiment numberline-blackjack --only numberline-db-off-policy-sft-start`.
        """
        from gflowvlm.studies.experiments.description import SCALES

        console = terminal()
        refuse_overrides(overrides or [], {"seed": "--seeds"})
        if list_all:
            _list(console)
            return
        if name is None:
            raise UserError("which experiment? `gflowvlm experiment --list` shows them")
        known = next((known for known in SCALES if known == scale), None)
        if known is None:
            raise UserError(f"--scale {scale!r}: there is no such scale; use {' or '.join(SCALES)}")
        from gflowvlm.studies.experiments.catalog import find_experiment
        from gflowvlm.studies.experiments.running import run_experiment
        from gflowvlm.studies.experiments.trials import Selection

        selection = Selection(
            find_experiment(name),
            known,
            seeds,
            tuple(only or ()),
            tuple(overrides or ()),
            Path("runs/experiments") / f"{name}-{scale}" if out is None else out,
        )
        if dry_run:
            _show_trials(console, selection, concurrent)
        elif not run_experiment(selection, console, concurrent=concurrent, retries=retries):
            console.print("interrupted; the same command goes on")
            raise typer.Exit(INTERRUPTED)


def _list(console: Console) -> None:
    from gflowvlm.studies.experiments.catalog import EXPERIMENTS

    table = Table("name", "variants", "in the paper", "what is asked")
    for experiment in EXPERIMENTS.values():
        table.add_row(experiment.name, str(len(experiment.variants)), experiment.source, experiment.title)
    console.print(table)


def _show_trials(console: Console, selection: "Selection", concurrent: int) -> None:
    from gflowvlm.studies.experiments.progress import expected_minutes, minutes_left, minutes_text

    chosen = selection.trials()
    todo = [trial for trial in chosen.chosen if not trial.finished]
    if any(trial.finished and not trial.recorded for trial in chosen.chosen):
        raise UserError(f"{selection.out}: holds finished runs made with other settings; name another --out")
    by_name = {trial.variant.slug: trial for trial in chosen.chosen}
    for slug, trial in by_name.items():
        config = trial.run.config
        unfinished = sum(other.variant.slug == slug for other in todo)
        model, preset = Path(config.policy.model).name, trial.variant.preset(selection.scale)
        runs = f"{unfinished} of {selection.seeds} runs to do: {preset}, model {model}, {config.learner.steps} steps"
        # As they were given: brackets in a setting are no markup.
        settings = Text(" ".join((*trial.variant.overrides, *selection.overrides)))
        # No table: in a narrow one, names that --only takes and settings that are copied would be cut.
        console.print(f"{slug}: {runs}", soft_wrap=True)
        console.print(Padding(settings, (0, 0, 0, 4)))
    for line in chosen.left_out:
        console.print(line, soft_wrap=True)
    for start, folder in chosen.warm_starts:
        made = f"made first: {folder}: gflowvlm sft {shlex.join(start.arguments)}"
        console.print(made, soft_wrap=True)
    longest = max((trial.run.config.learner.steps for trial in todo), default=0)
    per_run = expected_minutes(list(selection.finished()), selection.scale, longest)
    left = minutes_text(minutes_left([0.0] * len(todo), per_run, concurrent))
    message = f"runs to do: {len(todo)}, in {selection.out}; time: {left}"
    console.print(message, soft_wrap=True)
