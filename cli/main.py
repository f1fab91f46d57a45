"""The one way in: `gflowvlm COMMAND`."""

import io
import os
import sys
import warnings
from typing import Annotated

import typer
from rich.text import Text

import gflowvlm
from gflowvlm.cli.commands import (
    alfworld,
    bench,
    check,
    compare,
    demonstrate,
    doctor,
    evaluate,
    experiment,
    jobs,
    make_model,
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
    make_model,
    bench,
    presets,
    alfworld,
    check,
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


def quiet_libraries() -> None:
    """Keeps remarks of libraries that are not for the user off the terminal; what goes wrong is a `UserError`.

    Called before the libraries are imported; processes that are started inherit it. What the user has set stays.
    """
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        # That there is no Triton (vLLM's CPU build needs none), and how memory is bound to NUMA nodes.
        "TORCH_LOGS": "-torch._library.triton",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        # Between vLLM and torch.
        "PYTHONWARNINGS": "ignore::FutureWarning:vllm.triton_utils.dispatcher",
    }.items():
        os.environ.setdefault(name, value)
    # This process has read the variable already.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.triton_utils\.dispatcher")


def main() -> None:
    """Runs the command line: a `UserError` is one line on stderr and exit status 2; SIGTERM and SIGHUP are Ctrl-C."""
    prepare_process()
    quiet_libraries()
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
