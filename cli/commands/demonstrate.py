"""`gflowvlm demonstrate`: the expert's trajectories as Parquet files, to learn from."""

import time
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gflowvlm.actors.demonstration_set import DemonstrationRequest, DemonstrationSet
from gflowvlm.cli.option_errors import first_problem
from gflowvlm.run.console import terminal
from gflowvlm.run.interruption import INTERRUPTED
from gflowvlm.run.plain_progress import PLAIN_INTERVAL_S
from gflowvlm.shared.config_io import override_task
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.task_settings import TaskSettings, default_settings, task_names

FAILURES_SHOWN = 5
"""Episodes whose environments failed that are named; the others are counted."""


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def demonstrate(
        task: Annotated[str, typer.Argument(help=f"The task: {', '.join(task_names())}.")],
        task_settings: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[KEY=VALUE]...", help="Settings of the task, as in `prompt=markov`.", show_default=False
            ),
        ] = None,
        *,
        out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the set; a new or an empty one.")],
        trajectories: Annotated[int, typer.Option(help="How many, each of another instance; up to 200,000.")] = 1000,
        split: Annotated[str, typer.Option(help="`id` (as in training) or `ood`.")] = "id",
        seed: Annotated[int, typer.Option(help="Another seed, to 2047, has other instances and wordings.")] = 0,
        noise: Annotated[float, typer.Option(help="Share of random actions among the expert's.")] = 0.0,
        failures: Annotated[
            bool, typer.Option("--failures", help="Keep trajectories that did not succeed, too.")
        ] = False,
        model: Annotated[
            str,
            typer.Option(
                help="In whose tokens responses are written. What learns from the set writes them in its own."
            ),
        ] = "numberline-tiny",
    ) -> None:
        """Write the expert's trajectories of a task as Parquet files, to learn from.

        Only successes are kept unless told otherwise. No instance is one that training or an evaluation plays.
        The same command makes the same files, and goes on where it was stopped.

        Look at them: `gflowvlm replay DIR`

        Learn from them: `gflowvlm sft --demonstrations DIR`, or `gflowvlm train rollout.demonstrations=DIR`

        A noisy set of the household tasks, for a prompt without history: `gflowvlm demonstrate alfworld
        prompt=markov --out sets/alfworld --noise 0.2`
        """
        console = terminal()
        request = _request(
            override_task(default_settings(task), task_settings or []),
            {"split": split, "trajectories": trajectories, "seed": seed, "noise": noise, "failures": failures}
            | {"model": model},
        )
        started = time.monotonic()
        try:
            made = _make(console, request, out)
        except KeyboardInterrupt:
            message = f"interrupted; what is written stays in {out}, the same command goes on"
            console.print(message, soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None
        _say(console, made, time.monotonic() - started)


def _request(task: TaskSettings, options: dict[str, object]) -> DemonstrationRequest:
    try:
        return DemonstrationRequest.model_validate({"task": task, **options})
    except ValidationError as error:
        raise UserError(first_problem(error, {})) from None


def _make(console: Console, request: DemonstrationRequest, out: Path) -> DemonstrationSet:
    """Makes the set, with a bar on a terminal and a line now and then elsewhere."""
    # Imported here, because --help and wrong arguments do without transformers and its start-up time.
    from gflowvlm.warm_starts.recording import make_demonstrations

    printed, failed = time.monotonic(), 0
    columns = (TextColumn("trajectories"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=request.trajectories)

        def show(there: int) -> None:
            nonlocal printed
            progress.update(bar, completed=there)
            if not console.is_terminal and time.monotonic() - printed >= PLAIN_INTERVAL_S:
                printed = time.monotonic()
                console.print(f"{there}/{request.trajectories} trajectories")

        def say_failure(failure: str) -> None:
            nonlocal failed
            failed += 1
            if failed <= FAILURES_SHOWN:
                console.print(f"left out: {failure}", soft_wrap=True)

        made = make_demonstrations(request, out, show, say_failure)
    if failed > FAILURES_SHOWN:
        console.print(f"left out: {failed} episodes in all whose environments failed")
    return made


def _say(console: Console, made: DemonstrationSet, seconds: float) -> None:
    request, figures = made.request, made.figures
    console.print(
        f"{request.trajectories} trajectories of {request.task.name}, split {request.split}, in "
        f"{made.folder}: "
        f"{figures.responses} responses; {figures.success:.1%} of {figures.played} episodes succeeded. {seconds:.0f} s",
        highlight=False,
        soft_wrap=True,
    )
