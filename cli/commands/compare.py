"""`gflowvlm compare`: losses by seeds, one table."""

from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console

from gflowvlm.cli.option_errors import refuse_overrides
from gflowvlm.run.console import terminal
from gflowvlm.run.interruption import INTERRUPTED
from gflowvlm.run.paths import check_paths
from gflowvlm.run.preset_library import DEFAULT_PRESET, resolve_config
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.objective_settings import LossName
from gflowvlm.studies.child_process import run_command


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def compare(
        overrides: Annotated[
            list[str] | None,
            typer.Argument(metavar="[KEY=VALUE]...", help="Settings of all runs.", show_default=False),
        ] = None,
        losses: Annotated[
            str, typer.Option(help="Losses and baselines, with commas between [default: all].", show_default=False)
        ] = ",".join(get_args(LossName)),
        seeds: Annotated[int, typer.Option(min=1, help="Runs of each loss, with seeds 0, 1, …")] = 4,
        exact_instances: Annotated[
            int, typer.Option(min=0, help="Instances whose exact distribution is compared with the target; 0 for none.")
        ] = 2,
        out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the comparison.")] = Path("runs/compare"),
        preset: Annotated[
            str | None, typer.Option(help=f"Preset to start from [default: {DEFAULT_PRESET}].", show_default=False)
        ] = None,
        config: Annotated[Path | None, typer.Option(help="YAML file to start from instead of a preset.")] = None,
    ) -> None:
        """Train every loss with every seed, and compare what they reached.

        All of it takes hours: eight GFlowNet losses, sft, ppo and grpo with four seeds are 44 runs of about four
        minutes on two cores.

        Each run is a whole `gflowvlm train` with a folder of its own in --out, one after the other. The same
        command goes on where it was stopped: finished runs are kept, an unfinished one is resumed. After each
        run `table.md` (mean ± standard deviation over seeds, also after equally many environment steps), `runs.csv`
        and `curves.png` are written anew.

        Examples: `gflowvlm compare`, `gflowvlm compare --losses var_tb,ppo --seeds 2 learner.steps=100`.
        """
        console = terminal()
        refuse_overrides(overrides or [], {"seed": "--seeds", "objective.loss": "--losses"})
        configs = [
            resolve_config(preset, config, [*(overrides or []), f"objective.loss={loss}", f"seed={seed}"])
            for seed in range(seeds)
            for loss in _names(losses)
        ]
        _compare(console, configs, out, exact_instances)


def _names(losses: str) -> list[str]:
    names = [name.strip() for name in losses.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(f"--losses {losses!r}: name each loss once, with commas between")
    return names


def _compare(console: Console, configs: list[RunConfig], out: Path, exact_instances: int) -> None:
    from gflowvlm.studies.experiments.comparison import (
        CURVES,
        RAW,
        TABLE,
        ComparedRun,
        exact_check,
        exact_of,
        measure_exact,
        write_comparison,
    )

    for config in configs:
        check_paths(config)
    runs = [ComparedRun.of(config, out) for config in configs]
    for run in runs:
        run.prepare()
    check = None
    for number, run in enumerate(runs, start=1):
        if run.finished and (exact_instances == 0 or exact_of(run) == exact_instances):
            continue
        console.rule(f"run {number} of {len(runs)}: {run.variant}, seed {run.seed}")
        status = 0 if run.finished else run_command(["train", "--resume", str(run.folder.root)])
        if status == INTERRUPTED:
            console.print("interrupted; the same command goes on")
            raise typer.Exit(INTERRUPTED)
        if status != 0:
            raise UserError(
                f"{run.folder.root}: the run ended with status {status}, see above; the same command goes on"
            )
        if exact_instances > 0:
            if check is None:
                check = exact_check(run.config, exact_instances, console)
            measure_exact(run, check)
        write_comparison(runs, out)
    console.rule("comparison")
    console.print(write_comparison(runs, out), soft_wrap=True)
    message = f"written: {out / TABLE}, {out / RAW}, {out / CURVES}"
    console.print(message, soft_wrap=True)
