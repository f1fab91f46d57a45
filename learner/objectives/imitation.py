"""Supervised fine-tuning on the expert's responses, on the same buffer and adapter as everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowvlm.learner.baselines import cross_entropy
from gflowvlm.learner.distributed import Ranks
from gflowvlm.learner.metrics import StepMetrics
from gflowvlm.learner.objectives.base import LossOfScores, Objective, ObjectiveOutput, ScoredBatch
from gflowvlm.learner.scoring import LOG_ACT, LOG_COT, LOG_REST
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.response import DONE_TOKEN


class ImitationObjective(Objective):
    """Token cross-entropy on expert trajectories; what the policy made itself is left alone.

    Args:
        config: The run's configuration; `objective.sft_done` says whether responses that stop are imitated.
    """

    def __init__(self, config: RunConfig) -> None:
        self._with_done = config.objective.sft_done

    def prepare(self, batch: ScoredBatch, ranks: Ranks) -> LossOfScores:
        """Returns the cross-entropy; nothing depends on the first scores."""
        trajectories = batch.trajectories
        wanted = [
            [t.expert and (self._with_done or step.action != DONE_TOKEN) for step in t.steps] for t in trajectories
        ]
        chosen = torch.tensor([w for of_one in wanted for w in of_one], dtype=torch.bool)
        tokens = torch.tensor([len(step.response_ids) for t in trajectories for step in t.steps])
        count = float(tokens[chosen].sum())
        used = float(sum(any(of_one) for of_one in wanted))

        def loss_of(scores: Tensor) -> ObjectiveOutput:
            scores = scores.cpu().double()
            log_prob = scores[:, LOG_ACT] + scores[:, LOG_COT] + scores[:, LOG_REST]
            output = cross_entropy(log_prob=log_prob, tokens=tokens, chosen=chosen)
            means = {name: (float(value) * count, count) for name, value in output.metrics.items()}
            means["loss"] = (float(output.loss.detach()) * count, count)
            sums = {"trajectories_used": used, "trajectories_dropped": len(trajectories) - used}
            return ObjectiveOutput(output.loss, count, StepMetrics(sums=sums, means=means))

        return loss_of
