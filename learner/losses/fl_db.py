"""Forward-looking detailed balance (Pan et al. 2023, arXiv 2302.01687)."""

from __future__ import annotations

from torch import Tensor

from gflowvlm.learner.losses.flow import mask_flow_batch
from gflowvlm.learner.losses.output import LossOutput, penalise


def fl_db(
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
    """`flow_db` with log F = log F̃ + log R: what has been earned so far is known, only the rest is learned.

    residual_t = log F̃_t + log R_t + log P_F(t) − log F̃_{t+1} − log R_{t+1} − log P_B(t)        t < n
    residual_n = log F̃_n + log P_F(⊤ | n)                                    where the trajectory stopped

    At the terminal state log F̃ = 0. The differences of log-rewards along the way are local credit, so that
    cut-off trajectories teach too.

    Args:
        log_pf: (K, T) log P_F of the non-stop transition taken at state t; padding may hold anything.
        log_p_stop: (K, T+1) log P_F(⊤) at the states 0..n; 0 where the environment forced the stop. Only the
            stop that was taken counts.
        log_reward: (K, T+1) log R(z_{0:t}⊤), raised to β and floored, or −E(z_{0:t}) of an
            additive energy.
        length: (K,) int, n: the number of non-stop transitions.
        stopped: (K,) bool, whether the trajectory ended in ⊤, chosen or forced.
        instance: (K,) int; makes no difference here.
        log_flow: (K, T+1) log F̃_φ at the states 0..n: what is still to come beyond log R_t.
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
    # Log-rewards of −1e4 are subtracted from each other before they meet small terms (float32).
    residual = -batch.log_reward.diff(dim=1) + (batch.log_ratio - batch.log_flow.diff(dim=1))
    return penalise(residual, mask=batch.is_transition, residual_clip=residual_clip)
