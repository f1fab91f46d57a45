"""The GFlowNet losses as objectives of the learner."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from gflowvlm.learner.distributed import Ranks
from gflowvlm.learner.losses import LOSSES, LossOutput
from gflowvlm.learner.metrics import StepMetrics
from gflowvlm.learner.objectives.base import LossOfScores, Objective, ObjectiveOutput, ScoredBatch
from gflowvlm.learner.targets import STATE_WISE, LossInputs, Target, loss_inputs
from gflowvlm.shared.config import RunConfig

_SUMMED = ("trajectories_used", "trajectories_dropped", "groups", "groups_of_one")
_MAXIMAL = ("residual_abs_max",)


class BalanceObjective(Objective):
    """One of `gflowvlm.learner.losses`, towards the configured target (`gflowvlm.learner.targets`).

    Args:
        config: The run's configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        objective = config.objective
        self._loss = partial(LOSSES[objective.loss], residual_clip=objective.residual_clip)
        if objective.loss.endswith("subtb"):
            self._loss = partial(self._loss, subtb_lambda=objective.subtb_lambda)
        self._target = Target.of(config)
        self.head = self._target.head
        self.uses_reference = self._target.reference_weight > 0
        self.uses_stops = self._target.loss in STATE_WISE

    def first_estimates(self, batch: ScoredBatch) -> Tensor:
        """(K,) nats, by what followed the visited states of each trajectory."""
        return self._inputs(batch, batch.scores).first_estimates()

    def prepare(self, batch: ScoredBatch, ranks: Ranks) -> LossOfScores:
        """Returns the loss; these losses fix nothing by the first scores."""

        def loss_of(scores: Tensor) -> ObjectiveOutput:
            inputs = self._inputs(batch, scores)
            output = self._loss(**inputs.arguments())
            used = float(output.metrics["trajectories_used"])
            return ObjectiveOutput(output.loss, used, _metrics(inputs, output, used))

        return loss_of

    def _inputs(self, batch: ScoredBatch, scores: Tensor) -> LossInputs:
        return loss_inputs(batch.trajectories, scores, batch.reference, self._target)


def _metrics(inputs: LossInputs, output: LossOutput, used: float) -> StepMetrics:
    values = {name: float(value) for name, value in output.metrics.items()}
    taken = torch.arange(inputs.log_pf.shape[1]) < inputs.length[:, None]
    log_pf = float(torch.where(taken, inputs.policy_log_pf, 0.0).sum())
    means = {n: (v * used, used) for n, v in values.items() if n not in _SUMMED + _MAXIMAL}
    means["log_pf_mean"] = (log_pf, float(taken.sum()))
    first_flow = inputs.log_first_flow()
    if first_flow is not None:
        means["log_z"] = (float(first_flow.detach().sum()), float(len(first_flow)))
    return StepMetrics(
        sums={n: values[n] for n in _SUMMED if n in values} | {"trajectories_without_flow": float(inputs.without_flow)},
        means=means,
        maxima={n: values[n] for n in _MAXIMAL},
    )
