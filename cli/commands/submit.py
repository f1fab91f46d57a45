"""`gflowvlm submit`: sends a run to a Ray cluster."""

import shlex
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from gflowvlm.run.console import terminal
from gflowvlm.run.interruption import INTERRUPTED
from gflowvlm.run.paths import configured_paths
from gflowvlm.run.preset_library import DEFAULT_PRESET, named_config
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError

if TYPE_CHECKING:
    from gflowvlm.cluster.launch.jobs import Job, Jobs

FAILED = 1
"""Exit status when the run itself failed."""

Address = Annotated[
    str | None,
    typer.Option(
        help="URL of the cluster's dashboard [default: $RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265].",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def submit(
        overrides: Annotated[
            list[str] | None,
            typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, as for `train`.", show_default=False),
        ] = None,
        address: Address = None,
        name: Annotated[
            str | None, typer.Option(help="The run's name [default: NAME-DATE-TIME].", show_default=False)
        ] = None,
        preset: Annotated[
            str | None, typer.Option(help=f"Preset to start from [default: {DEFAULT_PRESET}].", show_default=False)
        ] = None,
        config: Annotated[Path | None, typer.Option(help="YAML file, here, to start from instead of a preset.")] = None,
        run: Annotated[
            str | None,
            typer.Option(
                help="Folder of the run on the cluster, absolute, on a disk that all nodes share "
                "[default: the run's name under $GFLOWVLM_RUNS of the cluster, or under ~/gflowvlm-runs].",
                show_default=False,
            ),
        ] = None,
        resume: Annotated[
            str | None, typer.Option(help="Name, or absolute folder on the cluster, of a run to go on with.")
        ] = None,
        detach: Annotated[bool, typer.Option("--detach", help="Do not follow the log.")] = False,
    ) -> None:
        """Send a run to a Ray cluster as a job, and follow its log.

        This installation's code travels with it; models and data must be there. Ctrl-C ends only the following.
        `gflowvlm jobs` lists runs, `gflowvlm logs NAME` follows one, `gflowvlm stop NAME` ends one so that
        `gflowvlm submit --resume NAME` goes on with it.

        Examples: `gflowvlm submit --name first learner.steps=100`,
        `gflowvlm submit --address http://head:8265 --preset numberline-7b`, `gflowvlm submit --resume first`.
        """
        console = terminal()
        if resume is not None:
            if preset is not None or config is not None or run is not None or name is not None:
                raise UserError("--resume takes the run's own name and configuration; leave out --name, --run and such")
            job, jobs = _resume(console, address, resume, overrides or [])
        else:
            job, jobs = _new(console, address, named_config(preset, config, overrides or []), name, run)
        console.print(f"submitted as {job.id}")
        if detach:
            _print_next_step(console, job.run)
            return
        follow(console, jobs, job)


def _new(
    console: Console, address: str | None, config: RunConfig, name: str | None, run: str | None
) -> tuple["Job", "Jobs"]:
    from gflowvlm.cluster.launch.jobs import Jobs, check_name

    if run is not None and not PurePosixPath(run).is_absolute():
        raise UserError(f"--run {run!r}: give an absolute path on the cluster, or only --name")
    if name is None:
        name = PurePosixPath(run).name if run is not None else f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_name(name)
    _check_paths(console, config)
    jobs = Jobs(address)
    return jobs.submit(name, config, run, lambda line: say(console, line)), jobs


def _resume(console: Console, address: str | None, run: str, overrides: list[str]) -> tuple["Job", "Jobs"]:
    from gflowvlm.cluster.launch.jobs import Jobs, check_name, placement_of

    if any(not override.startswith("cluster.control_") for override in overrides):
        raise UserError("--resume takes the run's own settings, except cluster.control_resources and _node_labels")
    placement = placement_of(named_config(None, None, overrides).cluster) if overrides else None
    path = PurePosixPath(run)
    if len(path.parts) > 1 and not path.is_absolute():
        raise UserError(f"--resume {run!r}: give the run's name, or an absolute path on the cluster")
    check_name(path.name)
    jobs = Jobs(address)
    folder = str(path) if path.is_absolute() else None
    return jobs.resume(path.name, folder, placement, lambda line: say(console, line)), jobs


def follow(console: Console, jobs: "Jobs", job: "Job") -> None:
    """Shows a job's log to its end; a job that failed or was stopped ends the command with its own status."""
    try:
        job = jobs.follow(job, lambda text: typer.echo(text, nl=False), lambda line: say(console, line))
    except KeyboardInterrupt:
        console.print(f"\nno longer following; {job.run} goes on")
        _print_next_step(console, job.run)
        raise typer.Exit(INTERRUPTED) from None
    if job.status == "STOPPED":
        say(console, f"{job.run} was stopped; go on with: gflowvlm submit --resume {job.run}")
        raise typer.Exit(INTERRUPTED)
    if job.status == "FAILED":
        say(console, f"{job.run} failed" + ("" if job.ran else f": {job.message}"))
        raise typer.Exit(FAILED)
    say(console, f"{job.run} has ended")


def _check_paths(console: Console, config: RunConfig) -> None:
    """Refuses paths that mean nothing on the cluster, and says which are looked for there."""
    for path in configured_paths(config):
        if not PurePosixPath(path.value).is_absolute():
            raise UserError(
                f"{path.key} = {path.value!r} is a path of this machine; give an absolute one of the cluster"
            )
        say(console, f"{path.key} = {shlex.quote(path.value)} must be on the cluster: only the code travels with a job")


def say(console: Console, line: str) -> None:
    """Shows a line as it is, however long it is."""
    console.print(line, soft_wrap=True)


def _print_next_step(console: Console, name: str) -> None:
    console.print(f"  gflowvlm logs {name}     follow it\n  gflowvlm stop {name}     end it")
