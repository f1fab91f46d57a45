"""How much better an action was than expected: with a learned value (PPO), or against its group (GRPO)."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-9
"""Share of a group's mean absolute reward up to which a spread of its rewards is none."""


def generalised_advantages(
    *, reward: Tensor, value: Tensor, length: Tensor, last_value: Tensor, discount: float, gae_lambda: float
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    δ_t = r_t + γ V(s_{t+1}) − V(s_t)
    A_t = δ_t + γλ A_{t+1}

    Args:
        reward: (K, T) reward of each response; padding may hold anything.
        value: (K, T) V(s_t), before each response; padding may hold anything.
        length: (K,) int, number of responses.
        last_value: (K,) V after the last response: 0 where the episode ended, V of the state where it was cut.
        discount: γ in [0, 1].
        gae_lambda: λ in [0, 1].

    Returns:
        (K, T) advantages, 0 in the padding, without gradient. Advantage + value is the return V is fitted to.
    """
    step = torch.arange(reward.shape[1], device=reward.device)
    is_step = step < length[:, None]
    reward, value = (torch.where(is_step, x.detach(), 0.0) for x in (reward, value))
    advantage = torch.zeros_like(reward)
    later_value, later_advantage = torch.zeros_like(last_value), torch.zeros_like(last_value)
    for t in reversed(range(reward.shape[1])):
        is_last = length == t + 1
        later_value = torch.where(is_last, last_value.detach(), later_value)
        later_advantage = torch.where(is_last, 0.0, later_advantage)
        difference = reward[:, t] + discount * later_value - value[:, t]
        advantage[:, t] = torch.where(is_step[:, t], difference + discount * gae_lambda * later_advantage, 0.0)
        later_value, later_advantage = value[:, t], advantage[:, t]
    return advantage


def group_advantages(total_reward: Tensor, instance: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """GRPO's advantage: a trajectory's total reward against its group's mean, in the group's standard deviations.

    A_k = (G_k − mean_group G) / (sd_group G + ε)      (Shao et al. 2024, arXiv 2402.03300, sec. 4.1.2)

    Args:
        total_reward: (K,) sum of each trajectory's rewards.
        instance: (K,) int, the task instance: the groups.
        epsilon: What keeps a group without any spread finite; its advantages are 0.

    Returns:
        (K,) advantages; exactly 0 in a group of one, and where rewards differ by no more than rounding.
    """
    together = (instance[:, None] == instance).to(total_reward.dtype)
    size = together.sum(dim=1)
    centred = total_reward - together @ total_reward / size
    # The population's deviation: that of a group of one is 0 and not undefined.
    spread = (together @ centred.square() / size).sqrt()
    # AdamW would make a whole step of what rounding leaves.
    size_of_rewards = together @ total_reward.abs() / size
    return torch.where(spread > ROUNDING * size_of_rewards, centred / (spread + epsilon), 0.0)
