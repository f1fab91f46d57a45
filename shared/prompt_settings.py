"""What the user says of the prompts that a model is given, beside what stands in them."""

from typing import Self

from pydantic import Field, model_validator

from gflowvlm.shared.settings import Settings


class PromptSettings(Settings):
    """How prompts are put to a model: the same in sampler, learner and supervised fine-tuning."""

    system_prompt: str | None = Field(
        None,
        max_length=20_000,
        description="Put in front of every prompt as the system's turn; by default whatever the chat template writes.",
    )
    min_pixels: int | None = Field(
        None,
        ge=1,
        le=2**31,
        description="Smaller pictures are enlarged to so many pixels; for processors that have such a bound (Qwen-VL).",
    )
    max_pixels: int | None = Field(
        None,
        ge=1,
        le=2**31,
        description="Larger pictures are reduced to so many pixels, which bounds a picture's tokens; as min_pixels.",
    )

    @property
    def pixel_bounds(self) -> dict[str, int]:
        """The bounds that are set, as processors call them."""
        bounds = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        return {name: value for name, value in bounds.items() if value is not None}

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels ({self.min_pixels}) must not exceed max_pixels ({self.max_pixels})")
        return self
