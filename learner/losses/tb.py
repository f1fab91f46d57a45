"""Trajectory balance (Malkin et al. 2022, arXiv 2201.13259; GFlowVLM, arXiv 2503.06514)."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowvlm.learner.losses.output import LossOutput, mask_batch, penalise


def tb(
    *,
    log_pf: Tensor,
    log_p_stop: Tensor,
    log_reward: Tensor,
    length: Tensor,
    stopped: Tensor,
    instance: Tensor,
    log_z: Tensor,
    log_pb: Tensor | None = None,
    residual_clip: float | None = None,
) -> LossOutput:
    """Squared violation of Z(g) · Π P_F · P_F(⊤) = R(x) · Π P_B, one residual a complete trajectory.

    residual = log Z(g) + Σ_{t<n} log P_F(t) + log P_F(⊤ | n) − log R_n − Σ_{t<n} log P_B(t)

    A cut-off trajectory (`stopped` False) has no terminal state and is dropped. To count the cut as a forced
    stop instead, pass it with `stopped` True and `log_p_stop` 0 at state n.

    Args:
        log_pf: (K, T) log P_F of the non-stop transition taken at state t; padding may hold anything.
        log_p_stop: (K, T+1) log P_F(⊤) at the states 0..n; 0 where the environment forced the stop.
        log_reward: (K, T+1) log R(z_{0:t}⊤), raised to β and floored.
        length: (K,) int, n: the number of non-stop transitions.
        stopped: (K,) bool, whether the trajectory ended in ⊤, chosen or forced.
        instance: (K,) int, the task instance g.
        log_z: (K,) log Z_φ(g) of each trajectory's instance.
        log_pb: (K, T) log P_B of the same transitions; None where the state graph is a tree.
        residual_clip: Where the penalty turns from quadratic to linear, in nats (see `output.penalise`).

    Returns:
        The loss; besides the common metrics, `log_z`: the mean of `log_z` over the trajectories used.

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
        complete_only=True,
    )
    if log_z.shape != stopped.shape:
        raise ValueError(f"log_z must have shape {tuple(stopped.shape)}, got {tuple(log_z.shape)}")
    log_z = torch.where(stopped, log_z, 0.0)
    # log Z and log R are the large terms and close to each other: their difference comes first.
    residual = (log_z - batch.at_last_state(batch.log_reward)) + batch.log_path()
    output = penalise(residual[:, None], mask=stopped[:, None], residual_clip=residual_clip)
    output.metrics["log_z"] = log_z.detach().sum() / stopped.sum().clamp(min=1)
    return output
