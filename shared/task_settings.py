"""The settings of the tasks."""

from typing import Literal

from pydantic import Field, model_validator

from shared.settings import Settings


class NumberLineSettings(Settings):
    """NumberLine: walk from a start number to a target number."""

    name: Literal["numberline"] = "numberline"
    n_max: int = Field(5, ge=1, le=99, description="In-distribution numbers are 0..n_max.")
    ood_low: int = Field(10, ge=0, le=99, description="Smallest out-of-distribution number.")
    ood_high: int = Field(50, ge=1, le=99, description="Largest out-of-distribution number.")
    ood_max_distance: int = Field(5, ge=1, le=99, description="Largest start-to-target distance out of distribution.")
    max_steps: int = Field(10, ge=1, le=64, description="Step limit; the paper uses 2 n_max.")
    prompt: Literal["history", "markov"] = Field("history", description="Whether past steps stand in the prompt.")
    image_size: int = Field(64, ge=32, le=1024, description="Side of the square picture, pixels.")

    @model_validator(mode="after")
    def _ordered(self) -> "NumberLineSettings":
        if self.ood_low >= self.ood_high:
            raise ValueError("ood_low must be below ood_high")
        return self


TaskSettings = NumberLineSettings
