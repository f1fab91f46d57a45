"""`gflowvlm alfworld`: ALFWorld's games, listed and made."""

import os
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gflowvlm.envs.household.games import DATA_VARIABLE, VERSION_FOLDER, games_there, official_data
from gflowvlm.envs.household.generation import FOLDERS, GameSpec, generate, missing, specs
from gflowvlm.envs.household.scenes import SIZES
from gflowvlm.envs.household.starter import starter_set
from gflowvlm.envs.household.tasks import TaskType
from gflowvlm.run.console import terminal
from gflowvlm.run.interruption import INTERRUPTED
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.shell import quoted

PLAIN_EVERY = 25


def register(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    group = typer.Typer(no_args_is_help=True, help="List ALFWorld's games, or make some without its download.")
    app.add_typer(group, name="alfworld")

    @group.command(name="generate")
    def generate_games(
        folder: Annotated[Path, typer.Argument(help="Where the games go, in ALFWorld's own layout.", file_okay=False)],
        train: Annotated[int, typer.Option(min=0, help="Games of seen rooms, to train on.")] = 120,
        seen: Annotated[int, typer.Option(min=0, help="Games of seen rooms, to evaluate on.")] = 40,
        unseen: Annotated[int, typer.Option(min=0, help="Games of unseen rooms, to evaluate on.")] = 40,
        size: Annotated[
            str,
            typer.Option(
                help="; ".join(f"`{n}`: to {s.receptacles} places, {s.objects} things" for n, s in SIZES.items())
            ),
        ] = "small",
        task_type: Annotated[
            list[TaskType] | None,
            typer.Option(help="Only games of this type; may be given again [default: all six].", show_default=False),
        ] = None,
        seed: Annotated[int, typer.Option(min=0, max=2**31, help="Another seed makes other games.")] = 0,
        workers: Annotated[
            int | None, typer.Option(min=1, help="Processes [default: one a core].", show_default=False)
        ] = None,
    ) -> None:
        """Make games from the floor plans that alfworld ships, of all six task types unless told otherwise.

        Each is solved by the planner, and its solution played to the goal, before it is kept. The same seed makes
        the same games. The same command goes on where it was stopped, and adds to what is there.

        Play them: `ALFWORLD_DATA=FOLDER gflowvlm play alfworld --player expert`, or train with `task.games=FOLDER`.
        """
        console = terminal()
        if size not in SIZES:
            raise UserError(f"--size {size!r}: there is no such size; use {' or '.join(SIZES)}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); name another folder") from None
        types = tuple(dict.fromkeys(task_type or TaskType))
        wanted = specs(dict(zip(FOLDERS, (train, seen, unseen), strict=True)), size, seed, types)
        left = missing(folder, wanted)
        if len(left) < len(wanted):
            console.print(f"{len(wanted) - len(left)} of {len(wanted)} games are there already")
        try:
            _generate(console, folder, left, min(workers or os.cpu_count() or 1, max(len(left), 1)))
        except OSError as error:
            raise UserError(
                f"{folder}: a game cannot be written ({error.strerror or error}); those written stay, and the "
                "same command goes on"
            ) from None
        except KeyboardInterrupt:
            message = f"interrupted; finished games stay in {folder}, the same command goes on"
            console.print(message, soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None
        console.print(_table(folder))

    @group.command()
    def games(
        folder: Annotated[
            Path | None,
            typer.Argument(help="A folder of games [default: those that would be played].", show_default=False),
        ] = None,
    ) -> None:
        """Count the games of each split and task type.

        Without a folder: ALFWorld's data where it is installed (`ALFWORLD_DATA`), else the starter set.
        """
        console = terminal()
        root = folder or official_data() or starter_set()
        if not (root / VERSION_FOLDER).is_dir():
            raise UserError(
                f"{root}: no {VERSION_FOLDER} in it; `gflowvlm alfworld generate {quoted(root)}` makes games"
            )
        message = f"games in {root} (another folder: {DATA_VARIABLE}=FOLDER)"
        console.print(message, soft_wrap=True)
        console.print(_table(root))


def _generate(console: Console, folder: Path, left: list[GameSpec], workers: int) -> None:
    """Makes games, with a bar on a terminal and a line now and then elsewhere."""
    columns = (TextColumn("games"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(left))
        for made, _ in enumerate(generate(folder, left, workers), start=1):
            progress.update(bar, completed=made)
            if not console.is_terminal and (made % PLAIN_EVERY == 0 or made == len(left)):
                console.print(f"{made}/{len(left)} games")


def _table(root: Path) -> Table:
    table = Table("task type", *FOLDERS)
    counts = [Counter(game.task_type for game in games_there(root, folder, tuple(TaskType))) for folder in FOLDERS]
    for task_type in TaskType:
        table.add_row(task_type.value, *(str(count[task_type]) for count in counts))
    table.add_section()
    table.add_row("all", *(str(count.total()) for count in counts))
    return table
