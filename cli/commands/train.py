"""`gflowvlm train`: the main job."""

import errno
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gflowvlm.run.console import terminal
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.interruption import INTERRUPTED
from gflowvlm.run.preset_library import DEFAULT_PRESET, resolve_config
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.shell import quoted
from gflowvlm.shared.trajectory import BASE_VERSION

LACKING = 1
"""Exit status of `--dry-run` when the run could not start on the cluster as it is, or does not fit its devices."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def train(
        overrides: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[KEY=VALUE]...",
                help="Settings to change, for example `learner.steps=20 objective.loss=subtb`.",
                show_default=False,
            ),
        ] = None,
        preset: Annotated[
            str | None, typer.Option(help=f"Preset to start from [default: {DEFAULT_PRESET}].", show_default=False)
        ] = None,
        config: Annotated[Path | None, typer.Option(help="YAML file to start from instead of a preset.")] = None,
        run: Annotated[Path | None, typer.Option(help="Folder of the new run [default: runs/NAME-DATE-TIME].")] = None,
        resume: Annotated[Path | None, typer.Option(help="Folder of a run to go on with.")] = None,
        dry_run: Annotated[
            bool,
            typer.Option(
                "--dry-run", help="Only show what the run asks for, its memory plan, and what cluster.address lacks."
            ),
        ] = False,
        gpu_memory: Annotated[
            float | None,
            typer.Option(
                "--gpu-memory", min=1, help="Memory of each GPU, GiB, to plan for; by default this machine's."
            ),
        ] = None,
    ) -> None:
        """Train a vision-language model with a GFlowNet loss.

        Rollout workers play the task with the policy server; the learner lowers the loss on what the
        replay buffer holds and publishes LoRA adapters back. Ctrl-C leaves a run that `--resume` goes on with.

        Examples: `gflowvlm train`, `gflowvlm train objective.loss=subtb learner.steps=100`,
        `gflowvlm train --preset numberline-7b --dry-run`, `gflowvlm train --resume runs/NAME`.
        """
        console = terminal()
        if resume is not None:
            if overrides or preset is not None or config is not None or run is not None:
                raise UserError("--resume takes the run's own configuration; leave out presets, files and settings")
            folder, resolved = _reopened(resume)
        else:
            folder, resolved = None, resolve_config(preset, config, overrides or [])
        if dry_run:
            from gflowvlm.cluster.launch.dry_run import dry_run as show

            has_room = show(console, resolved)
            fits = _show_memory(console, resolved, gpu_memory)
            raise typer.Exit(0 if has_room and fits else LACKING)
        _train(console, folder, resolved, run, gpu_memory)


def _reopened(directory: Path) -> tuple[RunFolder, RunConfig]:
    from gflowvlm.run.checkpoints import latest_checkpoint
    from gflowvlm.run.setup import open_run

    folder, config = open_run(directory)
    if folder.summary.exists():
        raise UserError(f"{directory}: this run has ended; look at it with `gflowvlm eval {quoted(directory)}`")
    from gflowvlm.learner.checkpoint import check_checkpoint

    checkpoint = latest_checkpoint(folder.checkpoints)
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    return folder, config


def _show_memory(console: Console, config: RunConfig, gpu_gib: float | None) -> bool:
    """Prints the memory plan, or why there is none; returns whether nothing speaks against the run.

    Where the model is not here, nothing that it would tell does.

    Raises:
        UserError: There is no such answer format.
    """
    from gflowvlm.cli.memory_table import show_memory_plan
    from gflowvlm.cluster.launch.known_memory import known_memory
    from gflowvlm.evaluation.model_check.report import check_model
    from gflowvlm.run.models import resolve_model
    from gflowvlm.run.paths import check_paths
    from gflowvlm.shared.answer_formats import answer_format

    answer_format(config.task.answer_format)
    try:
        check_paths(config)
    except UserError as error:
        console.print(f"no memory plan: {error}", highlight=False, soft_wrap=True)
        return True
    report = check_model(config, known_memory(config, gpu_gib), lambda what: None, whole=False)
    here = Path(resolve_model(config.policy.model)).is_dir()
    if report.memory is not None:
        show_memory_plan(console, report.memory)
    for line in report.problems:
        console.print(f"{'would not start' if here else 'no memory plan'}: {line}", highlight=False, soft_wrap=True)
    if report.memory is not None:
        return report.trainable and not report.memory.problems
    return report.trainable or not here


def _train(
    console: Console, folder: RunFolder | None, config: RunConfig, directory: Path | None, gpu_gib: float | None
) -> None:
    from gflowvlm.run.setup import new_run, run_lock

    _check(console, config, None if folder is not None else directory, gpu_gib)
    # Imported here so that --help and what is refused answer at once.
    from gflowvlm.cluster.driver.training_run import TrainingRun
    from gflowvlm.cluster.launch.ray_runtime import dashboard_line, ray_cluster, wait_for_resources

    folder = new_run(config, directory) if folder is None else folder
    console.print(f"run folder: {_shown(folder)}", soft_wrap=True)
    started = time.monotonic()
    try:
        with run_lock(folder), ray_cluster(config) as dashboard:
            if config.cluster.address is not None:
                wait_for_resources(config, lambda line: console.print(line, soft_wrap=True))
            if config.cluster.dashboard:
                console.print(dashboard_line(dashboard))
            report = TrainingRun(folder, config, console).run()
    except KeyboardInterrupt:
        go_on = f"gflowvlm train --resume {quoted(_shown(folder))}"
        console.print(f"\ninterrupted; go on with: {go_on}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        path = _shown(folder)
        raise UserError(
            f"{path}: {error.strerror}; free some space, then `gflowvlm train --resume {quoted(path)}`"
        ) from None
    show_report(console, folder, config.task.name, report, time.monotonic() - started)


def _check(console: Console, config: RunConfig, directory: Path | None, gpu_gib: float | None) -> None:
    """Refuses what cannot run before there is a folder: first what is seen at once, last what the model must tell.

    Raises:
        UserError: The run cannot start; the message says why.
    """
    from gflowvlm.run.paths import check_paths
    from gflowvlm.run.setup import check_new_run
    from gflowvlm.shared.answer_formats import answer_format

    answer_format(config.task.answer_format)
    check_paths(config)
    if directory is not None:
        check_new_run(directory)
    if config.cluster.address is None:
        from gflowvlm.cluster.launch.ray_runtime import check_local_ray

        note = check_local_ray(config)
        if note is not None:
            console.print(note, soft_wrap=True)
    from gflowvlm.actors.demonstration_set import DemonstrationSet
    from gflowvlm.cluster.launch.known_memory import known_memory
    from gflowvlm.evaluation.model_check.report import require_trainable

    require_trainable(config, known_memory(config, gpu_gib))
    DemonstrationSet.of_run(config)


def show_report(
    console: Console, folder: RunFolder, task: str, report: list[dict[str, object]], seconds: float
) -> None:
    """Prints what a run reached and what to type next.

    Args:
        console: Where.
        folder: The run's folder.
        task: Its task.
        report: The rows of its final report, in the order in which they are shown.
        seconds: How long it took.
    """
    from gflowvlm.run.final_report import measured_on

    console.print(f"before and after, on {measured_on([task])}:", soft_wrap=True)
    table = Table("")
    for row in report:
        policy = "base" if row["version"] == BASE_VERSION else f"version {row['version']}"
        table.add_column(f"{row['split']}\n{policy}")
    for key in (
        "success",
        "success_greedy",
        "success_bound",
        "div_at_n",
        "malformed_rate",
        "inadmissible_rate",
        "cut_rate",
        "mean_response_tokens",
        "total_variation",
        "total_variation_floor",
    ):
        values = [row[key] for row in report]
        table.add_row(key, *("-" if v is None else f"{v:.3f}" for v in values))
    console.print(table)
    path = _shown(folder)
    run = quoted(path)
    if all(row["version"] == BASE_VERSION for row in report):
        console.print(
            "no adapter evaluated better than the base model, so after is the base model too, sampled once more; "
            f"train longer (learner.steps), or look at an adapter: gflowvlm eval {run} --version N",
            soft_wrap=True,
        )
    console.print(f"done in {seconds / 60:.1f} minutes; learning curve: {path}/learning_curve.png", soft_wrap=True)
    console.print("what next:")
    for purpose, command in (
        ("watch the policy play", f"gflowvlm play {task} --player {run}"),
        ("a page with curves and trajectories", f"gflowvlm report {run}"),
        ("look at what it learned from", f"gflowvlm replay {run} --limit 5"),
        ("evaluate it again", f"gflowvlm eval {run} --split ood"),
        ("all curves", f"tensorboard --logdir {quoted(f'{path}/tensorboard')}"),
    ):
        # A line of its own, to be copied: beside its purpose it would not fit into 80 columns.
        console.print(f"  {purpose}:\n    {command}", soft_wrap=True)


def _shown(folder: RunFolder) -> Path:
    here = Path.cwd()
    return folder.root.relative_to(here) if folder.root.is_relative_to(here) else folder.root
