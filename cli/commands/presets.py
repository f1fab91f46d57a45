"""`gflowvlm presets`: the shipped configurations."""

from typing import Annotated

import typer
from rich.syntax import Syntax
from rich.table import Table

from gflowvlm.run.console import terminal
from gflowvlm.run.preset_library import load_preset, preset_names
from gflowvlm.shared.config_io import dump_config


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def presets(
        name: Annotated[str | None, typer.Argument(help="Preset to show whole, as YAML.", show_default=False)] = None,
    ) -> None:
        """List the presets, or show one with every key and its value.

        The YAML can be saved, changed and given to `gflowvlm train --config FILE`.
        """
        console = terminal()
        if name is not None:
            text = dump_config(load_preset(name))
            if console.is_terminal:
                console.print(Syntax(text, "yaml"))
            else:
                typer.echo(text, nl=False)
            return
        table = Table()
        table.add_column("preset", no_wrap=True)
        for title in ("model", "loss", "steps", "sampler", "learner"):
            table.add_column(title, overflow="fold")
        for preset in preset_names():
            config = load_preset(preset)
            table.add_row(
                preset,
                config.policy.model,
                config.objective.loss,
                str(config.learner.steps),
                f"{config.sampler.replicas} x {config.sampler.engine}, {config.sampler.gpus_per_replica:g} GPU",
                f"{config.learner.workers} x {config.policy.dtype}, {config.learner.gpus_per_worker:g} GPU",
            )
        console.print(table)
        console.print("Every key of one: gflowvlm presets NAME.  Run one: gflowvlm train --preset NAME")
