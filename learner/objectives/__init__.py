"""What the learner minimises: a GFlowNet loss towards a target, or one of the baselines."""

from __future__ import annotations

from collections.abc import Callable

from gflowvlm.learner.losses import LOSSES
from gflowvlm.learner.objectives.balance import BalanceObjective
from gflowvlm.learner.objectives.base import LossOfScores, Objective, ObjectiveOutput, ScoredBatch
from gflowvlm.learner.objectives.imitation import ImitationObjective
from gflowvlm.learner.objectives.policy_gradient import GrpoObjective, PpoObjective
from gflowvlm.shared.config import RunConfig

OBJECTIVES: dict[str, Callable[[RunConfig], Objective]] = {
    **dict.fromkeys(LOSSES, BalanceObjective),
    "sft": ImitationObjective,
    "ppo": PpoObjective,
    "grpo": GrpoObjective,
}
"""`objective.loss` -> its objective."""


def make_objective(config: RunConfig) -> Objective:
    """Returns the objective that `objective.loss` names."""
    return OBJECTIVES[config.objective.loss](config)


__all__ = ["OBJECTIVES", "LossOfScores", "Objective", "ObjectiveOutput", "ScoredBatch", "make_objective"]
