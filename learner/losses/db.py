"""Detailed balance for a policy that may stop anywhere (GFlowVLM; Hu et al. 2024, arXiv 2310.04363)."""

from __future__ import annotations

from torch import Tensor

from gflowvlm.learner.losses.output import LossOutput, mask_batch, penalise


def db(
    *,
    log_pf: Tensor,
    log_p_stop: Tensor,
    log_reward: Tensor,
    length: Tensor,
    stopped: Tensor,
    instance: Tensor,
    log_pb: Tensor | None = None,
    residual_clip: float | None = None,
) -> LossOutput:
    """Squared violation of F(t) · P_F(t→t+1) = F(t+1) · P_B, F(t) = R_t / P_F(⊤ | t), one residual a step.

    residual_t = log R_t + log P_F(t) + log P_F(⊤ | t+1) − log R_{t+1} − log P_F(⊤ | t) − log P_B(t)

    Needs no terminal state: cut-off trajectories contribute the transitions they have. A trajectory that
    stopped at once has no transition and is not counted.

    Args:
        log_pf: (K, T) log P_F of the non-stop transition taken at state t; padding may hold anything.
        log_p_stop: (K, T+1) log P_F(⊤) at the states 0..n; 0 where the environment forced the stop.
        log_reward: (K, T+1) log R(z_{0:t}⊤), raised to β and floored.
        length: (K,) int, n: the number of non-stop transitions.
        stopped: (K,) bool; makes no difference here.
        instance: (K,) int; makes no difference here.
        log_pb: (K, T) log P_B of the same transitions; None where the state graph is a tree.
        residual_clip: Where the penalty turns from quadratic to linear, in nats (see `output.penalise`).

    Returns:
        The loss and the common metrics.

    Raises:
        ValueError: Inputs that do not fit together.
    """
    batch = mask_batch(
        log_pf=log_pf,
        log_p_stop=log_p_stop,
        log_reward=log_reward,
        length=length,
        stopped=stopped,
        instance=instance,
        log_pb=log_pb,
        complete_only=False,
    )
    # Large terms of the same kind are subtracted before they meet small ones (float32, log-rewards of −1e4).
    residual = -batch.log_reward.diff(dim=1) + (batch.log_ratio + batch.log_p_stop.diff(dim=1))
    mask = batch.is_transition
    return penalise(residual, mask=mask, residual_clip=residual_clip)
