"""The one way in: `gflowvlm COMMAND`."""

import io
import os
import sys
from typing import Annotated

import typer
from rich.text import Text

import gflowvlm
from gflowvlm.cli.commands import (
    alfworld,
    bench,
    compare,
    demonstrate,
    doctor,
    evaluate,
    experiment,
    jobs,
    play,
    presets,
    prove,
    replay,
    report,
    scale,
    serve,
    sft,
    submit,
    train,
)
from gflowvlm.cluster.launch.process_environment import prepare_process
from gflowvlm.run.console import printable, terminal
from gflowvlm.run.interruption import INTERRUPTED, termination_as_interrupt
from gflowvlm.shared.errors import UserError

app = typer.Typer(
    name="gflowvlm",
    help="Fine-tune vision-language models with GFlowNet objectives, from one laptop to a Ray cluster.\n\n"
    "Start with `gflowvlm train`: it teaches a tiny model NumberLine on two cores in minutes. "
    "`gflowvlm doctor` says what works on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (
    train,
    submit,
    jobs,
    scale,
    compare,
    experiment,
    evaluate,
    play,
    replay,
    report,
    serve,
    prove,
    demonstrate,
    sft,
    bench,
    presets,
    alfworld,
    doctor,
):
    command.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gflowvlm {gflowvlm.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the release and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Holds the options that stand before a command."""


def main() -> None:
    """Runs the command line: a `UserError` is one line on stderr and exit status 2; SIGTERM and SIGHUP are Ctrl-C."""
    prepare_process()
    # Remarks on model configurations are not for the user; what goes wrong is said as a UserError.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        # Names may hold letters that a terminal has none for, or bytes that are no text at all.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with termination_as_interrupt():
            app()
    except UserError as error:
        message = Text.assemble(("gflowvlm:", "red"), " ", printable(str(error)).replace("\n", "\\n"))
        terminal(stderr=True).print(message, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
