"""One game being played, as text or in AI2-THOR: what the environment needs of either."""

import threading
import weakref
from pathlib import Path
from typing import Protocol

from PIL import Image

from gflowvlm.envs.household.engine import GameEngine, Observation
from gflowvlm.envs.household.games import Game
from gflowvlm.envs.household.rendering import draw
from gflowvlm.envs.household.tasks import Task, sub_goals_reached
from gflowvlm.envs.household.view import View, view


class Session(Protocol):
    """A game from its first state on."""

    task: Task
    observation: Observation

    def step(self, command: str) -> None:
        """Gives an admissible command."""

    def sub_goals(self) -> int:
        """Returns how many sub-goals hold."""

    def plan(self) -> tuple[str, ...]:
        """Returns the expert's commands from here on; the first is what it does next."""

    def seen(self) -> View:
        """Returns what the agent sees, as data."""

    def picture(self, size: int) -> Image.Image:
        """Returns what the agent sees, `size` pixels a side."""


class TextSession:
    """A text game; its picture is drawn from the facts.

    Its engine comes from a pool of the process and goes back when the session is dropped, so that the K
    rollouts of a group load their game once each and the next group's reuse the engines.
    """

    def __init__(self, game: Game) -> None:
        self.task = game.task()
        self._engine = _engines.take(game)
        weakref.finalize(self, _engines.release, game.folder, self._engine).atexit = False
        self.observation = self._engine.reset()
        self._plan = self._engine.walkthrough

    def step(self, command: str) -> None:
        """Gives an admissible command."""
        # A plan holds as long as it is followed.
        self._plan = self._plan[1:] if self._plan[:1] == (command,) else ()
        self.observation = self._engine.step(command)

    def sub_goals(self) -> int:
        """Returns how many sub-goals hold."""
        return sub_goals_reached(self.task, self.observation.facts, self.observation.won)

    def plan(self) -> tuple[str, ...]:
        """Returns the planner's commands to the goal: those stored with the game, elsewhere planned anew."""
        if not self.observation.won and (not self._plan or self._plan[0] not in self.observation.commands):
            self._plan = self._engine.plan()
        return self._plan

    def seen(self) -> View:
        """Returns what the agent sees, as data."""
        return view(self.observation.facts)

    def picture(self, size: int) -> Image.Image:
        """Returns what the agent sees, `size` pixels a side."""
        return draw(self.seen(), size)


class _Engines:
    """The idle engines of this process, by the game that each has loaded; the longest idle first.

    There are never more engines, of a few MB each, than games were played at the same time. None is ever unloaded:
    after `dlclose` of some of the planner's libraries, loading another one ends the process (glibc 2.36).
    """

    def __init__(self) -> None:
        # Reentrant: a session may be collected, and give its engine back, while another takes one.
        self._lock = threading.RLock()
        self._idle: list[tuple[Path, GameEngine]] = []

    def take(self, game: Game) -> GameEngine:
        """Returns an engine with the game loaded."""
        with self._lock:
            for index, (folder, engine) in enumerate(self._idle):
                if folder == game.folder:
                    del self._idle[index]
                    return engine
            engine = self._idle.pop(0)[1] if self._idle else GameEngine()
        engine.load(game.content())
        return engine

    def release(self, folder: Path, engine: GameEngine) -> None:
        """Takes an engine back, still loaded with its game."""
        with self._lock:
            self._idle.append((folder, engine))


_engines = _Engines()
