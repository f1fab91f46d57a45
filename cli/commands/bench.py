"""`gflowvlm bench`: how fast the parts are on this machine, and how a finished run spent its time."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from gflowvlm.cli.json_file import json_option, write_json_file
from gflowvlm.cluster.launch.machine import machine, machine_lines, versions
from gflowvlm.run.console import terminal
from gflowvlm.run.paths import check_paths
from gflowvlm.run.preset_library import DEFAULT_PRESET, resolve_config
from gflowvlm.shared.errors import UserError
from gflowvlm.studies.benchmarks.measurement import PARTS, QUICK, SIMULATED_PARTS, USUAL_PARTS, Measurement, Scale


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def bench(
        overrides: Annotated[
            list[str] | None,
            typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as sampler.max_num_seqs=32."),
        ] = None,
        preset: Annotated[str, typer.Option(help="Whose settings to measure; see `gflowvlm presets`.")] = (
            DEFAULT_PRESET
        ),
        quick: Annotated[bool, typer.Option("--quick", help="Fewer repetitions: rougher measurements sooner.")] = False,
        parts: Annotated[
            str | None,
            typer.Option(
                help=f"What to measure, comma-separated: {','.join(PARTS)}. By default all but "
                f"{', '.join(SIMULATED_PARTS)}, which simulate engines and learner and take an hour and a half."
            ),
        ] = None,
        run: Annotated[
            Path | None,
            typer.Option(help="Also tell how this finished run spent its time; alone, measure nothing else."),
        ] = None,
        json_file: Annotated[Path | None, json_option("Write the measurements here, too.")] = None,
    ) -> None:
        """Measure sampler, policy server, environment, learner, adapter hand-over and replay buffer.

        Whatever else runs on the machine shows in the measurements: close it first.

        Everything in a few minutes: `gflowvlm bench --quick`

        A run's waiting times: `gflowvlm bench --run RUN`

        With simulated engines and learner, thousands of requests in flight: `gflowvlm bench --parts scale`
        """
        console = terminal()
        chosen = _chosen(parts, only_run=run is not None)
        config = resolve_config(preset, None, overrides or ())
        check_paths(config)
        load, began = os.getloadavg()[0], time.perf_counter()
        console.print(f"{machine_lines()}\nload before: {load:.1f}")
        measurements: list[Measurement] = []
        if run is not None:
            from gflowvlm.studies.benchmarks.finished_run import bench_run

            measurements += bench_run(run)
        if chosen:
            from gflowvlm.studies.benchmarks.suite import run_parts

            measurements += run_parts(config, chosen, QUICK if quick else Scale(), console)
        console.print(_table(measurements))
        if json_file is not None:
            content = {
                "preset": preset,
                "overrides": overrides or [],
                "quick": quick,
                "machine": {**machine(), "load_before": load},
                "versions": versions(),
                "seconds": round(time.perf_counter() - began, 1),
                "measurements": {measurement.name: measurement.as_dict() for measurement in measurements},
            }
            write_json_file(content, json_file)


def _chosen(parts: str | None, *, only_run: bool) -> set[str]:
    if parts is None:
        return set() if only_run else set(USUAL_PARTS)
    chosen = {part.strip() for part in parts.split(",")}
    unknown = sorted(chosen - set(PARTS))
    if unknown:
        raise UserError(f"--parts {','.join(unknown)}: no such part; there are: {', '.join(PARTS)}")
    return chosen


def _table(measurements: list[Measurement]) -> Table:
    table = Table("measurement", "value", "unit", "bar")
    table.columns[1].justify = "right"
    table.columns[1].no_wrap = table.columns[2].no_wrap = True
    previous = None
    for measurement in measurements:
        if previous not in (None, measurement.part):
            table.add_section()
        previous = measurement.part
        bar = Text()
        if measurement.met is not None:
            bar = Text(measurement.bar, "green") if measurement.met else Text(f"missed: {measurement.bar}", "red")
        what = Text.assemble(measurement.name, "\n", (measurement.description, "dim"))
        table.add_row(what, _readable(measurement.value), measurement.unit, bar)
    return table


def _readable(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
