"""Asking a live run for another size: a file in its folder, and the driver's answer in another beside it.

Neither side connects to the other, so the asking one needs the run's folder and nothing else. Each file is written
whole by one side and removed by the other.
"""

import difflib
import json
import os
import re
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field, StrictInt, ValidationError, model_validator

from gflowvlm.cluster.scaling.auto_scaling import REPLICAS_KEY, WORKERS_KEY
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.log import Row
from gflowvlm.run.setup import driver_holds
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.files import write_whole
from gflowvlm.shared.settings import Settings
from gflowvlm.shared.shell import quoted

SCALE = "scale"
"""Kind of the log's rows about the run's size."""

ANSWER_TIMEOUT_S = 60.0
"""How long the driver may take to answer: it is busy while it draws curves and works out exact targets."""

POLL_S = 0.2

KEEP_ANSWERS_S = 2 * ANSWER_TIMEOUT_S
"""How long an answer stays that nobody has fetched: the command was killed."""

_FILE = re.compile(r"scale-(\d{20}-[0-9a-f]{8})\.json")
_ANSWER = re.compile(r"answer-\d{20}-[0-9a-f]{8}\.json")
_FIELDS = {WORKERS_KEY: "workers", REPLICAS_KEY: "replicas"}
_USAGE = f"write {WORKERS_KEY}=N, {REPLICAS_KEY}=N, or both; each once"


class ScaleRequest(Settings):
    """What is asked for; a number that is left out stays.

    Attributes:
        workers: Rollout workers, ``rollout.workers``.
        replicas: Policy server replicas, ``sampler.replicas``.
    """

    workers: Annotated[StrictInt, Field(ge=1, le=4096)] | None = None
    replicas: Annotated[StrictInt, Field(ge=1, le=256)] | None = None

    @model_validator(mode="after")
    def _asks_for_something(self) -> "ScaleRequest":
        if self.workers is None and self.replicas is None:
            raise ValueError(f"name what to change: {WORKERS_KEY}=N, {REPLICAS_KEY}=N, or both")
        return self


def parse_request(changes: Iterable[str]) -> ScaleRequest:
    """Returns what a command line's ``rollout.workers=N sampler.replicas=N`` asks for.

    Raises:
        UserError: An unknown or repeated key, no whole number, or one out of bounds.
    """
    numbers: dict[str, int] = {}
    for change in changes:
        key, _, text = change.partition("=")
        if key not in _FIELDS:
            raise UserError(f"{change!r}: {_suggestion(key, text) or _USAGE}")
        if _FIELDS[key] in numbers:
            raise UserError(f"{change!r}: {_USAGE}")
        if re.fullmatch(r"-?\d{1,9}", text) is None:
            raise UserError(f"{change!r}: must be a whole number, for example {key}=4")
        numbers[_FIELDS[key]] = int(text)
    try:
        return ScaleRequest.model_validate(numbers)
    except ValidationError as error:
        raise UserError(_problem(error)) from None


def ask(folder: RunFolder, request: ScaleRequest, timeout_s: float = ANSWER_TIMEOUT_S) -> Row:
    """Asks the driver of a run for another size and waits for its answer; returns the ``scale`` row.

    Raises:
        UserError: No driver runs the run, it refuses, or it does not answer.
    """
    _check_running(folder)
    # Files are answered in the order of their names.
    number = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
    path = folder.root / f"scale-{number}.json"
    try:
        write_whole(path, request.model_dump_json())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        return _answer(folder, number, timeout_s)
    finally:
        # Nobody waits for it any more; the driver has removed it if it was answered.
        path.unlink(missing_ok=True)
        _answer_file(folder, number).unlink(missing_ok=True)


def take_requests(folder: RunFolder) -> list[tuple[str, ScaleRequest | str]]:
    """Removes the requests in a run's folder and returns them, oldest first.

    Returns:
        The number of each, and what it asks for, or why it cannot be read.
    """
    found = sorted((m[1], path) for path in folder.root.glob("scale-*.json") if (m := _FILE.fullmatch(path.name)))
    taken: list[tuple[str, ScaleRequest | str]] = []
    for number, path in found:
        try:
            content = path.read_bytes()
            path.unlink()
        except OSError:
            # Withdrawn by whoever had waited for too long; or it would be carried out again and again.
            continue
        try:
            taken.append((number, ScaleRequest.model_validate_json(content)))
        except ValidationError as error:
            taken.append((number, _problem(error)))
    return taken


class Answers:
    """The driver's answers in a run's folder. What earlier drivers have left there is removed.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._given: list[tuple[float, str]] = []
        for name in os.listdir(folder.root):
            if _ANSWER.fullmatch(name) is not None:
                (folder.root / name).unlink(missing_ok=True)

    def give(self, number: str, row: Row) -> None:
        """Answers a request with the row of the log that tells what came of it.

        Raises:
            UserError: The answer cannot be written.
        """
        path = _answer_file(self._folder, number)
        try:
            write_whole(path, json.dumps(row))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); free some space, then resume") from None
        self._given.append((time.monotonic(), number))

    def remove_old(self) -> None:
        """Removes answers that nobody has fetched for `KEEP_ANSWERS_S`."""
        while self._given and time.monotonic() - self._given[0][0] > KEEP_ANSWERS_S:
            _answer_file(self._folder, self._given.pop(0)[1]).unlink(missing_ok=True)


def _answer_file(folder: RunFolder, number: str) -> Path:
    return folder.root / f"answer-{number}.json"


def _answer(folder: RunFolder, number: str, timeout_s: float) -> Row:
    path, deadline = _answer_file(folder, number), time.monotonic() + timeout_s
    while True:
        # By listing: NFS may go on for a minute saying that a file that was asked for by name is not there.
        if path.name in os.listdir(folder.root):
            row: Row = json.loads(path.read_text(encoding="utf-8"))
            if row["error"] is not None:
                raise UserError(row["error"])
            return row
        if time.monotonic() > deadline:
            raise UserError(
                f"waited {timeout_s:.0f} s for the driver of {folder.root} to answer; it does once its policy server "
                "is up, so ask again later, or look at its log"
            )
        _check_running(folder)
        time.sleep(POLL_S)


def _check_running(folder: RunFolder) -> None:
    if folder.summary.exists():
        raise UserError(f"{folder.root}: this run has ended; nothing is left to scale")
    if driver_holds(folder) is False:
        raise UserError(
            f"{folder.root}: no driver is running this run; `gflowvlm train --resume {quoted(folder.root)}` goes on "
            "with it"
        )


def _suggestion(key: str, text: str) -> str | None:
    """Returns a question that names the key nearest to another word: ``rollouts``, ``workers``, ``sampler.replica``."""
    words = {word: name for name in _FIELDS for word in (name, *name.split("."))}
    close = difflib.get_close_matches(key, words, n=1)
    return f"did you mean {words[close[0]]}={text}?" if close else None


def _problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    keys = {field: key for key, field in _FIELDS.items()}
    where = ".".join(keys.get(str(part), str(part)) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}, found {problem['input']!r}" if where else message
