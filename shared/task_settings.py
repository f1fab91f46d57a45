"""The settings of the tasks."""

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from gflowvlm.shared.settings import Fraction, Settings

DEFAULT_TASK = "numberline"


class EpisodeSettings(Settings):
    """What the settings of every task have in common.

    Attributes:
        largest_reward: The largest single one of the task's own rewards.
    """

    largest_reward: ClassVar[float] = 1.0

    max_steps: int = Field(10, ge=1, le=64, description="Step limit.")
    prompt: Literal["history", "markov"] = Field("history", description="Whether past steps stand in the prompt.")
    image_size: int = Field(64, ge=32, le=1024, description="Side of the square picture, pixels.")


class NumberLineSettings(EpisodeSettings):
    """NumberLine: walk from a start number to a target number."""

    name: Literal["numberline"] = Field("numberline", description="Chooses this task.")
    n_max: int = Field(5, ge=1, le=99, description="In-distribution numbers are 0..n_max.")
    ood_low: int = Field(10, ge=0, le=99, description="Smallest out-of-distribution number.")
    ood_high: int = Field(50, ge=1, le=99, description="Largest out-of-distribution number.")
    ood_max_distance: int = Field(5, ge=1, le=99, description="Largest start-to-target distance out of distribution.")
    max_steps: int = Field(10, ge=1, le=64, description="Step limit; the paper uses 2 n_max.")

    @model_validator(mode="after")
    def _ordered(self) -> "NumberLineSettings":
        if self.ood_low >= self.ood_high:
            raise ValueError("ood_low must be below ood_high")
        return self


class BlackjackSettings(EpisodeSettings):
    """Blackjack: beat the dealer without going over 21."""

    name: Literal["blackjack"] = Field("blackjack", description="Chooses this task.")


class NumberSequenceSettings(EpisodeSettings):
    """NumberSequence: continue an arithmetic or Fibonacci-like sequence."""

    name: Literal["numbersequence"] = Field("numbersequence", description="Chooses this task.")
    n_max: int = Field(9, ge=2, le=19, description="In-distribution starts and steps are 1..n_max.")
    ood_low: int = Field(10, ge=1, le=99, description="Smallest out-of-distribution start and step.")
    ood_high: int = Field(19, ge=2, le=99, description="Largest out-of-distribution start and step.")
    ambiguous_share: Fraction = Field(0.5, description="Share of instances that both rules continue, each its own way.")
    continuation: int = Field(1, ge=1, le=5, description="How many numbers are missing.")
    choices: int = Field(4, ge=2, le=12, description="How many numbers are admissible at a state.")

    @model_validator(mode="after")
    def _consistent(self) -> "NumberSequenceSettings":
        if not self.n_max < self.ood_low < self.ood_high:
            raise ValueError("n_max must be below ood_low, and ood_low below ood_high")
        if self.max_steps <= self.continuation:
            raise ValueError("max_steps must exceed continuation, or no step is left for [DONE]")
        return self


AlfworldTaskType = Literal[
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
]


class AlfworldSettings(EpisodeSettings):
    """ALFWorld: household tasks by text commands."""

    largest_reward: ClassVar[float] = 50.0

    name: Literal["alfworld"] = Field("alfworld", description="Chooses this task.")
    max_steps: int = Field(35, ge=1, le=200, description="Step limit.")
    image_size: int = Field(300, ge=32, le=1024, description="Side of the square picture, pixels.")
    games: str | None = Field(
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


_SETTINGS: dict[str, type[EpisodeSettings]] = {
    "numberline": NumberLineSettings,
    "blackjack": BlackjackSettings,
    "numbersequence": NumberSequenceSettings,
    "alfworld": AlfworldSettings,
}


def _of_its_class(settings: Any) -> Any:
    # The union would accept the same, but it wants a name, which configurations from before there were other
    # tasks lack, and it puts that name into the keys of its errors: task.numberline.n_max for task.n_max.
    if isinstance(settings, dict):
        name = settings.get("name", DEFAULT_TASK)
        if isinstance(name, str) and name in _SETTINGS:
            return _SETTINGS[name].model_validate(settings)
    return settings


TaskSettings = Annotated[
    Annotated[
        NumberLineSettings | BlackjackSettings | NumberSequenceSettings | AlfworldSettings, Field(discriminator="name")
    ],
    BeforeValidator(_of_its_class),
]
"""The settings of one task; `name` says which, NumberLine by default."""
