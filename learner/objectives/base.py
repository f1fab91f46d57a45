"""What the learner asks of an objective: scores of a batch's responses in, a loss out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from gflowvlm.learner.distributed import Ranks
from gflowvlm.learner.heads import HeadKind
from gflowvlm.learner.metrics import StepMetrics
from gflowvlm.shared.trajectory import Trajectory


@dataclass(frozen=True)
class ObjectiveOutput:
    """A loss and what to log about it.

    Attributes:
        loss: Scalar, the mean over `count` items of this rank; differentiable in the scores.
        count: Of how many items the loss is the mean: trajectories, responses or tokens.
        metrics: This rank's figures.
    """

    loss: Tensor
    count: float
    metrics: StepMetrics


LossOfScores = Callable[[Tensor], ObjectiveOutput]


@dataclass(frozen=True)
class ScoredBatch:
    """One rank's part of a batch with its first scores.

    Attributes:
        trajectories: K trajectories with S steps in all.
        scores: (S, 4) `StepScores.stacked` of the steps in order, detached, and for an objective with a head its
            number of their states in a fifth column.
        reference: (S,) log P_ref(c); None for objectives that do without.
    """

    trajectories: Sequence[Trajectory]
    scores: Tensor
    reference: Tensor | None


class Objective(ABC):
    """Turns scores into a loss. One instance serves all steps and keeps nothing between them.

    Attributes:
        head: What it learns besides the policy; None without a head.
        uses_reference: Whether it needs log P_ref of the chains of thought.
        uses_stops: Whether it needs log P(⊤) also at states where the policy did not stop.
        epochs: Updates made from one batch.
    """

    head: HeadKind | None = None
    uses_reference: bool = False
    uses_stops: bool = False
    epochs: int = 1

    def first_estimates(self, batch: ScoredBatch) -> Tensor:
        """(K,) what the head should say of each trajectory by this batch, NaN where it says nothing."""
        raise NotImplementedError(f"{type(self).__name__} has no head")

    @abstractmethod
    def prepare(self, batch: ScoredBatch, ranks: Ranks) -> LossOfScores:
        """Returns the loss as a function of the scores; what is fixed during a batch is fixed by its first scores."""
