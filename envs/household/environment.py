"""The ALFWorld environment."""

import math
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from gflowvlm.envs.base import Reading, TaskEnv
from gflowvlm.envs.household import lexicon, prompts
from gflowvlm.envs.household.games import (
    GAME_FILE,
    SEEN_FOLDER,
    TRAIN_FOLDER,
    UNSEEN_FOLDER,
    Game,
    find_games,
    games_there,
    official_data,
)
from gflowvlm.envs.household.sessions import Session, TextSession
from gflowvlm.envs.household.settings import AlfworldSettings
from gflowvlm.envs.household.starter import starter_set
from gflowvlm.envs.household.tasks import SUB_GOALS, TaskType
from gflowvlm.shared.instances import EVALUATION_SEEDS
from gflowvlm.shared.lexicon import Lexicon
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.trajectory import EndReason

GOAL_REWARD = AlfworldSettings.largest_reward
REWARD_FLOOR = 0.1


class AlfworldEnv(TaskEnv):
    """Household tasks by text commands, in what the agent sees where it stands.

    Games are ALFWorld's: where its data is installed that is played, unchanged; elsewhere generated games
    are (see `starter_set`). Seed and split choose the game, and consecutive seeds go through all games of a
    split once before any comes again. In distribution are the games of the seen rooms, out of distribution
    those of the unseen ones. Unless the settings say otherwise, what is to be learned from (training and
    demonstrations, by their seeds) are the ``train`` games of the seen rooms, and evaluations play the
    ``valid_seen`` ones where there are any.

    Stopping at a state is worth R(z⊤) = max(0.1, 50·[goal holds] + sub-goals that hold); see
    `sub_goals_reached`. Reaching the goal does not end the episode: the policy has to stop.

    The original reward is 50 for ending where the goal holds, 1 for every sub-goal reached for the first
    time in the episode, and -1 for an invalid response.

    The expert follows the planner's plan, planned anew from wherever it is asked.

    Attributes:
        game: The game of the current instance.
    """

    log_reward_floor = math.log(REWARD_FLOOR)
    answer_fields = prompts.FIELDS
    settings: AlfworldSettings
    game: Game

    def __init__(self, settings: AlfworldSettings | None = None, render_mode: str | None = None) -> None:
        super().__init__(settings if settings is not None else AlfworldSettings(), render_mode)
        self._most_sub_goals = 0

    @classmethod
    def lexicon(cls) -> Lexicon:
        """Returns the words of the games' prompts without history, and of all responses.

        Raises:
            UserError: alfworld is not installed.
        """
        return lexicon.lexicon()

    @property
    def admissible_actions(self) -> list[str]:
        """The game's admissible commands, sorted, and ``[DONE]``."""
        return [*self._session.observation.commands, DONE_TOKEN]

    def category(self, seed: int, split: str) -> str:
        """Returns the task type of the game of a seed; the game is not opened."""
        return self._game_of(seed, split).task_type.value

    def source(self, seed: int, split: str) -> str:
        """Returns the game file of a seed; the game is not opened."""
        return str(self._game_of(seed, split).folder / GAME_FILE)

    def prompt(self) -> str:
        """Returns the prompt, with or without history as the settings say."""
        past = list(zip(self._past_states, self.past_actions, strict=True))
        shown = past if self.settings.prompt == "history" else None
        return prompts.prompt(self.goal, shown, self.admissible_actions, self.answer)

    def expert_action(self) -> str:
        """Returns the next command of the planner's plan; `[DONE]` at the goal, or where there is no way to it."""
        if self._solved():
            return DONE_TOKEN
        plan = self._session.plan()
        return plan[0] if plan else DONE_TOKEN

    def reading(self) -> Reading:
        """Returns place and thing in hand, and what is left to do in several wordings."""
        session = self._session
        return prompts.reading(session.seen(), session.task, session.sub_goals())

    def branch(self) -> Self:
        """Returns a copy that can go on differently: the same game, played to the same state."""
        other = super().branch()
        other._session = self._open(self.game)
        for action in self.past_actions:
            other._session.step(action)
        return other

    def _start(self, rng: np.random.Generator) -> None:
        self.game = self._game_of(self.instance_seed or 0, self.split)
        # The last game's engine goes back to the pool first, so that one is enough.
        self.__dict__.pop("_session", None)
        self._session = self._open(self.game)
        self.goal = prompts.goal(self._session.observation)
        self._most_sub_goals = self._session.sub_goals()

    def _root(self) -> Path:
        if self.settings.games is not None:
            return Path(self.settings.games).expanduser()
        return official_data() or starter_set()

    def _game_of(self, seed: int, split: str) -> Game:
        root, types = self._root(), tuple(TaskType(t) for t in self.settings.task_types)
        folder = self._folder_of(seed, split, root, types)
        games = find_games(root, folder, types)
        if folder == TRAIN_FOLDER:
            games = games[: self.settings.train_games]
        return games[seed % len(games)]

    def _folder_of(self, seed: int, split: str, root: Path, types: tuple[TaskType, ...]) -> str:
        if split == "ood":
            return UNSEEN_FOLDER
        if self.settings.seen_games != "held_out":
            return self.settings.seen_games
        held_out = seed in EVALUATION_SEEDS and len(games_there(root, SEEN_FOLDER, types)) > 0
        return SEEN_FOLDER if held_out else TRAIN_FOLDER

    def _open(self, game: Game) -> Session:
        if self.settings.view == "facts":
            return TextSession(game)
        from gflowvlm.envs.household.thor import ThorSession

        return ThorSession(game)

    def _apply(self, action: str | None) -> float:
        reward = 0.0
        if action is not None:
            self._session.step(action)
            reached = self._session.sub_goals()
            reward = float(max(0, reached - self._most_sub_goals))
            self._most_sub_goals = max(self._most_sub_goals, reached)
        if self.end is EndReason.INVALID:
            return reward - 1.0
        over = self.end is not None or len(self.past_actions) == self.max_steps
        return reward + (GOAL_REWARD if over and self._solved() else 0.0)

    def _state_text(self) -> str:
        return prompts.state_text(self._session.observation)

    def _draw(self, rng: np.random.Generator) -> Image.Image:
        return self._session.picture(self.image_size)

    def _state_log_reward(self) -> float:
        reward = self._session.sub_goals() + (GOAL_REWARD if self._solved() else 0.0)
        return math.log(max(REWARD_FLOOR, reward))

    def _state_outcome(self) -> str:
        if self._solved():
            return "goal"
        return f"{self._session.sub_goals()} of {SUB_GOALS[self._session.task.type]} sub-goals"

    def _solved(self) -> bool:
        return self._session.observation.won

    def _info(self) -> dict[str, Any]:
        return {**super()._info(), "game": self.game.name, "task_type": self.game.task_type.value}
