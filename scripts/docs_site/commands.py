"""The page of all commands, made from the typer application: what `--help` says, on one page."""

from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from gflowvlm.cli.main import app

NAME = "gflowvlm"
INTRODUCTION = """\
# Commands

<!-- Made from the code by `make reference`; a test compares. -->

What `gflowvlm COMMAND --help` says, for every command. They are in `.venv/bin` after `make setup`. `KEY=VALUE` is a
setting of the [configuration](configuration.md). Exit status: 0 done, 1 a check that did not pass, 2 wrong input or a
machine that cannot do it (one line on stderr says what to do), 130 interrupted by Ctrl-C, SIGTERM or SIGHUP.
"""


def commands_page() -> str:
    """Returns the page in Markdown."""
    root = typer.main.get_command(app)
    found = list(commands_of(root, typer.Context(root, info_name=NAME)))
    rows = ["| command | what it does |", "|---|---|"]
    for path, command, _ in found:
        rows.append(f"| [`{path}`](#{path.replace(' ', '-')}) | {_cell(_first_sentence(command.help))} |")
    parts = [INTRODUCTION, "\n".join(rows) + "\n"]
    for path, command, context in found:
        parts.append(_section(path, command, context))
    return "\n".join(parts)


def commands_of(group: Any, context: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yields (path as typed, command, its context) of all commands below a group; none of the groups themselves."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = typer.Context(command, info_name=name, parent=context)
        if isinstance(command, TyperGroup):
            yield from commands_of(command, inner)
        else:
            yield inner.command_path, command, inner


def _section(path: str, command: Any, context: Any) -> str:
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    parts = [f"## {path}\n", f"```\n{usage}\n```\n", f"{command.help}\n"]
    for kind in ("argument", "option"):
        rows = list(_rows(command, context, kind))
        if rows:
            parts.append("\n".join([f"| {kind} | what it does | default, bounds |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _rows(command: Any, context: Any, kind: str) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None or parameter.param_type_name != kind or parameter.name == "help":
            continue
        # The end of the help text, in brackets: defaults and ranges.
        says, _, limits = record[1].rpartition("  [") if record[1].endswith("]") else (record[1], "", "")
        yield f"| `{_cell(record[0])}` | {_cell(says)} | {_cell(limits.removesuffix(']'))} |"


def _first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].removesuffix(".") + "."


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
