"""The baselines' losses: SFT, PPO as in RL4VLM, GRPO. Pure functions of padded tensors, as the GFlowNet losses are."""

from gflowvlm.learner.baselines.advantages import generalised_advantages, group_advantages
from gflowvlm.learner.baselines.clipped import clipped_policy_loss, value_loss
from gflowvlm.learner.baselines.cross_entropy import cross_entropy

__all__ = ["clipped_policy_loss", "cross_entropy", "generalised_advantages", "group_advantages", "value_loss"]
