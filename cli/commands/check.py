"""`gflowvlm check`: what makes a model trainable or not, before any run."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from gflowvlm.cli.check_table import check_table
from gflowvlm.cli.json_file import json_option, write_json_file
from gflowvlm.run.console import terminal
from gflowvlm.run.models import shipped_models
from gflowvlm.run.paths import check_paths, with_absolute_paths
from gflowvlm.run.preset_library import named_config, preset_names
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.config_io import apply_overrides, overridden_keys, parse_config
from gflowvlm.shared.task_settings import default_settings

if TYPE_CHECKING:
    from gflowvlm.evaluation.model_check.report import ModelReport, Say

NOT_TRAINABLE = 1
"""Exit status when the model cannot be trained as it is."""


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def check(
        model: Annotated[str, typer.Argument(help="Shipped model, model directory, or hub name.", show_default=False)],
        overrides: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[KEY=VALUE]...",
                help="Settings of the run, for example `policy.dtype=bfloat16 sampler.engine=transformers`.",
                show_default=False,
            ),
        ] = None,
        task: Annotated[
            str | None, typer.Option(help="Task whose prompts and answers are tried [default: numberline].")
        ] = None,
        preset: Annotated[str | None, typer.Option(help="Preset of the run.", show_default=False)] = None,
        config: Annotated[
            Path | None, typer.Option(help="YAML file of the run, instead of a preset.", show_default=False)
        ] = None,
        gpu_memory: Annotated[
            float | None,
            typer.Option("--gpu-memory", min=1, help="Memory of a GPU, GiB, to plan for one that is not here."),
        ] = None,
        quick: Annotated[
            bool, typer.Option("--quick", help="Load no weights and start no engine: what `train` looks at first.")
        ] = False,
        json_file: Annotated[Path | None, json_option("Write the findings and figures here, too.")] = None,
    ) -> None:
        """Say whether a model can be trained, what speaks against it, and what to do about it.

        Looks at the model's processor, chat template, BOS and end tokens, at how its tokenizer writes the task's
        answers and the stop action, at the layers that get an adapter, and at the memory that a run would take. Then
        it loads the weights, adds up the probabilities of all actions, starts the sampler's engine and compares
        its log-probabilities with the learner's, without an adapter and with one.

        Exits with 0 when the model can be trained, else with 1. A small model takes about a minute.

        Examples: `gflowvlm check numberline-tiny`, `gflowvlm check ./models/mine --task blackjack --json found.json`,
        `gflowvlm check ./models/mine --preset qwen2.5-vl-3b-24gb --quick --gpu-memory 24`.
        """
        # Imported here so that --help and wrong arguments answer at once.
        from gflowvlm.cli.memory_table import show_memory_plan
        from gflowvlm.cluster.launch.known_memory import known_memory
        from gflowvlm.evaluation.model_check.report import check_model

        console = terminal()
        implied = preset is None and config is None
        run = run_of(model, task, preset, config, overrides or [])
        check_paths(run)
        with _progress(console) as say:
            report = check_model(run, known_memory(run, gpu_memory), say, whole=not quick, implied=implied)
        console.print(check_table(report.checks))
        if report.memory is not None and report.memory.problems:
            show_memory_plan(console, report.memory)
        settings = [*(overrides or []), *report.settings]
        command = _train_command(model, run.task.name if task is not None else None, preset, config, settings)
        console.print(_verdict(report, model, command), markup=False, highlight=False, soft_wrap=True)
        if json_file is not None:
            write_json_file({"model": model, "task": run.task.name, **report.as_json()}, json_file)
        if not report.trainable:
            raise typer.Exit(NOT_TRAINABLE)


def run_of(model: str, task: str | None, preset: str | None, config: Path | None, overrides: list[str]) -> RunConfig:
    """Returns the run that a check is for, its paths absolute.

    A shipped model's own preset where neither preset, file nor task is named, else the default settings.

    Raises:
        UserError: There is no such task, preset or file, or an override does not fit.
    """
    if preset is None and config is None and task is None and model in shipped_models() and model in preset_names():
        preset = model
    found = RunConfig() if preset is None and config is None else named_config(preset, config)
    if task is not None and task != found.task.name:
        found = found.model_copy(update={"task": default_settings(task)})
    found = found.model_copy(update={"policy": found.policy.model_copy(update={"model": model})})
    settings = apply_overrides(found.model_dump(mode="json"), overrides)
    return with_absolute_paths(parse_config(settings, "settings", overridden_keys(overrides)))


@contextmanager
def _progress(console: Console) -> Iterator["Say"]:
    """Yields what shows what is looked at: a spinner on a terminal, a line each elsewhere."""
    if not console.is_terminal:
        yield lambda what: console.print(f"looking at {what} ...", highlight=False)
        return
    with console.status("") as status:
        yield lambda what: status.update(f"looking at {what} ...")


def _train_command(model: str, task: str | None, preset: str | None, config: Path | None, settings: list[str]) -> str:
    """Returns the `gflowvlm train` of the settings that were checked."""
    words = ["gflowvlm", "train"]
    if preset is not None:
        words += ["--preset", preset]
    if config is not None:
        words += ["--config", str(config)]
    if task is not None:
        words.append(f"task.name={task}")
    return shlex.join([*words, f"policy.model={model}", *settings])


def _verdict(report: "ModelReport", model: str, command: str) -> str:
    if report.trainable:
        return f"{model} can be trained: {command}"
    count = len(report.broken)
    return f"{model} cannot be trained like this: see the {'red line' if count == 1 else f'{count} red lines'}."
