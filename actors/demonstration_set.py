"""Sets of the expert's trajectories on disk, made by `gflowvlm demonstrate`.

A set is a folder: ``demonstrations.json`` says what made it, ``trajectories/`` holds numbered Parquet files in the
trajectory schema, as a run's folder does. What is read from it is untrusted, whoever made it.
"""

import io
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import Field, ValidationError

from gflowvlm.actors.trajectory_files import trajectory_files
from gflowvlm.run.folder import RunFolder
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.instances import DEMONSTRATION_SEEDS
from gflowvlm.shared.settings import Fraction, ModelName, Settings
from gflowvlm.shared.task_settings import AnyTaskSettings, TaskSettings
from gflowvlm.shared.trajectory import Trajectory, from_arrow, read_parquet

MANIFEST = "demonstrations.json"

INSTANCES = 2**20
"""Instances that a set's seed stands for. All of them are `DEMONSTRATION_SEEDS`: one word of entropy each."""

_FILES_KEPT = 4


class DemonstrationRequest(Settings):
    """What is asked of a set. The same request makes the same files.

    Attributes:
        task: The task's settings.
        split: ``id`` or ``ood``.
        trajectories: How many there are to be, each of another instance.
        seed: Seed of instances, wording and noise.
        noise: Probability that an action is a random admissible one.
        failures: Whether trajectories that did not succeed are kept, too.
        model: In whose tokens the responses are written: a shipped model, a model directory or a hub name.
    """

    task: AnyTaskSettings
    split: Literal["id", "ood"] = "id"
    trajectories: int = Field(1000, ge=1, le=200_000)
    seed: int = Field(0, ge=0, lt=len(DEMONSTRATION_SEEDS) // INSTANCES)
    noise: Fraction = 0.0
    failures: bool = False
    model: ModelName = "numberline-tiny"

    @property
    def first_instance(self) -> int:
        """Instance seed of the first episode; the others count on."""
        return DEMONSTRATION_SEEDS[self.seed * INSTANCES]


class DemonstrationFigures(Settings):
    """What became of a request.

    Attributes:
        played: Episodes played until there were enough.
        success: Share of them that succeeded.
        responses: Responses in the trajectories that were kept.
    """

    played: int = Field(ge=1)
    success: Fraction
    responses: int = Field(ge=1)


class DemonstrationManifest(Settings):
    """Content of a set's ``demonstrations.json``.

    Attributes:
        request: What was asked.
        figures: What became of it; None while the set is being made.
    """

    request: DemonstrationRequest
    figures: DemonstrationFigures | None = None


def read_manifest(folder: Path) -> DemonstrationManifest:
    """Returns what made a set.

    Raises:
        UserError: There is no set in the folder.
    """
    path = folder / MANIFEST
    try:
        return DemonstrationManifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{folder}: no demonstrations there ({MANIFEST}: {error.strerror}); `gflowvlm demonstrate TASK --out "
            f"{folder}` makes some"
        ) from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise UserError(
            f"{path}: tells of no demonstrations ({where}: {problem['msg']}); restore it, or make the set again"
        ) from None


class DemonstrationSet:
    """A finished set.

    Attributes:
        folder: Its folder.
        request: What was asked.
        figures: What became of it.
    """

    def __init__(self, folder: Path) -> None:
        """Opens a set: every file is looked at, none is read whole.

        Raises:
            UserError: There is no finished set in the folder, or not all of it.
        """
        self.folder = folder
        manifest = read_manifest(folder)
        if manifest.figures is None:
            raise UserError(f"{folder}: this set is not finished; the command that began it goes on with it")
        self.request, self.figures = manifest.request, manifest.figures
        try:
            self._files = trajectory_files(RunFolder(folder).trajectories)
        except OSError as error:
            raise UserError(f"{folder}: its trajectories cannot be read ({error.strerror})") from None
        self._places = {
            seed: (number, row)
            for number, path in enumerate(self._files)
            for row, seed in enumerate(read_parquet(path, ["instance_seed"])["instance_seed"].to_pylist())
        }
        if len(self._places) != self.request.trajectories:
            raise UserError(
                f"{folder}: holds demonstrations of {len(self._places)} instances, its {MANIFEST} tells of "
                f"{self.request.trajectories}; restore its files, or make the set again"
            )
        self._file = lru_cache(maxsize=_FILES_KEPT)(self._read)

    @classmethod
    def of_run(cls, config: RunConfig) -> "DemonstrationSet | None":
        """Returns the set that a run's `rollout.demonstrations` names, None without one.

        Raises:
            UserError: There is no such set, or it is of another task than the run.
        """
        if config.rollout.demonstrations is None:
            return None
        found = cls(Path(config.rollout.demonstrations))
        found.check_task(config.task)
        if found.request.split != "id":
            raise UserError(f"{found.folder}: these demonstrations are of split ood, which training does not play")
        return found

    @property
    def instance_seeds(self) -> list[int]:
        """The instances, in order."""
        return list(self._places)

    def check_task(self, settings: TaskSettings) -> None:
        """Raises UserError when the demonstrations are of another task, or of one with other settings."""
        own, wanted = self.request.task.model_dump(), settings.model_dump()
        if own["name"] != wanted["name"]:
            raise UserError(f"{self.folder}: its demonstrations are of task {own['name']!r}, not of {wanted['name']!r}")
        for key, value in wanted.items():
            if own[key] != value:
                raise UserError(
                    f"{self.folder}: its demonstrations were made with {key}={own[key]!r}, here task.{key} is "
                    f"{value!r}; make some with `gflowvlm demonstrate {settings.name} {key}=…`"
                )

    def trajectories(self) -> Iterator[Trajectory]:
        """Yields all trajectories, in order.

        Raises:
            UserError: One of them is damaged, or is no demonstration of the set's task; the message names its file.
        """
        for number in range(len(self._files)):
            yield from self._read(number)

    def find(self, instance_seed: int) -> Trajectory:
        """Returns the demonstration of an instance.

        Raises:
            UserError: Its file is damaged, or holds something else.
            KeyError: The set has none.
        """
        number, row = self._places[instance_seed]
        return self._file(number)[row]

    def _read(self, number: int) -> list[Trajectory]:
        path = self._files[number]
        table = read_parquet(path)
        try:
            found = from_arrow(table)
            for trajectory in found:
                self._check(trajectory)
        except (ValueError, TypeError) as error:
            reason = one_line(error)
            raise UserError(f"{path}: no demonstrations of this set ({reason}); make the set again") from None
        return found

    def _check(self, trajectory: Trajectory) -> None:
        """Raises ValueError or TypeError for what `gflowvlm demonstrate` never writes."""
        found = (trajectory.task, trajectory.split, trajectory.expert)
        wanted = (self.request.task.name, self.request.split, True)
        if found != wanted:
            raise ValueError(f"task, split and expert are {found}, not {wanted}")
        if not all(map(math.isfinite, [*trajectory.log_rewards, *trajectory.original_rewards])):
            raise ValueError(f"{trajectory.trajectory_id}: its rewards are not finite")
        if not all(0 <= step.image < len(trajectory.images) for step in trajectory.steps):
            raise ValueError(f"{trajectory.trajectory_id}: a picture is missing")
        side = self.request.task.image_size
        for encoded in trajectory.images:
            if _picture_size(encoded) != (side, side):
                raise ValueError(f"{trajectory.trajectory_id}: its pictures are not PNG of {side} x {side}")


def _picture_size(encoded: bytes) -> tuple[int, int] | None:
    """Returns width and height of a PNG whose checksums are right, None for anything else."""
    try:
        with Image.open(io.BytesIO(encoded), formats=["PNG"]) as picture:
            size = picture.size
            picture.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return size
