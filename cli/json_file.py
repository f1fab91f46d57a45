"""Results as JSON files, for the `--json` options."""

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import typer

from gflowvlm.shared.errors import UserError


def json_option(help_text: str) -> Any:
    """Returns a `--json` option whose file is looked at before the command begins.

    Args:
        help_text: What is written there.
    """
    return typer.Option("--json", help=help_text, callback=_checked, show_default=False)


def write_json_file(content: Any, path: Path) -> None:
    """Writes a result that other programs read.

    Raises:
        UserError: The file cannot be written.
    """
    text = json.dumps(content, indent=2, allow_nan=False)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise _refused("--json", path, error) from None


def check_can_be_written(option: str, path: Path) -> None:
    """Looks whether a file can be written, before the work that it is to hold; makes and changes nothing.

    Args:
        option: What names the file on the command line.
        path: The file.

    Raises:
        UserError: It cannot.
    """
    try:
        if path.is_file():
            with path.open("ab"):
                return
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists():
            # A pipe or a device, which must not be opened before there is something to write.
            return
        with tempfile.TemporaryFile(dir=path.parent):
            return
    except OSError as error:
        raise _refused(option, path, error) from None


def _checked(path: Path | None) -> Path | None:
    if path is not None:
        check_can_be_written("--json", path)
    return path


def _refused(option: str, path: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"{option} {path}: cannot be written ({reason}); name a file in a folder that exists")
