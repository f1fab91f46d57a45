"""The clipped surrogate of PPO and GRPO, and the loss of PPO's value."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowvlm.learner.losses.output import LossOutput


def clipped_policy_loss(
    *, log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, is_step: Tensor, clip: float
) -> LossOutput:
    """PPO's clipped surrogate, one ratio a response (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    ratio = exp(log π − log π_old),    loss = −mean min(ratio · A, clip(ratio, 1−c, 1+c) · A)

    with log π = log P_Act + cot_weight · log P_CoT, the probability of a whole response (RL4VLM,
    arXiv 2405.10292, eq. 4).

    Args:
        log_prob: (K, T) under the learner's policy; padding may hold anything.
        old_log_prob: (K, T) under the policy that sampled.
        advantage: (K, T).
        is_step: (K, T) bool, where a response is.
        clip: c > 0.

    Returns:
        The loss, and `policy_loss`, `ratio_mean`, `ratio_clipped_share` and `approximate_kl` (nats:
        mean of ratio − 1 − log ratio), means over responses; 0 where there is none.

    Raises:
        ValueError: `clip` is not positive.
    """
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    log_ratio = torch.where(is_step, log_prob, 0.0) - torch.where(is_step, old_log_prob, 0.0)
    advantage = torch.where(is_step, advantage, 0.0)
    ratio = log_ratio.exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    count = is_step.sum().clamp(min=1)
    loss = -gain.sum() / count
    ratio, log_ratio = ratio.detach(), log_ratio.detach()

    def mean(value: Tensor) -> Tensor:
        return torch.where(is_step, value, 0.0).sum() / count

    metrics = {
        "policy_loss": loss.detach(),
        "ratio_mean": mean(ratio),
        "ratio_clipped_share": mean(((ratio - 1).abs() > clip).to(ratio.dtype)),
        "approximate_kl": mean(ratio - 1 - log_ratio),
    }
    return LossOutput(loss, metrics)


def value_loss(*, value: Tensor, returns: Tensor, is_step: Tensor) -> LossOutput:
    """Half the mean squared error of the value.

    Args:
        value: (K, T) V(s_t); padding may hold anything.
        returns: (K, T) what it is fitted to.
        is_step: (K, T) bool, where a response is.

    Returns:
        The loss, and `value_loss`, `value_mean` and `return_mean`, means over responses; 0 where there is none.
    """
    error = torch.where(is_step, value, 0.0) - torch.where(is_step, returns.detach(), 0.0)
    count = is_step.sum().clamp(min=1)
    loss = 0.5 * error.square().sum() / count
    return_mean = torch.where(is_step, returns.detach(), 0.0).sum() / count
    value_mean = torch.where(is_step, value.detach(), 0.0).sum() / count
    return LossOutput(loss, {"value_loss": loss.detach(), "value_mean": value_mean, "return_mean": return_mean})
