"""NumberSequence's settings."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from gflowvlm.shared.settings import Fraction
from gflowvlm.shared.task_settings import TaskSettings


class NumberSequenceSettings(TaskSettings):
    """NumberSequence: continue an arithmetic or Fibonacci-like sequence."""

    environment: ClassVar[str] = "gflowvlm.envs.numbersequence.environment:NumberSequenceEnv"
    tokenizer_texts: ClassVar[tuple[str, ...]] = (
        "Fill each ? of the sequence: add the same step each time, or add the two numbers before. "
        "[DONE] when no ? is left.",
        'Answer: {"sequence": "", "missing": , "thoughts": "", "action": ""}',
        "no number is missing",
        "the sequence is complete",
        "nothing is left to fill",
        "no rule fits",
        "the numbers follow no rule",
        "there is no rule",
        "steps of 1",
        "1 more each time",
        "each adds 1",
        "sums of two",
        "the two before together",
        "each is the sum of two",
        "steps of 1 and sums of two",
        "1 more each time and the two before together",
        "each adds 1 and each is the sum of two",
    )

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
