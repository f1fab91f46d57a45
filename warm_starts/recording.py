"""Making sets of demonstrations: the expert plays, and its trajectories are written."""

import asyncio
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gflowvlm.actors.demonstration_set import (
    INSTANCES,
    MANIFEST,
    DemonstrationFigures,
    DemonstrationManifest,
    DemonstrationRequest,
    DemonstrationSet,
    read_manifest,
)
from gflowvlm.actors.environment_hosts import EnvironmentHosts
from gflowvlm.actors.environments import (
    EnvironmentFailedError,
    EnvironmentLostError,
)
from gflowvlm.actors.episode import play_demonstration
from gflowvlm.actors.groups import GroupRequest
from gflowvlm.actors.trajectory_files import TrajectoryFiles, trajectory_files
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.folder_lock import LOCK, folder_lock
from gflowvlm.run.models import resolve_model
from gflowvlm.run.paths import check_paths, with_absolute_paths
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.files import write_whole
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import Trajectory, read_parquet, to_record_batch

CHUNK = 64
"""Episodes that are played for one file."""

MAX_FAILED_AT_START = 8
"""Episodes that their environments' code makes fail, before any that can be played, after which no more are tried."""

LOST_TRIES = 5
"""Times that one episode may lose its process to others."""

MAX_WITHOUT_SUCCESS = 1024
"""Episodes without any success after which no more are played."""


def make_demonstrations(
    request: DemonstrationRequest,
    folder: Path,
    on_progress: Callable[[int], None],
    on_failure: Callable[[str], None],
) -> DemonstrationSet:
    """Makes a set, or goes on with the same one where it was stopped; a finished one is left as it is.

    Args:
        request: What is asked.
        folder: The set's folder.
        on_progress: Called with the number of trajectories there are, now and then.
        on_failure: Called with the instance and the reason of each episode that its environment's code makes fail;
            the set does without it.

    Raises:
        UserError: The folder holds something else, is in use or cannot be written, or the expert cannot play as asked.
    """
    request = with_absolute_paths(request)
    check_paths(request)
    inputs = PolicyInputs.load(resolve_model(request.model), request.task.answer_format)
    if folder.is_dir() and not (folder / MANIFEST).exists() and any(path.name != LOCK for path in folder.iterdir()):
        raise UserError(f"{folder}: is not empty, and holds no demonstrations; choose another --out")
    held = UserError(f"{folder}: another `gflowvlm demonstrate` is writing there; wait for it, or choose another --out")
    with folder_lock(folder, held):
        if not _is_finished(request, folder):
            _make(request, folder, inputs, on_progress, on_failure)
    return DemonstrationSet(folder)


def _make(
    request: DemonstrationRequest,
    folder: Path,
    inputs: PolicyInputs,
    on_progress: Callable[[int], None],
    on_failure: Callable[[str], None],
) -> None:
    """Plays what the set still lacks."""
    directory = RunFolder(folder).trajectories
    files = TrajectoryFiles(directory)
    there = trajectory_files(directory)
    chunk = min(CHUNK, request.trajectories)
    first, kept = len(there) * chunk, sum(read_parquet(path, ["instance_seed"]).num_rows for path in there)
    without_success = failed = 0
    with _expert(request, inputs) as play:
        while kept < request.trajectories:
            on_progress(kept)
            if without_success >= MAX_WITHOUT_SUCCESS or first + chunk > INSTANCES:
                raise UserError(
                    f"{folder}: the expert succeeded in {kept} of {first} episodes, and {request.trajectories} "
                    "successes are asked for; lower --noise, or keep what fails with --failures"
                )
            outcomes = play(range(first, first + chunk))
            played = [outcome for outcome in outcomes if isinstance(outcome, Trajectory)]
            for failure in (outcome for outcome in outcomes if not isinstance(outcome, Trajectory)):
                on_failure(str(failure))
                failed += 1
                if failed >= MAX_FAILED_AT_START and first == 0 and not played:
                    raise failure
            chosen = [t for t in played if request.failures or t.success][: request.trajectories - kept]
            files.append(to_record_batch(chosen))
            first, kept = first + chunk, kept + len(chosen)
            without_success = 0 if len(chosen) > 0 else without_success + chunk
    on_progress(kept)
    _write_manifest(folder, DemonstrationManifest(request=request, figures=_figures(request, directory)))


def _is_finished(request: DemonstrationRequest, folder: Path) -> bool:
    """Begins a set, or makes sure that the one in the folder is the same; returns whether that is finished."""
    try:
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder)
            for key, value in manifest.request:
                if value != getattr(request, key):
                    raise UserError(f"{folder}: holds demonstrations made with another {key}; choose another --out")
            return manifest.figures is not None
        _write_manifest(folder, DemonstrationManifest(request=request))
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror or error})") from None
    return False


def _write_manifest(folder: Path, manifest: DemonstrationManifest) -> None:
    write_whole(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def _figures(request: DemonstrationRequest, directory: Path) -> DemonstrationFigures:
    """Returns what became of a request, read from its files: the same wherever it was stopped in between."""
    columns = ("instance_seed", "success", "original_rewards")
    tables = [read_parquet(path, columns) for path in trajectory_files(directory)]
    rows = [row for table in tables for row in table.to_pylist()]
    played = rows[-1]["instance_seed"] - request.first_instance + 1
    return DemonstrationFigures(
        played=played,
        success=sum(row["success"] for row in rows) / played,
        responses=sum(len(row["original_rewards"]) for row in rows),
    )


@contextmanager
def _expert(
    request: DemonstrationRequest, inputs: PolicyInputs
) -> Iterator[Callable[[Sequence[int]], list[Trajectory | EnvironmentFailedError]]]:
    """Yields what plays episodes by their numbers and returns their trajectories, or why there are none, in order."""
    # One process a core; the steps of other tasks are shorter than the way to one.
    processes = (os.cpu_count() or 1) if request.task.in_own_process else 0
    hosts = EnvironmentHosts(request.task, processes)

    async def play_all(numbers: Sequence[int]) -> list[Trajectory | EnvironmentFailedError]:
        at_once = asyncio.Semaphore(max(1, 2 * processes))

        async def play_one(number: int) -> Trajectory | EnvironmentFailedError:
            seed = request.first_instance + number
            what = (inputs, GroupRequest(number, seed, request.split), f"d{seed}", request.seed, request.noise)
            async with at_once:
                for tries in itertools.count(1):
                    try:
                        return await play_demonstration(hosts.open(number), *what)
                    except EnvironmentFailedError as failure:
                        return failure
                    except EnvironmentLostError:
                        # Mostly another one has ended their process; that one is named, and not played again.
                        if tries == LOST_TRIES:
                            raise
            raise AssertionError("unreachable")

        try:
            async with asyncio.TaskGroup() as tasks:
                playing = [tasks.create_task(play_one(number)) for number in numbers]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in playing]

    try:
        with asyncio.Runner() as loop:
            yield lambda numbers: loop.run(play_all(numbers))
    except EnvironmentLostError as lost:
        raise UserError(f"{lost}; the same command goes on") from None
    finally:
        hosts.close()
