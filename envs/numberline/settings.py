"""NumberLine's settings."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from gflowvlm.shared.task_settings import TaskSettings


class NumberLineSettings(TaskSettings):
    """NumberLine: walk from a start number to a target number."""

    environment: ClassVar[str] = "gflowvlm.envs.numberline.environment:NumberLineEnv"
    tokenizer_texts: ClassVar[tuple[str, ...]] = (
        'Answer: {"current": , "target": , "thoughts": "", "action": ""}\nState: picture\nActions: + -',
        "Make the current number equal to the target number. + adds 1, - takes 1 away, stops.",
        "State 0: 1 Action 0: +\nState 1: picture\nActions: + -",
        "0 is below 1 is less than 2 comes before 3 is above 4 is more than 5 comes after 6",
        "7 is equal to 8 is the same as 9 matches 1 Target Current",
    )

    name: Literal["numberline"] = Field("numberline", description="Chooses this task.")
    n_max: int = Field(5, ge=1, le=99, description="In-distribution numbers are 0..n_max.")
    ood_low: int = Field(10, ge=0, le=99, description="Smallest out-of-distribution number.")
    ood_high: int = Field(50, ge=1, le=99, description="Largest out-of-distribution number.")
    ood_max_distance: int = Field(5, ge=1, le=99, description="Largest start-to-target distance out of distribution.")
    max_steps: int = Field(10, ge=1, le=64, description="Step limit; the paper uses 2 n_max.")

    def for_reading(self) -> Self:
        """Returns settings with all numbers from 0 to a bit beyond the largest, far apart: none tells the other."""
        highest = min(99, self.ood_high + 9)
        return self.model_copy(update={"ood_low": 0, "ood_high": highest, "ood_max_distance": highest})

    @model_validator(mode="after")
    def _ordered(self) -> "NumberLineSettings":
        if self.ood_low >= self.ood_high:
            raise ValueError("ood_low must be below ood_high")
        return self
