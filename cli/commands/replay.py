"""`gflowvlm replay`: what a run's rollout workers and experts have played."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gflowvlm.api.trajectories import Filters, Trajectories
from gflowvlm.cli.json_file import json_option, write_json_file
from gflowvlm.run.console import printable, terminal
from gflowvlm.shared.trajectory import Trajectory

SHOWN = 20
"""Trajectories on the screen without `--limit`."""


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def replay(
        run: Annotated[Path, typer.Argument(help="Folder of a run or of demonstrations.", show_default=False)],
        success: Annotated[
            bool | None, typer.Option("--success/--failed", help="Only those that solved the task, or did not.")
        ] = None,
        expert: Annotated[
            bool | None, typer.Option("--expert/--policy", help="Only the expert's, or only the policy's.")
        ] = None,
        task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
        split: Annotated[str | None, typer.Option(help="Only this split: id or ood.")] = None,
        version: Annotated[int | None, typer.Option(min=0, help="Only with an answer of this policy version.")] = None,
        min_version: Annotated[
            int | None, typer.Option(min=0, help="Only with all answers of this policy version or newer.")
        ] = None,
        group: Annotated[str | None, typer.Option(help="Only this group: its id or its number.")] = None,
        limit: Annotated[
            int | None,
            typer.Option(min=1, help=f"How many, the newest. [default: {SHOWN} on screen, all in a JSON file]"),
        ] = None,
        show: Annotated[bool, typer.Option("--show", help="Show each step: prompt, response, action, reward.")] = False,
        json_file: Annotated[Path | None, json_option("Also write them, pictures left out, to this file.")] = None,
    ) -> None:
        """List the trajectories of a run, or of a set of demonstrations, the newest last."""
        filters = Filters(success, expert, task, split, version, min_version, group)
        selected = Trajectories(run, filters)
        passed = len(selected)
        wanted = limit if limit is not None or json_file is not None else SHOWN
        trajectories = list(selected) if wanted is None else selected.newest(wanted)
        if json_file is not None:
            write_json_file({"matching": passed, "trajectories": [as_json(t) for t in trajectories]}, json_file)
        console = terminal()
        on_screen = trajectories[-(limit or SHOWN) :]
        if len(on_screen) == 0:
            console.print("no trajectory matches")
            return
        if show:
            for trajectory in on_screen:
                _show(console, trajectory)
        else:
            console.print(_table(on_screen))
        console.print(f"{len(on_screen)} of {passed} matching trajectories")


def as_json(trajectory: Trajectory) -> dict[str, Any]:
    """Returns a trajectory as plain values: the number of its images in place of them, NaN as null."""
    content = {**asdict(trajectory), "images": len(trajectory.images)}
    for step in content["steps"]:
        step["sampler_log_probs"] = [p if p == p else None for p in step["sampler_log_probs"]]
    return content


def _table(trajectories: list[Trajectory]) -> Table:
    table = Table(
        "trajectory", "instance", "solved", "end", "log R", "version", "actions", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    for column in table.columns[:-1]:
        column.no_wrap = True
    table.columns[-1].overflow = "fold"
    for trajectory in trajectories:
        versions = sorted({step.policy_version for step in trajectory.steps})
        table.add_row(
            trajectory.trajectory_id,
            f"{trajectory.split} {trajectory.instance_seed}",
            "yes" if trajectory.success else "no",
            trajectory.end.value,
            f"{trajectory.log_rewards[-1]:.2f}",
            "expert" if trajectory.expert else ", ".join(map(str, versions)),
            printable(" ".join("(malformed)" if action is None else action for action in trajectory.actions)),
        )
    return table


def _show(console: Console, trajectory: Trajectory) -> None:
    maker = "the expert" if trajectory.expert else "the policy"
    solved = "solved" if trajectory.success else "not solved"
    console.rule(f"{trajectory.trajectory_id}: {trajectory.instance_id} by {maker}", align="left")
    for t, step in enumerate(trajectory.steps):
        reward = f"log-reward {trajectory.log_rewards[t]:.3f}, original reward {trajectory.original_rewards[t]:g}"
        console.print(Text.assemble((f"step {t}", "bold"), f"  version {step.policy_version}, {reward}"))
        console.print(printable(step.prompt), style="dim")
        console.print(printable(step.response_text))
        action = "none" if step.action is None else printable(repr(step.action))
        console.print(Text.assemble("action ", (action, "bold"), f", {step.validity.value}"))
    console.print(
        f"end: {trajectory.end.value}, {solved}, outcome {printable(trajectory.outcome)}, "
        f"log-reward {trajectory.log_rewards[-1]:.3f}\n",
        highlight=False,
    )
