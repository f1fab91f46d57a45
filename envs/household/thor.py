"""The same games in 3-D, through alfworld's `AlfredThorEnv`, for those who have AI2-THOR.

It needs what this project does not install: ai2thor 2.1.0 with its old web stack, its Unity build
(downloaded at the first start), an X display, torchvision, and ALFWorld's own data, whose games say where
every thing stands. `missing` says which of these a machine lacks.
"""

import json
import os
from importlib.util import find_spec
from typing import Any

from PIL import Image

from gflowvlm.envs.household.engine import Observation
from gflowvlm.envs.household.games import TASK_FILE, Game
from gflowvlm.envs.household.tasks import SUB_GOALS
from gflowvlm.envs.household.view import Place, Thing, View
from gflowvlm.shared.errors import UserError

SCREEN = 300
NO_LIMIT = 10**6
"""The step limit is ours; alfworld's own must not come before it."""


def missing(game: Game) -> list[str]:
    """Returns what stands in the way of showing a game in AI2-THOR, in words; nothing where nothing does."""
    lacks = [
        f"package {name} ({why})"
        for name, why in (
            ("ai2thor", "`pip install 'alfworld[vis]'`, in an environment of its own: it pins an old werkzeug"),
            ("cv2", "`pip install opencv-python-headless`"),
            ("torchvision", "alfworld imports it for its detector"),
        )
        if find_spec(name) is None
    ]
    if not os.environ.get("DISPLAY"):
        lacks.append("an X display (DISPLAY is not set; start one, for example by Xvfb)")
    if "object_poses" not in _description(game).get("scene", {}):
        lacks.append(
            f"a 3-D scene in {game.folder / TASK_FILE} (only ALFWorld's own data has them: `alfworld-download`)"
        )
    return lacks


class ThorSession:
    """A game in AI2-THOR; actions, expert and pictures are those of `AlfredThorEnv`.

    Raises:
        UserError: The machine or the game lacks something; the message says what.
    """

    def __init__(self, game: Game) -> None:
        lacks = missing(game)
        if lacks:
            raise UserError(f"view thor: AI2-THOR cannot show {game.name}; missing: {'; '.join(lacks)}")
        from alfworld.agents.environment.alfred_thor_env import AlfredThorEnv

        self.task = game.task()
        # Only this game lies below its folder, so it is the one that is drawn; only training games come with an expert.
        self._env = AlfredThorEnv(_config(game), train_eval="train").init_env(batch_size=1)
        feedback, info = self._env.reset()
        self._take(feedback, info)

    def step(self, command: str) -> None:
        """Gives an admissible command."""
        feedback, _, _, info = self._env.step([command])
        self._take(feedback, info)

    def sub_goals(self) -> int:
        """Returns the sub-goals that hold: ALFRED's share of goal conditions, of as many as the task type has."""
        total = SUB_GOALS[self.task.type]
        return total if self.observation.won else min(int(self._share * total), total - 1)

    def plan(self) -> tuple[str, ...]:
        """Returns the next command of alfworld's hand-coded expert."""
        return self._plan

    def seen(self) -> View:
        """Returns place and thing in hand; what else is seen is in the picture only."""
        controller = self._env.envs[0].controller
        here = () if controller.curr_recep == "nothing" else (Place(controller.curr_recep, False, False, ()),)
        return View(here, (), tuple(Thing(name, ()) for name in controller.inventory))

    def picture(self, size: int) -> Image.Image:
        """Returns the camera's picture."""
        # alfworld hands out blue first.
        return Image.fromarray(self._env.get_frames()[0][:, :, ::-1].copy()).resize((size, size))

    def _take(self, feedback: list[str], info: dict[str, Any]) -> None:
        self.observation = Observation(
            feedback[0], tuple(sorted(set(info["admissible_commands"][0]))), bool(info["won"][0]), frozenset()
        )
        self._share = float(info["goal_condition_success_rate"][0])
        self._plan = tuple(info["extra.expert_plan"][0])


def _config(game: Game) -> dict[str, Any]:
    """Returns `AlfredThorEnv`'s configuration for one game."""
    folder = str(game.folder)
    return {
        "dataset": {
            "data_path": folder,
            "eval_id_data_path": folder,
            "eval_ood_data_path": folder,
            "num_train_games": -1,
            "num_eval_games": -1,
        },
        "env": {
            "task_types": [1, 2, 3, 4, 5, 6],
            "goal_desc_human_anns_prob": 0,
            "thor": {
                "screen_width": SCREEN,
                "screen_height": SCREEN,
                "smooth_nav": False,
                "save_frames_to_disk": False,
                "save_frames_path": "",
            },
        },
        "controller": {"type": "oracle", "debug": False, "load_receps": True},
        "general": {"training_method": "dagger"},
        "dagger": {"training": {"max_nb_steps_per_episode": NO_LIMIT}},
    }


def _description(game: Game) -> dict[str, Any]:
    try:
        content = json.loads((game.folder / TASK_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    return content if isinstance(content, dict) else {}
