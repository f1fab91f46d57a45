"""A user's own code: where its modules are found, in every process of a run, and how what it raises is told.

A setting names it as ``module:Name``. The module is an installed one, or a file or package in the code folder: by
default the one that the command was started in. Nothing is imported from there unless a setting names something in it,
and then after everything that is installed.
"""

import importlib
import importlib.util
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from gflowvlm.shared.errors import UserError, one_line

CODE_VARIABLE = "GFLOWVLM_CODE"
"""Environment variable that holds the code folder in every process of a run, once something in it was named."""

_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def is_own(name: str) -> bool:
    """Returns whether a setting's value is written as the name of own code, ``module:Name``."""
    return _NAME.fullmatch(name) is not None


def use_code_folder(folder: str | os.PathLike[str]) -> None:
    """Has this process, and those that it starts, find modules in a folder, after everything that is installed."""
    path = os.path.abspath(folder)
    os.environ[CODE_VARIABLE] = path
    if path not in sys.path:
        sys.path.append(path)


def used_code_folder() -> Path | None:
    """Returns the folder that own code comes from, None while nothing was named that is in one."""
    named = os.environ.get(CODE_VARIABLE)
    return None if not named else Path(named)


def code_environment() -> dict[str, str]:
    """Returns the environment variables with which another process finds the code folder in use, if one is."""
    folder = used_code_folder()
    return {} if folder is None else {CODE_VARIABLE: str(folder)}


def load_own(name: str, setting: str, folder: str | os.PathLike[str] | None = None) -> Any:
    """Imports what a setting names.

    Args:
        name: ``module:Name``.
        setting: The setting's dotted key, for errors.
        folder: Where to look for a module that is not installed; by default the code folder in use, or the current one.

    Raises:
        UserError: It is not there, or importing it raises; the message names the user's file and line.
    """
    module, _, attribute = name.partition(":")
    if not is_own(name):
        raise UserError(f"{setting} = {name!r}: write module:Name, such as my_code:Name for my_code.py in this folder")
    place = Path(folder) if folder is not None else used_code_folder() or Path.cwd()
    top = module.partition(".")[0]
    _choose_place(top, place, f"{setting} = {name!r}")
    found = run_own_code(importlib.import_module, f"{setting} = {name!r}: cannot be imported", module)
    if not hasattr(found, attribute):
        raise UserError(f"{setting} = {name!r}: {found.__file__ or module} has no {attribute}")
    return getattr(found, attribute)


def run_own_code(
    call: Callable[_Arguments, _Result], problem: str, *args: _Arguments.args, **kwargs: _Arguments.kwargs
) -> _Result:
    """Returns what a call of the user's code returns.

    Raises:
        UserError: It raised, whatever that was; the message begins with `problem` and ends with the file and the line.
        KeyboardInterrupt: The user pressed Ctrl-C in the main thread.
    """

    def failed(error: BaseException) -> UserError:
        return UserError(f"{problem} ({type(error).__name__}: {one_line(error)}{_place_of(error)})")

    return call_guarded(call, failed, *args, **kwargs)


def call_guarded(
    call: Callable[_Arguments, _Result],
    failed: Callable[[BaseException], Exception],
    *args: _Arguments.args,
    **kwargs: _Arguments.kwargs,
) -> _Result:
    """Returns what a call of code that is not ours returns; raises what `failed` makes of anything that it raises.

    `SystemExit` included: it would end a worker's event loop. Ctrl-C in the main thread is the user's, and passes.
    """
    try:
        return call(*args, **kwargs)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        raise failed(error) from error


def _choose_place(top: str, folder: Path, problem: str) -> None:
    """Makes a top-level module importable from a folder if that is where it is."""
    loaded = sys.modules.get(top)
    spec = importlib.util.find_spec(top) if loaded is None else loaded.__spec__
    origin = None if spec is None or spec.origin is None else Path(spec.origin)
    is_there = (folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file()
    is_there = is_there or (spec is None and (folder / top).is_dir())
    if not is_there:
        if spec is None:
            raise UserError(
                f"{problem}: there is no module {top!r} in {folder}, and none is installed; write {top}.py there, or "
                "name its folder with code=DIR"
            )
        return
    if origin is not None and not origin.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{problem}: {origin} is installed under the name of your {top}.py; rename yours")
    use_code_folder(folder)


def _place_of(error: BaseException) -> str:
    """Returns where the user's code raised, as the end of a message."""
    folder = used_code_folder()
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"; {error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if folder is not None and Path(f.filename).is_relative_to(folder)]
    return f"; {own[-1].filename}, line {own[-1].lineno}" if own else ""


if used_code_folder() is not None:
    use_code_folder(os.environ[CODE_VARIABLE])
