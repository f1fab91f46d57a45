"""Variance trajectory balance: no learned Z (Zhang et al. 2023; GFlowVLM, arXiv 2503.06514)."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowvlm.learner.losses.output import LossOutput, mask_batch, penalise


def var_tb(
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
    """Variance of ζ within each task instance, one residual a complete trajectory.

    ζ_i = Σ_{t<n} log P_F(t) + log P_F(⊤ | n) − log R_n − Σ_{t<n} log P_B(t)
    residual_i = ζ_i − mean of ζ over the complete trajectories of the same instance

    At the optimum ζ_i = −log Z(g), which depends on the instance: ζ is never averaged across instances. A
    complete trajectory without a companion carries no signal; it is dropped and reported. Cut-off ones
    (`stopped` False) are dropped too. To count the cut as a forced stop instead, pass `stopped` True and
    `log_p_stop` 0 at state n.

    The group mean is part of the graph. For the squared penalty its gradient vanishes (a group's residuals
    add to 0); with `residual_clip` it does not, and a detached mean would give the gradient of no function.

    Args:
        log_pf: (K, T) log P_F of the non-stop transition taken at state t; padding may hold anything.
        log_p_stop: (K, T+1) log P_F(⊤) at the states 0..n; 0 where the environment forced the stop.
        log_reward: (K, T+1) log R(z_{0:t}⊤), raised to β and floored.
        length: (K,) int, n: the number of non-stop transitions.
        stopped: (K,) bool, whether the trajectory ended in ⊤, chosen or forced.
        instance: (K,) int, the task instance g: the groups.
        log_pb: (K, T) log P_B of the same transitions; None where the state graph is a tree.
        residual_clip: Where the penalty turns from quadratic to linear, in nats (see `output.penalise`).

    Returns:
        The loss; besides the common metrics, `groups`: instances with at least two complete trajectories;
        `groups_of_one`: instances with exactly one; `log_z`: the mean of −ζ over the trajectories used, an
        estimate of the mean log Z(g) that is exact at the optimum.

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
    log_path = batch.log_path()
    last_log_reward = batch.at_last_state(batch.log_reward)

    together = (instance[:, None] == instance) & stopped[:, None] & stopped
    group_size = together.sum(dim=1)
    # ζ_i − mean ζ as the mean of ζ_i − ζ_j, log-rewards first: a floor of −1e4 common to a group cancels
    # exactly instead of costing every ζ four decimals in float32.
    difference = _pairwise(log_path) - _pairwise(last_log_reward)
    residual = torch.where(together, difference, 0.0).sum(dim=1) / group_size.clamp(min=1)

    used = group_size > 1
    output = penalise(residual[:, None], mask=used[:, None], residual_clip=residual_clip)
    is_first_of_group = used & ~(together.tril(diagonal=-1).any(dim=1))
    log_z = torch.where(used, last_log_reward - log_path, 0.0).detach()
    output.metrics["groups"] = is_first_of_group.sum()
    output.metrics["groups_of_one"] = (group_size == 1).sum()
    output.metrics["log_z"] = log_z.sum() / used.sum().clamp(min=1)
    return output


def _pairwise(values: Tensor) -> Tensor:
    """(K, K) values_i − values_j."""
    return values[:, None] - values
