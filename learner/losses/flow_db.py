"""Detailed balance with a learned state flow (Bengio et al. 2023, arXiv 2111.09266; GFlowVLM's notation)."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowvlm.learner.losses.flow import mask_flow_batch
from gflowvlm.learner.losses.output import LossOutput, penalise


def flow_db(
    *,
    log_pf: Tensor,
    log_p_stop: Tensor,
    log_reward: Tensor,
    length: Tensor,
    stopped: Tensor,
    instance: Tensor,
    log_flow: Tensor,
    log_pb: Tensor | None = None,
    residual_clip: float | None = None,
) -> LossOutput:
    """Squared violation of F(t) · P_F(t→t+1) = F(t+1) · P_B with a learned F, one residual a transition.

    residual_t = log F_t + log P_F(t) − log F_{t+1} − log P_B(t)        t < n
    residual_n = log F_n + log P_F(⊤ | n) − log R_n                     where the trajectory stopped

    The stop action is a transition to the terminal state x, whose flow is its reward. A cut-off trajectory
    contributes the transitions it has; one cut off before any is not counted.

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
        residual_clip: Where the penalty turns from quadratic to linear, in nats (see `output.penalise`).

    Returns:
        The loss and the common metrics.

    Raises:
        ValueError: Inputs that do not fit together.
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
    residual = batch.log_ratio - log_flow.diff(dim=1)
    return penalise(residual, mask=batch.is_transition, residual_clip=residual_clip)
