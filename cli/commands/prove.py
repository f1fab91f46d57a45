"""`gflowvlm prove`: every loss on small problems whose exact answer is known."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from gflowvlm.run.console import terminal
from gflowvlm.run.interruption import INTERRUPTED
from gflowvlm.shared.errors import UserError

if TYPE_CHECKING:
    from gflowvlm.studies.proving.runs import Cell, ProvingFolder

SEEDS, QUICK_SEEDS = 4, 2


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def prove(
        experiments: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[EXPERIMENT]...",
                help="losses, losses-4d, lambda, forward-looking, incomplete, tree, walks; all of them by default.",
                show_default=False,
            ),
        ] = None,
        seeds: Annotated[
            int | None,
            typer.Option(
                min=1,
                help=f"Trainings of each case [default: {SEEDS}; {QUICK_SEEDS} with --quick].",
                show_default=False,
            ),
        ] = None,
        quick: Annotated[
            bool,
            typer.Option("--quick", help="Two seeds, 4,000 trajectories at most: a minute, too few for 4-D and paths."),
        ] = False,
        out: Annotated[Path, typer.Option(file_okay=False, help="Folder of table, curves and cells.")] = Path(
            "runs/prove"
        ),
    ) -> None:
        """Train small policies on small problems with every loss, and measure them exactly against R/Z.

        The losses are the ones that train the model. Nothing is sampled to measure: the policy's distribution
        over outcomes comes from dynamic programming. Writes `table.md`, `curves.csv` and `curves.png`; the same
        command goes on where it was stopped. `docs/proving.md` says what each experiment shows.

        Examples: `gflowvlm prove --quick`, `gflowvlm prove losses lambda`.
        """
        console = terminal()
        names = _known(experiments)
        _prove(console, names, seeds if seeds is not None else QUICK_SEEDS if quick else SEEDS, quick, out)


def _known(names: Sequence[str] | None) -> list[str]:
    from gflowvlm.studies.proving.experiments import EXPERIMENTS

    chosen = list(dict.fromkeys(names or EXPERIMENTS))
    for name in chosen:
        if name not in EXPERIMENTS:
            near = difflib.get_close_matches(name, EXPERIMENTS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(EXPERIMENTS)}"
            raise UserError(f"no experiment {name!r}: {hint}")
    return chosen


def _prove(console: Console, names: Sequence[str], seeds: int, quick: bool, out: Path) -> None:
    import torch

    from gflowvlm.studies.proving.experiments import EXPERIMENTS
    from gflowvlm.studies.proving.experiments import quick as shortened
    from gflowvlm.studies.proving.runs import CURVES, RAW, TABLE, Cell, ProvingFolder

    # Tensors this small are slower on two threads than on one.
    torch.set_num_threads(1)
    cases = [case for name in names for case in EXPERIMENTS[name].cases]
    cells = [Cell(shortened(case) if quick else case, seed) for case in cases for seed in range(seeds)]
    folder = ProvingFolder(out)

    try:
        _train(console, folder, cells)
    except KeyboardInterrupt:
        folder.write(cells)
        console.print(f"interrupted; finished cells are kept in {out}, the same command goes on", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    console.print(folder.write(cells), soft_wrap=True)
    message = f"written: {out / TABLE}, {out / RAW}, {out / CURVES}"
    console.print(message, soft_wrap=True)


def _train(console: Console, folder: "ProvingFolder", cells: Sequence["Cell"]) -> None:
    """Trains the cells that are not finished, with a bar on a terminal and a line for each cell."""
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cells))
        for number, cell in enumerate(cells, start=1):
            case, seed = cell.case, cell.seed
            if cell.key not in folder.finished:
                progress.update(task, description=f"{case.experiment}: {case.label}, seed {seed}")
                share = 1 / (case.training.evaluations + 1)
                for _ in folder.train(cell):
                    progress.advance(task, share)
                last = folder.finished[cell.key].last
                progress.console.print(
                    f"{number}/{len(cells)}  {case.experiment}: {case.label}, seed {seed}: "
                    f"total variation {last.total_variation:.4f}, modes {last.modes}, {last.seconds:.1f} s",
                    highlight=False,
                    soft_wrap=True,
                    markup=False,
                )
            progress.update(task, completed=number)
