"""`gflowvlm replay`: what a run's rollout workers and experts have played."""

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gflowvlm.actors.trajectory_files import trajectory_files
from gflowvlm.cli.json_file import write_json_file
from gflowvlm.envs.base import SPLITS
from gflowvlm.run.folder import RunFolder
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.task_settings import task_names
from gflowvlm.shared.trajectory import SCHEMA_VERSION, TRAJECTORY_SCHEMA, Trajectory, from_arrow

SHOWN = 20
"""Trajectories on the screen without `--limit`."""


@dataclass(frozen=True)
class Filters:
    """Which trajectories are wanted; None leaves a property open.

    Attributes:
        success: Whether they solved the task.
        expert: Whether the expert made them.
        task: Name of the task.
        split: ``id`` or ``ood``.
        version: A policy version that answered at least one of their steps.
        min_version: The oldest policy version that may have answered a step.
        group: Group id, or group index as digits.
    """

    success: bool | None = None
    expert: bool | None = None
    task: str | None = None
    split: str | None = None
    version: int | None = None
    min_version: int | None = None
    group: str | None = None

    def check(self) -> None:
        """Raises UserError for a task or split that does not exist."""
        for option, value, known in (("--task", self.task, task_names()), ("--split", self.split, SPLITS)):
            if value is not None and value not in known:
                raise UserError(f"{option} {value!r}: there is no such {option[2:]}; use one of: {', '.join(known)}")

    def expression(self) -> ds.Expression | None:
        """Returns the part that Parquet can filter by itself."""
        wanted = {"success": self.success, "expert": self.expert, "task": self.task, "split": self.split}
        terms = [ds.field(name) == value for name, value in wanted.items() if value is not None]
        if self.group is not None:
            by_index = self.group.isdecimal()
            name = ds.field("group_id")
            terms.append(pc.starts_with(name, pattern=f"g{int(self.group):08d}-") if by_index else name == self.group)
        if len(terms) == 0:
            return None
        whole = terms[0]
        for term in terms[1:]:
            whole = whole & term
        return whole

    def by_version(self, batch: pa.RecordBatch) -> Iterator[int]:
        """Yields the rows of a batch whose steps fit the versions asked for."""
        if self.version is None and self.min_version is None:
            yield from range(batch.num_rows)
            return
        for row, steps in enumerate(batch["steps"]):
            versions = steps.values.field("policy_version").to_pylist()
            named = self.version is None or self.version in versions
            fresh = self.min_version is None or min(versions, default=-1) >= self.min_version
            if named and fresh:
                yield row


def find_trajectories(run: Path, filters: Filters, limit: int | None) -> tuple[list[Trajectory], int]:
    """Returns the newest `limit` trajectories that pass the filters, oldest first, and how many pass in all.

    Raises:
        UserError: No such run, no trajectories in it, or a damaged file, which the message names.
    """
    filters.check()
    dataset = _open(run)
    found: deque[pa.RecordBatch] = deque(maxlen=limit)
    passed = 0
    try:
        for batch in dataset.to_batches(filter=filters.expression()):
            for row in filters.by_version(batch):
                found.append(batch.slice(row, 1))
                passed += 1
        return from_arrow(pa.Table.from_batches(found, schema=TRAJECTORY_SCHEMA)), passed
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise UserError(f"{run}: its trajectories cannot be read ({_one_line(error)})") from None


def _open(run: Path) -> ds.Dataset:
    folder = RunFolder(run).trajectories
    if not run.is_dir():
        raise UserError(f"run {str(run)!r}: there is no such folder; give the folder of a run or of demonstrations")
    if not folder.is_dir():
        raise UserError(f"run {str(run)!r}: it holds no trajectories ({folder} does not exist)")
    dataset = ds.dataset([str(file) for file in trajectory_files(folder)], schema=TRAJECTORY_SCHEMA, format="parquet")
    for fragment in dataset.get_fragments():
        try:
            schema = fragment.physical_schema
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{fragment.path}: not a readable trajectory file ({_one_line(error)}); remove or restore it"
            ) from None
        if not schema.equals(TRAJECTORY_SCHEMA):
            raise UserError(
                f"{fragment.path}: not in the trajectory schema version {SCHEMA_VERSION}; made by another release?"
            )
    return dataset


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
        json_file: Annotated[
            Path | None, typer.Option("--json", help="Also write them, pictures left out, to this file.")
        ] = None,
    ) -> None:
        """List the trajectories of a run, or of a set of demonstrations, the newest last."""
        filters = Filters(success, expert, task, split, version, min_version, group)
        wanted = limit if limit is not None or json_file is not None else SHOWN
        trajectories, passed = find_trajectories(run, filters, wanted)
        if json_file is not None:
            write_json_file({"matching": passed, "trajectories": [as_json(t) for t in trajectories]}, json_file)
        console = Console()
        on_screen = trajectories[-(limit or SHOWN) :]
        if len(on_screen) == 0:
            console.print("no trajectory matches")
            return
        if show:
            for trajectory in on_screen:
                _show(console, trajectory)
        else:
            console.print(_table(on_screen))
        console.print(f"{len(on_screen)} of {passed} matching trajectories", highlight=False)


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
            _plain(" ".join("(malformed)" if action is None else action for action in trajectory.actions)),
        )
    return table


def _show(console: Console, trajectory: Trajectory) -> None:
    maker = "the expert" if trajectory.expert else "the policy"
    solved = "solved" if trajectory.success else "not solved"
    console.rule(f"{trajectory.trajectory_id}: {trajectory.instance_id} by {maker}", align="left")
    for t, step in enumerate(trajectory.steps):
        reward = f"log-reward {trajectory.log_rewards[t]:.3f}, original reward {trajectory.original_rewards[t]:g}"
        console.print(f"[bold]step {t}[/bold]  version {step.policy_version}, {reward}", highlight=False)
        console.print(_plain(step.prompt), style="dim", highlight=False)
        console.print(_plain(step.response_text), highlight=False)
        action = "none" if step.action is None else _plain(repr(step.action))
        console.print(f"action [bold]{action}[/bold], {step.validity.value}", highlight=False)
    console.print(
        f"end: {trajectory.end.value}, {solved}, outcome {_plain(trajectory.outcome)}, "
        f"log-reward {trajectory.log_rewards[-1]:.3f}\n",
        highlight=False,
    )


def _plain(text: str) -> str:
    """Returns model output that is safe to print: no markup, no terminal control characters."""
    return escape("".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
