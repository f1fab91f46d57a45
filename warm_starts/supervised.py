"""One supervised fine-tuning: from demonstrations to a model directory with its figures."""

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gflowvlm.actors.demonstration_set import DemonstrationSet
from gflowvlm.envs.base import SPLITS
from gflowvlm.envs.registry import environment_class, make_env
from gflowvlm.learner.sft import ExampleSource, SftSettings, check_demonstrations, load_for_sft
from gflowvlm.learner.sft_trainer import SftProgress, SftTrainer
from gflowvlm.learner.sft_weights import scale_head
from gflowvlm.learner.tiny_policy import build_tiny_policy
from gflowvlm.run.folder_lock import folder_lock
from gflowvlm.run.interruption import STOPPING, handled_by, termination_as_interrupt
from gflowvlm.run.models import resolve_model
from gflowvlm.run.paths import check_paths, with_absolute_paths
from gflowvlm.run.plain_progress import PLAIN_INTERVAL_S
from gflowvlm.shared.config import PolicySettings
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.files import write_whole
from gflowvlm.shared.settings import FolderPath, Fraction, ModelName, Settings
from gflowvlm.shared.shell import quoted
from gflowvlm.shared.task_settings import AnyTaskSettings, default_settings
from gflowvlm.warm_starts.demonstrations import (
    Demonstrations,
    RecordedExamples,
    RepeatedExamples,
    instance_sources,
    reading_source,
)
from gflowvlm.warm_starts.warm_start import WarmStartFigures, play_and_measure

TINY = "tiny"
"""The model name that stands for a new tiny policy with random weights."""

_EVALUATION_SEED = 20_000_003
_MAX_RESPONSE_TOKENS = PolicySettings().max_response_tokens
REPORT = "training.json"
_CHECKPOINT = "checkpoint"


class SftRequest(Settings):
    """What is asked of one supervised fine-tuning.

    Attributes:
        task: The task that is demonstrated.
        model: ``tiny``, a shipped model, a model directory or a hub name.
        head_scale: What the output head is multiplied by before training, see `scale_head`.
        noise: Probability that a demonstrated action is a random admissible one.
        detours: Probability that another action is played than the demonstrated one.
        with_done: Whether the stop action is demonstrated.
        done_token: Whether a tokenizer that does not have `[DONE]` as one token gets it.
        ood: Whether out-of-distribution numbers are demonstrated too.
        reading_steps: First steps that teach reading only, see `Demonstrations`.
        fresh_steps: First steps whose demonstrations are played; later ones repeat them. 0: all steps.
        demonstrations: Folder of the set whose demonstrations these are; None when they are played on the spot.
        episodes: Episodes played for each of the final figures; 0 for none.
        max_response_tokens: Longest response in them, as `policy.max_response_tokens` of a training.
        sft: The training settings.
    """

    task: AnyTaskSettings = Field(default_factory=default_settings)
    model: ModelName = TINY
    head_scale: float = Field(1.0, gt=0, le=10)
    noise: Fraction = 0.5
    detours: Fraction = 0.0
    with_done: bool = True
    done_token: bool = False
    ood: bool = True
    reading_steps: int = Field(0, ge=0, le=10_000_000)
    fresh_steps: int = Field(0, ge=0, le=10_000_000)
    demonstrations: FolderPath | None = None
    episodes: int = Field(200, ge=0, le=100_000)
    max_response_tokens: int = Field(_MAX_RESPONSE_TOKENS, ge=4, le=4096)
    sft: SftSettings = SftSettings()


def start(request: SftRequest, out: Path, console: Console) -> bool:
    """Trains from the beginning and writes the model into `out`.

    Returns:
        Whether it came to its end (and was not stopped by Ctrl-C).

    Raises:
        UserError: `out` is in use or cannot be written, or the model, the demonstrations or what the final figures are
            played on cannot be loaded.
    """
    refuse_used(out)
    request = with_absolute_paths(request, names=(TINY,))
    check_paths(request, names=(TINY,))
    _check_adapter(request)
    source = _source(request)
    _check_instances(request)
    with tempfile.TemporaryDirectory(prefix="gflowvlm-tiny-") as folder:
        if request.model == TINY:
            lexicon = environment_class(request.task).lexicon()
            model = str(build_tiny_policy(folder, seed=request.sft.seed, lexicon=lexicon))
        else:
            model = resolve_model(request.model)
        network, inputs = load_for_sft(model, request.sft, request.task.answer_format, request.done_token)
    check_demonstrations(source, inputs, request.sft)
    if request.head_scale != 1.0:
        scale_head(network, request.head_scale)
    report = {"command": shlex.join(["gflowvlm", *sys.argv[1:]]), "request": request.model_dump()}
    if (Path(model) / REPORT).exists():
        report["made_from"] = _read_report(Path(model))
    with _held(out):
        # Another training may have ended there since.
        refuse_used(out)
        _write_report(out, report)
        return _train(SftTrainer(network, inputs, request.sft), source, request, out, console)


def trained_embeddings(model: str) -> bool:
    """Returns whether a model's embeddings were trained by the `gflowvlm sft` that made it; False for other models."""
    path = Path(resolve_model(model)) / REPORT
    if model == TINY:
        return True
    if not path.exists():
        return False
    request = _read_report(path.parent).get("request", {})
    # Reports that do not say are of trainings that trained all parameters.
    return bool(request.get("sft", {}).get("train_embeddings", True))


def resume(out: Path, console: Console) -> bool:
    """Goes on with a stopped training, with the settings it was started with.

    Returns:
        Whether it came to its end (and was not stopped by Ctrl-C).

    Raises:
        UserError: There is no stopped training in `out`.
    """
    try:
        request = SftRequest.model_validate(_read_report(out)["request"])
    except (KeyError, ValidationError):
        raise UserError(f"{out}: its {REPORT} holds no request; nothing there can be resumed") from None
    with _held(out):
        return _train(
            SftTrainer.resume(out / _CHECKPOINT, request.sft, request.task.answer_format),
            _source(request),
            request,
            out,
            console,
        )


def refuse_used(out: Path) -> None:
    if (out / _CHECKPOINT).exists():
        raise UserError(f"{out}: holds an unfinished training; go on with --resume, or choose another --out")
    if (out / "config.json").exists():
        raise UserError(f"{out}: holds a model, which would be written over; choose another --out")


def _check_adapter(request: SftRequest) -> None:
    if request.sft.lora_rank == 0:
        return
    if request.model == TINY:
        raise UserError("--lora-rank: all weights of a new model are random; leave it out, and all are trained")
    if request.head_scale != 1.0:
        raise UserError("--head-scale: not with --lora-rank, which leaves the output head as it is")
    if request.sft.train_embeddings:
        raise UserError("--train-embeddings: not with --lora-rank, which trains an adapter of the language model")


def _held(out: Path) -> AbstractContextManager[int]:
    held = UserError(f"{out}: another `gflowvlm sft` is writing there; wait for it, or choose another --out")
    return folder_lock(out, held)


def _source(request: SftRequest) -> ExampleSource:
    if request.demonstrations is not None:
        recorded = DemonstrationSet(Path(request.demonstrations))
        recorded.check_task(request.task)
        return RecordedExamples(recorded.trajectories(), request.with_done, request.sft.seed)
    played = Demonstrations(
        instance_sources(request.task, request.ood),
        request.noise,
        request.with_done,
        request.sft.seed,
        reading_source(request.task, request.ood),
        request.reading_steps,
        request.detours,
    )
    if request.fresh_steps == 0:
        return played
    if request.fresh_steps <= played.reading_steps:
        raise UserError(
            f"--fresh-steps {request.fresh_steps}: the first {played.reading_steps} steps teach reading only, and no "
            "later one would have a prompt; ask for more, or for fewer --reading-steps"
        )
    return RepeatedExamples(played, request.fresh_steps, played.reading_steps)


def _check_instances(request: SftRequest) -> None:
    """Makes sure, before a long training, that there is what its final figures are to be played on."""
    if request.episodes == 0:
        return
    environment = make_env(request.task)
    for split in SPLITS:
        environment.reset(seed=_EVALUATION_SEED, options={"split": split})


def _train(trainer: SftTrainer, source: ExampleSource, request: SftRequest, out: Path, console: Console) -> bool:
    size = sum(parameter.numel() for parameter in trainer.network.parameters())
    which = f"{'all' if trainer.trained == size else f'{trainer.trained / 1e6:.2f} M of'} {size / 1e6:.2f} M"
    console.print(f"Training {which} parameters on {trainer.network.device}, {request.sft.steps} steps.")
    started, report = time.monotonic(), _read_report(out)
    took = report.get("wall_seconds", 0.0)
    with _interrupt_flag() as interrupted, _Display(console, request.sft.steps, trainer.step) as display:
        try:
            finished = trainer.train(source, out / _CHECKPOINT, display.show, lambda: bool(interrupted))
        except OSError as error:
            raise UserError(f"{out}: a checkpoint cannot be written ({error.strerror or error})") from None
    if display.loss is not None:
        report["loss"] = round(display.loss, 4)
    report["wall_seconds"] = round(took + time.monotonic() - started, 1)
    _write_report(out, report)
    figures = _figures(trainer, request, console) if finished and not interrupted else None
    if figures is None:
        if finished:
            trainer.save_checkpoint(out / _CHECKPOINT)
        message = f"Stopped at step {trainer.step}. Go on: gflowvlm sft --resume --out {quoted(out)}"
        console.print(message, markup=False, soft_wrap=True)
        return False
    trainer.save_model(out)
    report["parameters"], report["torch"] = size, torch.__version__
    report["final_loss"] = report.pop("loss", None)
    report["figures"] = [each.as_json() for each in figures]
    report["wall_seconds"] = round(took + time.monotonic() - started, 1)
    _write_report(out, report)
    trainer.drop_checkpoint(out / _CHECKPOINT)
    message = f"Model and figures: {out}. Train on: gflowvlm train {quoted(f'policy.model={out}')}"
    console.print(message, markup=False, soft_wrap=True)
    return True


def _figures(trainer: SftTrainer, request: SftRequest, console: Console) -> list[WarmStartFigures] | None:
    """Returns what the model can do; None when it was interrupted while it played."""
    if request.episodes == 0:
        return []
    console.print("Playing to see what it can do.")
    trainer.round_weights()
    trainer.network.eval()
    trainer.network.config.use_cache = True
    try:
        with termination_as_interrupt():
            return _measured(trainer, request, console)
    except KeyboardInterrupt:
        return None


def _measured(trainer: SftTrainer, request: SftRequest, console: Console) -> list[WarmStartFigures]:
    measured = []
    for split in SPLITS:
        for temperature in (1.0, 0.0):
            figures = play_and_measure(
                trainer.network,
                trainer.inputs,
                request.task,
                split,
                request.episodes,
                temperature,
                _EVALUATION_SEED,
                request.max_response_tokens,
            )
            measured.append(figures)
            console.print(
                f"{split:3}, temperature {temperature:g}: success {figures.success:.2f}, reads {figures.reading:.1%}, "
                f"true relation {figures.relation:.1%}, expert's action {figures.expert_actions:.1%}, "
                f"malformed {figures.malformed:.1%}, inadmissible {figures.inadmissible:.1%}",
                soft_wrap=True,
                highlight=False,
            )
    return measured


class _Display:
    """Progress bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, console: Console, steps: int, first_step: int) -> None:
        self.loss: float | None = None
        self._console = console
        self._printed = time.monotonic()
        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._steps = steps
        self._task = self._bar.add_task("", total=steps, completed=first_step)

    def __enter__(self) -> "_Display":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, progress: SftProgress) -> None:
        """Shows a step; the loss is smoothed."""
        before = progress.loss if self.loss is None else self.loss
        self.loss = before + 0.05 * (progress.loss - before)
        self._bar.update(self._task, completed=progress.step, description=f"loss {self.loss:.3f}")
        last = progress.step == self._steps
        if not self._console.is_terminal and (last or time.monotonic() - self._printed >= PLAIN_INTERVAL_S):
            self._printed = time.monotonic()
            self._console.print(f"step {progress.step}/{self._steps}  loss {self.loss:.3f}", highlight=False)


@contextmanager
def _interrupt_flag() -> Iterator[list[int]]:
    """Collects the first Ctrl-C, SIGTERM or SIGHUP, so that a step is never cut in half; the second one interrupts."""
    received: list[int] = []

    def remember(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    with handled_by(remember, *STOPPING):
        yield received


def _read_report(folder: Path) -> dict[str, Any]:
    path = folder / REPORT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); is there a model made by `gflowvlm sft`?") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: no JSON object; restore it, or start again in another --out")
    return content


def _write_report(out: Path, report: dict[str, Any]) -> None:
    try:
        write_whole(out / REPORT, json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{out / REPORT}: cannot be written ({error.strerror or error})") from None
