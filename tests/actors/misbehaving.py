"""A task whose instances do what an environment must not do: which one does what is said by its seed."""

import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import ClassVar

from gflowvlm.envs.numberline.environment import NumberLineEnv
from gflowvlm.envs.numberline.settings import NumberLineSettings
from gflowvlm.shared.errors import UserError

GOOD = 1
"""Seed of an instance that does nothing wrong."""

FIRST = 100
"""Seed of the first of `MISDEEDS`; the others follow."""

RELEASE = threading.Event()
"""Ends `hang` in this process."""


class Odd(BaseException):
    """Not an Exception."""


class UnpicklableError(Exception):
    def __init__(self, one: object, other: object) -> None:
        super().__init__("cannot travel")
        self.lock = threading.Lock()


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def leave_with_words() -> None:
    print("the planner says: object twice", flush=True)
    sys.exit(37)


def leave_at_once() -> None:
    os.write(2, b"fatal: no memory for the planner\n")
    os._exit(3)


def crash() -> None:
    ctypes.string_at(0)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    while not RELEASE.is_set():
        time.sleep(0.05)


def ask() -> None:
    input("password: ")


def shout_and_fail() -> None:
    for _ in range(100):
        print("x" * 100_000)
    raise ValueError("after all that")


def fail(error: BaseException) -> Callable[[], None]:
    def misdeed() -> None:
        raise error

    return misdeed


RAISES: dict[str, tuple[Callable[[], None], str]] = {
    "SystemExit": (leave_with_words, "SystemExit: 37"),
    "a BaseException": (fail(Odd("odd")), "Odd: odd"),
    "KeyboardInterrupt": (fail(KeyboardInterrupt()), "KeyboardInterrupt"),
    "GeneratorExit": (fail(GeneratorExit()), "GeneratorExit"),
    "an exception that cannot be pickled": (fail(UnpicklableError(1, 2)), "UnpicklableError: cannot travel"),
    "an exception without text": (fail(UnspeakableError()), "UnspeakableError"),
    "an exception of many lines": (fail(ValueError("one\n\ntwo")), "ValueError: one two"),
    "a mistake of the user's": (fail(UserError("game.json: damaged")), "game.json: damaged"),
    "output without end": (shout_and_fail, "ValueError: after all that"),
}
"""What fails a call alone, and the reason."""

KILLS: dict[str, tuple[Callable[[], None], str]] = {
    "an exit": (leave_at_once, "exited with status 3 (it said: fatal: no memory for the planner)"),
    "a crash": (crash, "was killed by SIGSEGV"),
    "a signal": (kill_itself, "was killed by SIGKILL"),
    "a call without end": (hang, "did not return in"),
}
"""What takes its process with it, and the reason."""

ANSWERS: dict[str, tuple[str, object, str]] = {
    "a reward that is no number": ("log_reward", math.nan, "ValueError: log reward nan"),
    "text that no file takes": ("outcome", "\ud800", "UnicodeEncodeError"),
    "a number for the actions": ("admissible_actions", 7, "TypeError"),
}
"""Properties of an environment that give back nonsense, and the reason."""

MISDEEDS = {**RAISES, **KILLS, "input": (ask, "EOFError")}

SEEDS = {name: FIRST + place for place, name in enumerate(MISDEEDS)}


class MisbehavingSettings(NumberLineSettings):
    """Settings of the task.

    Attributes:
        at_start: Whether it is starting an instance that goes wrong, or the first step.
    """

    environment: ClassVar[str] = "tests.actors.misbehaving:MisbehavingEnv"

    at_start: bool = True


class MisbehavingEnv(NumberLineEnv):
    """NumberLine, but for the instances in `SEEDS`."""

    settings: MisbehavingSettings

    def source(self, seed: int, split: str) -> str:
        return f"games/{seed}.json"

    def reset(self, *, seed=None, options=None):
        if self.settings.at_start:
            self._misbehave(seed)
        return super().reset(seed=seed, options=options)

    def advance(self, action: str) -> float:
        self._misbehave(self.instance_seed)
        return super().advance(action)

    def _misbehave(self, seed: int | None) -> None:
        for name, (misdeed, _) in MISDEEDS.items():
            if SEEDS[name] == seed:
                misdeed()
