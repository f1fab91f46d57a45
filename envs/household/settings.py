"""ALFWorld's settings."""

from typing import ClassVar, Literal, get_args

from pydantic import Field

from gflowvlm.shared.settings import FolderPath
from gflowvlm.shared.task_settings import TaskSettings

AlfworldTaskType = Literal[
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
]


class AlfworldSettings(TaskSettings):
    """ALFWorld: household tasks by text commands."""

    environment: ClassVar[str] = "gflowvlm.envs.household.environment:AlfworldEnv"
    largest_reward: ClassVar[float] = 50.0
    # The tree of commands is too large to walk, and the environment looks for games, or even makes some.
    exact_target: ClassVar[bool] = False
    # A step takes milliseconds in the engine, and a planner in another language reads the games.
    in_own_process: ClassVar[bool] = True
    measured_on: ClassVar[str] = (
        "ALFWorld games: of seen rooms (`id`; `task.seen_games` says which) and of unseen ones (`ood`)"
    )

    name: Literal["alfworld"] = Field("alfworld", description="Chooses this task.")
    max_steps: int = Field(35, ge=1, le=200, description="Step limit.")
    image_size: int = Field(300, ge=32, le=1024, description="Side of the square picture, pixels.")
    games: FolderPath | None = Field(
        None,
        description="Folder with `json_2.1.1`; by default ALFWorld's data (ALFWORLD_DATA), else the starter set.",
    )
    seen_games: Literal["held_out", "train", "valid_seen"] = Field(
        "held_out",
        description="Which games of seen rooms are split `id`; `held_out`: `train` to learn from, and for evaluations "
        "and `gflowvlm play` `valid_seen`, where there are such.",
    )
    train_games: int | None = Field(
        None, ge=1, description="How many of the `train` games are played, of each type in proportion; all by default."
    )
    task_types: tuple[AlfworldTaskType, ...] = Field(
        get_args(AlfworldTaskType), min_length=1, description="Task types to play; all six by default."
    )
    view: Literal["facts", "thor"] = Field(
        "facts", description="Picture drawn from the game's facts, or 3-D by AI2-THOR where it is installed."
    )
