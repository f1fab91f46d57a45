"""Sub-trajectory balance SubTB(λ) with a learned state flow (Madan et al. 2023, arXiv 2209.12782)."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowvlm.learner.losses.flow import mask_flow_batch
from gflowvlm.learner.losses.output import LossOutput
from gflowvlm.learner.losses.subtb import later_minus_earlier, log_path_between, penalise_pairs


def flow_subtb(
    *,
    log_pf: Tensor,
    log_p_stop: Tensor,
    log_reward: Tensor,
    length: Tensor,
    stopped: Tensor,
    instance: Tensor,
    log_flow: Tensor,
    log_pb: Tensor | None = None,
    subtb_lambda: float = 0.9,
    residual_clip: float | None = None,
) -> LossOutput:
    """Squared violation of balance along every sub-trajectory i..j, with a learned F.

    residual_ij = log F_i + Σ_{i≤t<j} (log P_F − log P_B)(t) − log F_j

    for all 0 ≤ i < j ≤ n, and j = n+1 where the trajectory stopped: the stop action is a transition to the
    terminal state, whose flow is its reward. Weighted λ^(j−i) and normalised within the trajectory.

    Args:
        log_pf: (K, T) log P_F of the non-stop transition taken at state t; padding may hold anything.
        log_p_stop: (K, T+1) log P_F(⊤) at the states 0..n; 0 where the environment forced the stop. Only the
            stop that was taken counts.
        log_reward: (K, T+1) log R(z_{0:t}⊤), raised to β and floored.
        length: (K,) int, n: the number of non-stop transitions.
        stopped: (K,) bool, whether the trajectory ended in ⊤, chosen or forced.
        instance: (K,) int; makes no difference here.
        log_flow: (K, T+1) log F_φ at the states 0..n.
        log_pb: (K, T) log P_B of the same transitions; None where the state graph is a tree.
        subtb_lambda: λ in (0, ∞).
        residual_clip: Where the penalty turns from quadratic to linear, in nats (see `output.penalise`).

    Returns:
        The loss and the common metrics.

    Raises:
        ValueError: Inputs that do not fit together, or λ out of its range.
    """
    batch = mask_flow_batch(
        log_pf=log_pf,
        log_p_stop=log_p_stop,
        log_reward=log_reward,
        length=length,
        stopped=stopped,
        instance=instance,
        log_flow=log_flow,
        log_pb=log_pb,
    )
    log_flow = torch.where(batch.is_terminal, batch.log_reward, batch.log_flow)
    residual = log_path_between(batch.log_ratio) - later_minus_earlier(log_flow)
    return penalise_pairs(
        residual, is_state=batch.is_state, length=batch.length, subtb_lambda=subtb_lambda, residual_clip=residual_clip
    )
