"""One live ALFWorld text game: alfworld's own environment, driven directly so that the game can be chosen."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gflowvlm.shared.errors import UserError

Fact = tuple[str, ...]
"""A predicate and its arguments by their names in the game: ``("inreceptacle", "apple 1", "fridge 1")``."""

INSTALL = "`make alfworld` installs it (a few minutes: its planner is compiled)"


@dataclass(frozen=True)
class Observation:
    """What the game says after a command.

    Attributes:
        feedback: The game's answer, unchanged.
        commands: The admissible commands, sorted.
        won: Whether the goal holds.
        facts: Everything that is true.
    """

    feedback: str
    commands: tuple[str, ...]
    won: bool
    facts: frozenset[Fact]


class GameEngine:
    """Plays one game at a time; loads another by `load`.

    Raises:
        UserError: alfworld or textworld is not installed.
    """

    def __init__(self) -> None:
        try:
            from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
            from textworld import EnvInfos
            from textworld.envs.pddl import PddlEnv

            from gflowvlm.envs.household import memoization
        except ImportError as error:
            package = (error.name or "alfworld").split(".")[0]
            raise UserError(f"task alfworld: package {package!r} is not installed; {INSTALL}") from None
        memoization.install()
        self._lock = memoization.PLANNER_LOCK
        infos = EnvInfos(facts=True, won=True, admissible_commands=True)
        self._env = AlfredDemangler(env=PddlEnv(infos), shuffle=False)
        self.walkthrough: tuple[str, ...] = ()

    def load(self, game: Mapping[str, Any]) -> None:
        """Loads a game.

        Args:
            game: The content of a ``game.tw-pddl``.
        """
        with self._lock:
            self._env.load(game)
        self.walkthrough = tuple(game.get("walkthrough") or ())

    def reset(self) -> Observation:
        """Starts the loaded game."""
        with self._lock:
            return _observation(self._env.reset())

    def step(self, command: str) -> Observation:
        """Gives a command; one that is not admissible changes nothing."""
        state, _, _ = self._env.step(command)
        return _observation(state)

    def plan(self) -> tuple[str, ...]:
        """Returns the planner's commands from the current state to the goal, none where it finds no way."""
        return tuple(self._env._pddl_state.replan(self._env._entity_infos))


def read_game(path: Path) -> dict[str, Any]:
    """Returns the content of a ``game.tw-pddl``.

    Raises:
        UserError: The file cannot be read or is no game.
    """
    try:
        game = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable game ({error}); remove or restore it") from None
    if not isinstance(game, dict) or not {"pddl_domain", "grammar", "pddl_problem"} <= game.keys():
        raise UserError(f"{path}: not an ALFWorld game; remove or restore it")
    return game


def _observation(state: Mapping[str, Any]) -> Observation:
    facts = ((fact.name, *(argument.name.strip() for argument in fact.arguments)) for fact in state["facts"])
    return Observation(
        feedback=state["feedback"],
        commands=tuple(state["admissible_commands"]),
        won=bool(state["won"]),
        facts=frozenset(fact for fact in facts if not fact[0].startswith("not_")),
    )
