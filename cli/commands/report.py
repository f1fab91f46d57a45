"""`gflowvlm report`: one HTML file that shows a run."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gflowvlm.cli.json_file import check_can_be_written
from gflowvlm.run.console import terminal
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.log import read_rows
from gflowvlm.run.setup import open_run
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.files import write_whole

LIMIT = 1000
"""Trajectories in a page without `--limit`."""


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def report(
        run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.", show_default=False)],
        out: Annotated[
            Path | None,
            typer.Option(
                help="HTML file to write [default: report.html in the run].", show_default=False, dir_okay=False
            ),
        ] = None,
        limit: Annotated[int, typer.Option(min=1, help="The most trajectories to show.")] = LIMIT,
        instance: Annotated[
            str | None,
            typer.Option(
                metavar="TASK/SPLIT/SEED",
                help="Instance whose tree is shown first, with all of its trajectories.",
                show_default=False,
            ),
        ] = None,
    ) -> None:
        """Write a run as one HTML page: curves, tables, every trajectory, and trees against the target.

        The page needs nothing else: open it in a browser, send it to somebody. Of a large run it shows --limit
        trajectories, whole groups at even distances over the run.

        Example: `gflowvlm report runs/numberline-tiny-20260101-120000`.
        """
        if out is not None:
            check_can_be_written("--out", out)
        page = run_page(run, limit, instance)
        path = out if out is not None else run / "report.html"
        try:
            write_whole(path, page)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); name another file with --out") from None
        size = path.stat().st_size / 1e6
        message = f"{path} ({size:.1f} MB); open it in a browser"
        terminal().print(message, soft_wrap=True)


def run_page(run: Path, limit: int, instance: str | None) -> str:
    """Returns the page of a run.

    Args:
        run: The run's folder.
        limit: The most trajectories to show.
        instance: Id of the instance whose tree is opened first.

    Raises:
        UserError: There is no run, one of its files is damaged, or nothing of the instance was played.
    """
    # Here, because it brings tokenizers and the tasks, which the command line starts without.
    from gflowvlm.studies.report.page import write_page
    from gflowvlm.studies.report.selection import select_trajectories
    from gflowvlm.studies.report.trajectory_data import Pictures, trajectory_data

    folder, config = open_run(run)
    selection = select_trajectories(folder.trajectories, limit, instance)
    pictures = Pictures()
    trajectories = trajectory_data(selection.trajectories, config, pictures, instance)
    return write_page(
        folder.root.name, config, read_rows(folder.metrics), _summary(folder), selection, trajectories, pictures
    )


def _summary(folder: RunFolder) -> dict[str, Any] | None:
    if not folder.summary.exists():
        return None
    try:
        summary = json.loads(folder.summary.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder.summary}: cannot be read ({error}); remove it to see the run without it") from None
    if not isinstance(summary, dict):
        raise UserError(f"{folder.summary}: is no summary of a run; remove it to see the run without it")
    return summary
