"""`gflowvlm doctor`: what is installed, what works here, what to do about the rest."""

from pathlib import Path
from typing import Annotated

import typer

from gflowvlm.cli.check_table import check_table
from gflowvlm.cli.json_file import json_option, write_json_file
from gflowvlm.cluster.launch.doctor import run_checks
from gflowvlm.cluster.launch.machine import machine, machine_lines, versions
from gflowvlm.run.console import terminal
from gflowvlm.run.preset_library import DEFAULT_PRESET, load_preset
from gflowvlm.shared.findings import Status


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def doctor(
        json_file: Annotated[Path | None, json_option("Write the findings here, too.")] = None,
        ray: Annotated[
            bool, typer.Option("--ray", help="Start a small local Ray, too, and read its dashboard (about 20 s).")
        ] = False,
    ) -> None:
        """Say what is installed, what works on this machine, and what to do about the rest.

        Exits with 0 when the default run works here, else with 1.
        """
        console = terminal()
        console.print(machine_lines())
        with console.status("checking ..."):
            checks = run_checks(load_preset(DEFAULT_PRESET), Path.cwd(), start_ray=ray)
        works = all(check.status is not Status.BROKEN for check in checks)
        console.print(check_table(checks))
        console.print(
            "The default run works here: gflowvlm train"
            if works
            else "The default run does not work here yet: see the red lines.",
            highlight=False,
        )
        if json_file is not None:
            findings = [{**vars(check), "status": check.status.value} for check in checks]
            content = {"works": works, "machine": machine(), "versions": versions(), "checks": findings}
            write_json_file(content, json_file)
        if not works:
            raise typer.Exit(1)
