"""`gflowvlm sft`: supervised fine-tuning on demonstrations."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from gflowvlm.cli.option_errors import first_problem
from gflowvlm.run.console import terminal
from gflowvlm.run.interruption import INTERRUPTED
from gflowvlm.shared.config_io import override_task
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.task_settings import DEFAULT_TASK, TaskSettings, default_settings

if TYPE_CHECKING:
    from gflowvlm.warm_starts.supervised import SftRequest


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def sft(
        context: typer.Context,
        task_settings: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[KEY=VALUE]...", help="Settings of the task, as in `prompt=markov`.", show_default=False
            ),
        ] = None,
        out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the model that is made.")] = Path(
            "models/sft"
        ),
        task: Annotated[
            str | None,
            typer.Option(help="Task that is demonstrated [default: numberline, or the set's].", show_default=False),
        ] = None,
        demonstrations: Annotated[
            Path | None,
            typer.Option(
                help="Learn from this set, made by `gflowvlm demonstrate`, instead of playing.",
                file_okay=False,
                show_default=False,
            ),
        ] = None,
        model: Annotated[
            str, typer.Option(help="`tiny` (new, random weights), a shipped model, a model folder or a hub name.")
        ] = "tiny",
        steps: Annotated[
            int | None, typer.Option(help="Optimiser steps; 2400 for `tiny`, 1500 otherwise.", show_default=False)
        ] = None,
        batch: Annotated[int, typer.Option(help="Examples in a step.")] = 32,
        micro_batch: Annotated[int, typer.Option(help="Examples in one forward pass.")] = 8,
        lr: Annotated[
            float | None,
            typer.Option(
                help="Peak learning rate; 3e-3 for `tiny`, 2e-4 for an adapter, 1e-5 else.", show_default=False
            ),
        ] = None,
        reading_steps: Annotated[
            int | None,
            typer.Option(
                help="First steps that teach reading from short sequences; 1000 for `tiny`, 0 otherwise.",
                show_default=False,
            ),
        ] = None,
        fresh_steps: Annotated[
            int,
            typer.Option(help="Play demonstrations for so many first steps, then repeat them; 0: play all."),
        ] = 0,
        head_scale: Annotated[
            float,
            typer.Option(help="Multiplies the output head first: tokens never demonstrated get much less likely."),
        ] = 1.0,
        noise: Annotated[float, typer.Option(help="Share of random actions: how weak the policy is to be.")] = 0.5,
        detours: Annotated[
            float,
            typer.Option(help="Share of steps at which a random action is played and the demonstrated one only shown."),
        ] = 0.0,
        with_done: Annotated[bool, typer.Option(help="Demonstrate the stop action.")] = True,
        done_token: Annotated[
            bool, typer.Option("--done-token", help="Give a tokenizer that lacks `[DONE]` a token of its own for it.")
        ] = False,
        ood: Annotated[bool, typer.Option(help="Demonstrate out-of-distribution numbers too.")] = True,
        seed: Annotated[int, typer.Option(help="Seed of weights and demonstrations.")] = 0,
        dtype: Annotated[str, typer.Option(help="`float32` or `bfloat16`.")] = "float32",
        train_embeddings: Annotated[
            bool | None,
            typer.Option(
                help="Train input embeddings and output head too; by default for `tiny` and what was made of it.",
                show_default=False,
            ),
        ] = None,
        lora_rank: Annotated[
            int,
            typer.Option(
                help="Train an adapter of this rank instead, merged at the end: for models that do not fit a GPU with "
                "16 bytes for each weight; 0: all weights."
            ),
        ] = 0,
        gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, more time.")] = False,
        image_size: Annotated[int, typer.Option(help="Side of the pictures, pixels.")] = 64,
        system_prompt: Annotated[
            str | None, typer.Option(help="The system's turn; as `policy.system_prompt`.", show_default=False)
        ] = None,
        min_pixels: Annotated[int | None, typer.Option(help="As `policy.min_pixels`.", show_default=False)] = None,
        max_pixels: Annotated[int | None, typer.Option(help="As `policy.max_pixels`.", show_default=False)] = None,
        checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
        episodes: Annotated[int, typer.Option(help="Episodes for each of the figures at the end; 0: none.")] = 200,
        max_response_tokens: Annotated[
            int | None,
            typer.Option(help="Longest response in them; as `policy.max_response_tokens`.", show_default=False),
        ] = None,
        resume: Annotated[
            bool, typer.Option("--resume", help="Go on with the stopped training in --out, with its own settings.")
        ] = False,
    ) -> None:
        """Teach a model the form of a task by demonstrations: the warm start of a GFlowNet training.

        The demonstrations are made by playing; nothing is downloaded. They read and reason rightly, and act
        at random with probability `--noise`. Where `[DONE]` is no token of the model's, it is written in several,
        unless `--done-token` adds it. With `--demonstrations` they are those of a set instead, in another order in
        each pass.

        Make the shipped model again: `gflowvlm sft --out models/warm --noise 0.4`, then `gflowvlm sft --model
        models/warm --out models/tiny --head-scale 2 --noise 0.6 --steps 400 --lr 1e-3 --seed 1`

        Prepare a 7B model: `gflowvlm sft --model HUB/NAME --out models/7b --dtype bfloat16
        --lora-rank 64 --gradient-checkpointing --micro-batch 4 --image-size 336`
        """
        # Imported here: torch and transformers take seconds, and `--help` does not need them.
        from gflowvlm.warm_starts import supervised

        console = terminal()
        finished = supervised.resume(out, console) if resume else supervised.start(_request(context), out, console)
        if not finished:
            raise typer.Exit(INTERRUPTED)


def _request(context: typer.Context) -> "SftRequest":
    """Returns what the command's options ask for.

    Raises:
        UserError: They do not fit together, or one is out of its bounds.
    """
    from gflowvlm.warm_starts.supervised import TINY, SftRequest

    options = context.params
    fresh = options["model"] == TINY
    if options["demonstrations"] is None:
        task, shown = _played(options, fresh)
    else:
        _refuse_playing(context)
        task, shown = _recorded(Path(options["demonstrations"]), options["task"])
    training = {
        "steps": _given(options["steps"], 2400 if fresh else 1500),
        "batch_size": options["batch"],
        "learning_rate": _given(options["lr"], 3e-3 if fresh else 2e-4 if options["lora_rank"] > 0 else 1e-5),
        "train_embeddings": _trains_embeddings(options),
        **{name: options[name] for name in _OF_TRAINING},
    }
    whole = {"task": task, **{name: options[name] for name in _OF_REQUEST}, "sft": training, **shown}
    if options["max_response_tokens"] is not None:
        whole["max_response_tokens"] = options["max_response_tokens"]
    try:
        return SftRequest.model_validate(whole)
    except ValidationError as error:
        raise UserError(first_problem(error, {"batch_size": "batch", "learning_rate": "lr"})) from None


_OF_TRAINING = (
    "micro_batch",
    "dtype",
    "lora_rank",
    "gradient_checkpointing",
    "checkpoint_every",
    "seed",
    "system_prompt",
    "min_pixels",
    "max_pixels",
)
_OF_REQUEST = ("model", "head_scale", "with_done", "done_token", "episodes")
_PLAYING = ("task_settings", "noise", "detours", "ood", "reading_steps", "fresh_steps", "image_size")
"""Options that say how demonstrations are made on the spot."""


def _played(options: dict[str, Any], fresh: bool) -> tuple[TaskSettings, dict[str, object]]:
    """Returns the settings of the task that is played, and what a request says of its demonstrations."""
    changes = [f"image_size={options['image_size']}", *(options["task_settings"] or [])]
    task = override_task(default_settings(options["task"] or DEFAULT_TASK), changes)
    shown: dict[str, object] = {name: options[name] for name in ("noise", "detours", "ood", "fresh_steps")}
    return task, {**shown, "reading_steps": _given(options["reading_steps"], 1000 if fresh else 0)}


def _trains_embeddings(options: dict[str, Any]) -> bool:
    from gflowvlm.warm_starts.supervised import trained_embeddings

    if options["train_embeddings"] is not None:
        return bool(options["train_embeddings"])
    return options["lora_rank"] == 0 and trained_embeddings(options["model"])


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _refuse_playing(context: typer.Context) -> None:
    for name in _PLAYING:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "settings of the task" if name == "task_settings" else f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: for demonstrations made on the spot; those of --demonstrations are as they are")


def _recorded(folder: Path, task: str | None) -> tuple[TaskSettings, dict[str, object]]:
    """Returns the settings of a set's task, and what a request says of its demonstrations."""
    from gflowvlm.actors.demonstration_set import DemonstrationSet

    made = DemonstrationSet(folder.resolve())
    name = made.request.task.name
    if task is not None and task != name:
        raise UserError(f"--task {task}: the demonstrations in {folder} are of {name}; leave --task out")
    shown = {"noise": made.request.noise, "ood": made.request.split == "ood", "demonstrations": str(made.folder)}
    return made.request.task, shown
