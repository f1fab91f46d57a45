"""A vision-language model around a pretrained language model: joined, taught to read pictures, then warm-started."""

import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from rich.console import Console

from gflowvlm.envs.base import TaskEnv
from gflowvlm.envs.registry import make_env
from gflowvlm.learner.alignment import AlignmentProgress, AlignmentSettings, VisionAlignment, WrittenPicture
from gflowvlm.learner.pretrained_policy import join_pretrained, read_gguf
from gflowvlm.run.models import resolve_model, shipped_model_of
from gflowvlm.run.plain_progress import PLAIN_INTERVAL_S
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.instances import DEMONSTRATION_SEEDS
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.settings import Settings
from gflowvlm.shared.task_settings import TaskSettings
from gflowvlm.warm_starts import supervised
from gflowvlm.warm_starts.demonstrations import instance_sources, reading_source
from gflowvlm.warm_starts.language_models import LANGUAGE_MODELS, language_model_file
from gflowvlm.warm_starts.supervised import SftRequest


class MakeModelRequest(Settings):
    """What is asked of one making of a model.

    Attributes:
        language_model: One of `LANGUAGE_MODELS`, or a GGUF file.
        vision: Shipped model, or folder of a model that `gflowvlm sft` made of ``tiny``, whose vision tower is taken;
            None for the shipped model of the task.
        pictures: How many pictures the vision tower learns to read from.
        alignment: The settings of that.
        sft: The warm start; its model is the one that is made.
    """

    language_model: str
    vision: str | None = None
    pictures: int = Field(16_384, ge=1, le=10_000_000)
    alignment: AlignmentSettings = AlignmentSettings()
    sft: SftRequest = SftRequest()


def make_model(request: MakeModelRequest, out: Path, console: Console) -> bool:
    """Makes the model and writes it into `out`.

    Until the warm start begins nothing stands in `out`; from then on it is a training of `gflowvlm sft`, which writes
    checkpoints and can be resumed.

    Returns:
        Whether it came to its end (and was not stopped by Ctrl-C).

    Raises:
        UserError: The language model is not there or of another kind, there is no vision tower for the task, or `out`
            is in use.
    """
    supervised.refuse_used(out)
    task = request.sft.task
    gguf = language_model_file(request.language_model)
    vision = request.vision if request.vision is not None else shipped_model_of(task.name)
    if vision is None:
        raise UserError(f"--vision: no shipped model is of {task.name}; name one, or a folder that `gflowvlm sft` made")
    console.print(f"Reading {gguf.name} and the vision tower of {vision}.", markup=False, soft_wrap=True)
    network, inputs = join_pretrained(*read_gguf(gguf), resolve_model(vision), request.sft.sft.seed)
    made: dict[str, Any] = {"language_model": _origin(request.language_model, gguf), "vision": vision}
    read = _align(network, inputs, request, console)
    if read is not None:
        made |= {"alignment": request.alignment.model_dump(), "pictures_read": round(read, 4)}
    with tempfile.TemporaryDirectory(prefix="gflowvlm-made-", dir=_existing(out)) as folder:
        joined = Path(folder)
        network.save_pretrained(joined)
        inputs.processor.save_pretrained(joined)
        del network
        (joined / supervised.REPORT).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        return supervised.start(request.sft.model_copy(update={"model": folder}), out, console)


def written_pictures(task: TaskSettings, out_of_distribution: bool, count: int, seed: int) -> list[WrittenPicture]:
    """Returns pictures of random play with the words that stand in them; none where the task's pictures hold none.

    Half are of the instances that demonstrations are played on, half of those that reading is learned best from.
    """
    sources = [*instance_sources(task, out_of_distribution), reading_source(task, out_of_distribution)]
    rng = np.random.default_rng(seed)
    pictures: list[WrittenPicture] = []
    for source in sources:
        played = _played(make_env(source.settings), source.split, rng)
        for _ in range(math.ceil(count * source.share / 2)):
            picture = next(played)
            if len(picture.words) == 0:
                return []
            pictures.append(picture)
    return pictures


def _played(environment: TaskEnv, split: str, rng: np.random.Generator) -> Iterator[WrittenPicture]:
    while True:
        environment.reset(
            seed=DEMONSTRATION_SEEDS[int(rng.integers(len(DEMONSTRATION_SEEDS)))], options={"split": split}
        )
        while environment.end is None:
            yield WrittenPicture(environment.image_png(), tuple(environment.picture_words()))
            actions = environment.admissible_actions
            environment.step(actions[int(rng.integers(len(actions)))])


def _align(network: Any, inputs: PolicyInputs, request: MakeModelRequest, console: Console) -> float | None:
    """Teaches the vision tower to read; returns the share of pictures it reads, None where they hold no words."""
    console.print(f"Drawing {request.pictures} pictures to learn reading from.")
    pictures = written_pictures(request.sft.task, request.sft.ood, request.pictures, request.alignment.seed)
    if len(pictures) == 0:
        console.print(f"Pictures of {request.sft.task.name} hold no words: its connector is taught by the warm start.")
        return None
    alignment = VisionAlignment(network, inputs, pictures, request.alignment)
    printed = time.monotonic()

    def show(progress: AlignmentProgress) -> None:
        nonlocal printed
        if progress.step == request.alignment.steps or time.monotonic() - printed >= PLAIN_INTERVAL_S:
            printed = time.monotonic()
            console.print(f"reading: step {progress.step}/{request.alignment.steps}  loss {progress.loss:.3f}")

    alignment.train(show)
    read = alignment.share_read()
    console.print(f"The vision tower reads {read:.1%} of the pictures.", highlight=False)
    return read


def _origin(name: str, gguf: Path) -> dict[str, str]:
    packaged = LANGUAGE_MODELS.get(name)
    if packaged is None:
        return {"file": str(gguf)}
    return {"package": f"{packaged.distribution} {packaged.version}", "file": gguf.name, "licence": packaged.licence}


def _existing(folder: Path) -> Path:
    """Returns the nearest folder above one that exists: its disk is the one that the model is for."""
    parent = folder.resolve().parent
    while not parent.exists():
        parent = parent.parent
    return parent
