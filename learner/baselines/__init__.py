"""The baselines' losses: SFT, PPO as in RL4VLM, and GRPO. Pure functions of padded tensors, as `learner.losses` are."""

from learner.baselines.advantages import generalised_advantages, group_advantages
from learner.baselines.clipped import clipped_policy_loss, value_loss
from learner.baselines.cross_entropy import cross_entropy

__all__ = ["clipped_policy_loss", "cross_entropy", "generalised_advantages", "group_advantages", "value_loss"]
