"""How a learning rate goes: a linear rise to its peak, then a cosine."""

import math
from typing import Protocol


class Schedule(Protocol):
    """Settings of a training whose rate rises for `warmup_steps` and reaches 0 behind its last step."""

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""

    @property
    def warmup_steps(self) -> int:
        """First steps, over which the rate rises."""

    @property
    def learning_rate(self) -> float:
        """The peak."""


def warmed_cosine(step: int, *, peak: float, warmup_steps: int, end: int, final: float = 0.0) -> float:
    """Returns the learning rate of a step.

    Args:
        step: Number of the step, from 0.
        peak: The rate of step `warmup_steps`.
        warmup_steps: First steps, over which the rate rises linearly.
        end: The step at which the cosine is at its end; later ones have its rate.
        final: The rate there.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    share = min(1.0, (step - warmup_steps) / max(1, end - warmup_steps))
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * share))


def rate_to_zero(settings: Schedule, step: int) -> float:
    """Returns the learning rate of a step (counted from 0) of a training; the step behind its last one would have 0."""
    warmup_steps = min(settings.warmup_steps, settings.steps - 1)
    return warmed_cosine(step, peak=settings.learning_rate, warmup_steps=warmup_steps, end=settings.steps)
