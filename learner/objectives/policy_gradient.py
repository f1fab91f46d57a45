"""The policy-gradient baselines: PPO as in RL4VLM (Zhai et al. 2024, arXiv 2405.10292), and GRPO.

A response is one action: log π = log P_Act + cot_weight · log P_CoT. The policy that sampled is the learner's own
at the batch's first pass, since these objectives are only given trajectories of the newest policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gflowvlm.learner.baselines import clipped_policy_loss, generalised_advantages, group_advantages, value_loss
from gflowvlm.learner.distributed import Ranks
from gflowvlm.learner.heads import HeadKind
from gflowvlm.learner.metrics import StepMetrics
from gflowvlm.learner.objectives.base import LossOfScores, Objective, ObjectiveOutput, ScoredBatch
from gflowvlm.learner.scoring import LOG_ACT, LOG_COT
from gflowvlm.learner.targets import instance_numbers
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.trajectory import EndReason, Trajectory

REVISED_REWARD_UNIT = 100.0
"""What the revised reward is divided by: about the tasks' largest R(x)."""


class GrpoObjective(Objective):
    """Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300), without its KL term.

    Every response of a trajectory has the trajectory's advantage over its group.

    Args:
        config: The run's configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        self._settings = config.objective.policy_gradient
        original = self._settings.reward == "original"
        self._reward_unit = config.task.largest_reward if original else REVISED_REWARD_UNIT
        self._cot_weight = config.policy.cot_weight
        self._cut_is_terminal = config.target.truncation == "terminal"
        self.epochs = self._settings.epochs

    def prepare(self, batch: ScoredBatch, ranks: Ranks) -> LossOfScores:
        """Fixes advantages and the sampling policy's log-probabilities; returns the clipped surrogate."""
        # What a limit of tokens cut off has no return to compare: it is left out of its group.
        cut = torch.tensor([t.end.by_token_limit for t in batch.trajectories], dtype=torch.bool)
        reward = self._rewards(batch).masked_fill(cut[:, None], math.nan)
        numbers = instance_numbers(batch.trajectories)
        alone = len(cut) + torch.arange(len(cut))
        advantage = group_advantages(reward.nansum(dim=1), torch.where(cut, alone, numbers))
        return self._surrogate(batch, reward, advantage[:, None].expand_as(reward))

    def _rewards(self, batch: ScoredBatch) -> Tensor:
        """(K, T) reward of every response in its unit, NaN in the padding."""
        rewards = _padded(
            [torch.tensor(_rewards(t, self._settings.reward), dtype=torch.float64) for t in batch.trajectories]
        )
        return rewards / self._reward_unit

    def _log_prob(self, batch: ScoredBatch, scores: Tensor) -> Tensor:
        """(K, T) log π of the responses, NaN in the padding."""
        scores = scores.cpu().double()
        return _padded(_by_trajectory(batch, scores[:, LOG_ACT] + self._cot_weight * scores[:, LOG_COT]))

    def _surrogate(self, batch: ScoredBatch, reward: Tensor, advantage: Tensor) -> LossOfScores:
        old = self._log_prob(batch, batch.scores)
        is_step = ~reward.isnan()
        responses = float(is_step.sum())
        used = float(is_step.any(dim=1).sum())
        total_reward = float(reward.nansum()) * self._reward_unit

        def loss_of(scores: Tensor) -> ObjectiveOutput:
            log_prob = self._log_prob(batch, scores)
            output = clipped_policy_loss(
                log_prob=log_prob,
                old_log_prob=old,
                advantage=advantage,
                is_step=is_step,
                clip=self._settings.ratio_clip,
            )
            means = {name: (float(value) * responses, responses) for name, value in output.metrics.items()}
            means["loss"] = (float(output.loss.detach()) * responses, responses)
            means["log_pf_mean"] = (float(log_prob.detach().nansum()), responses)
            means["reward_mean"] = (total_reward, used)
            sums = {"trajectories_used": used, "trajectories_dropped": len(batch.trajectories) - used}
            return ObjectiveOutput(output.loss, responses, StepMetrics(sums=sums, means=means))

        return loss_of


class PpoObjective(GrpoObjective):
    """Proximal policy optimisation with a value that is read off the state as the flows are (`gflowvlm.learner.heads`).

    The value is in units of the task's largest reward: of rewards of tens, its squared error would move the adapter a
    hundred times as far as the advantages do.

    Args:
        config: The run's configuration.
    """

    head = HeadKind.VALUE

    def first_estimates(self, batch: ScoredBatch) -> Tensor:
        """(K,) mean over the states of the discounted sum of what followed; NaN without a response."""
        reward, nothing = self._rewards(batch), torch.zeros(len(batch.trajectories), dtype=torch.float64)
        returns = generalised_advantages(
            reward=reward,
            value=torch.zeros_like(reward),
            length=_lengths(batch.trajectories),
            last_value=nothing,
            discount=self._settings.discount,
            gae_lambda=1.0,
        )
        return torch.where(reward.isnan(), math.nan, returns).nanmean(dim=1)

    def prepare(self, batch: ScoredBatch, ranks: Ranks) -> LossOfScores:
        """Fixes advantages, returns and the sampling policy's log-probabilities; returns surrogate plus value loss."""
        settings = self._settings
        reward, value = self._rewards(batch), self._values(batch, batch.scores)
        length, last_value = _lengths(batch.trajectories), torch.zeros(value.shape[0], dtype=torch.float64)
        # The state behind a cut has no scored response: the last one that has stands at the end.
        cut = torch.tensor([self._is_cut(t) and len(t.steps) > 0 for t in batch.trajectories], dtype=torch.bool)
        if bool(cut.any()):
            length = length - cut.long()
            behind = value.gather(1, length.clamp(max=value.shape[1] - 1)[:, None]).squeeze(1)
            last_value = torch.where(cut, behind, 0.0)
            reward = torch.where(torch.arange(reward.shape[1]) < length[:, None], reward, math.nan)
        advantage = generalised_advantages(
            reward=reward,
            value=value,
            length=length,
            last_value=last_value,
            discount=settings.discount,
            gae_lambda=settings.gae_lambda,
        )
        is_step = ~reward.isnan()
        returns = torch.where(is_step, advantage + value, 0.0)
        surrogate = self._surrogate(batch, reward, _normalised(advantage, is_step, ranks))

        def loss_of(scores: Tensor) -> ObjectiveOutput:
            policy = surrogate(scores)
            fit = value_loss(value=self._values(batch, scores), returns=returns, is_step=is_step)
            loss = policy.loss + settings.value_weight * fit.loss
            means = {name: (float(v) * policy.count, policy.count) for name, v in fit.metrics.items()}
            means["loss"] = (float(loss.detach()) * policy.count, policy.count)
            return ObjectiveOutput(loss, policy.count, policy.metrics | StepMetrics(means=means))

        return loss_of

    def _is_cut(self, trajectory: Trajectory) -> bool:
        at_limit = trajectory.end is EndReason.STEP_LIMIT and not self._cut_is_terminal
        return at_limit or trajectory.end.by_token_limit

    def _values(self, batch: ScoredBatch, scores: Tensor) -> Tensor:
        """(K, T) V of the states that were answered, NaN in the padding."""
        return _padded(_by_trajectory(batch, scores[:, -1].cpu().double()))


def _rewards(trajectory: Trajectory, kind: str) -> list[float]:
    """Returns the reward of each response: the task's own, or R(x) at the end (``revised``)."""
    if kind == "original":
        return trajectory.original_rewards
    steps = len(trajectory.steps)
    return [0.0] * (steps - 1) + [math.exp(trajectory.log_rewards[-1])] * min(steps, 1)


def _lengths(trajectories: Sequence[Trajectory]) -> Tensor:
    return torch.tensor([len(t.steps) for t in trajectories], dtype=torch.int64)


def _by_trajectory(batch: ScoredBatch, values: Tensor) -> Sequence[Tensor]:
    return values.split([len(t.steps) for t in batch.trajectories])


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """(K, T) float64 rows of different lengths, NaN behind them."""
    if len(rows) == 0:
        return torch.zeros(0, 0, dtype=torch.float64)
    return torch.nn.utils.rnn.pad_sequence([row.double() for row in rows], batch_first=True, padding_value=math.nan)


def _normalised(advantage: Tensor, is_step: Tensor, ranks: Ranks) -> Tensor:
    """Returns the advantages less their mean, in their standard deviations, over the responses of all ranks."""
    own = torch.where(is_step, advantage, 0.0)
    count, total, squares = ranks.sum(torch.stack([is_step.sum().double(), own.sum(), own.square().sum()])).tolist()
    mean = total / max(count, 1.0)
    deviation = math.sqrt(max(squares / max(count, 1.0) - mean**2, 0.0))
    return (advantage - mean) / (deviation + 1e-8)
