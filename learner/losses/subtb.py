"""Sub-trajectory balance SubTB(λ) (Madan et al. 2023, arXiv 2209.12782; GFlowVLM, arXiv 2503.06514)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from gflowvlm.learner.losses.output import LossOutput, mask_batch, penalise


def subtb(
    *,
    log_pf: Tensor,
    log_p_stop: Tensor,
    log_reward: Tensor,
    length: Tensor,
    stopped: Tensor,
    instance: Tensor,
    log_pb: Tensor | None = None,
    subtb_lambda: float = 0.9,
    residual_clip: float | None = None,
) -> LossOutput:
    """Squared violation of balance along every sub-trajectory i..j, with F(t) = R_t / P_F(⊤ | t).

    residual_ij = log R_i + Σ_{i≤t<j} (log P_F − log P_B)(t) + log P_F(⊤ | j) − log R_j − log P_F(⊤ | i)

    for all 0 ≤ i < j ≤ n, weighted λ^(j−i) and normalised within the trajectory. (GFlowVLM prints R_i in both
    places; balance needs R_j in the denominator.) λ → 0 is detailed balance, λ = 1 weighs all pairs alike,
    λ → ∞ keeps the whole trajectory alone: trajectory balance with log Z = log R_0 − log P_F(⊤ | 0).

    Needs no terminal state: cut-off trajectories contribute the pairs they have. A trajectory that stopped at
    once has no pair and is not counted. Memory is a few (K, T+1, T+1) tensors.

    Args:
        log_pf: (K, T) log P_F of the non-stop transition taken at state t; padding may hold anything.
        log_p_stop: (K, T+1) log P_F(⊤) at the states 0..n; 0 where the environment forced the stop.
        log_reward: (K, T+1) log R(z_{0:t}⊤), raised to β and floored.
        length: (K,) int, n: the number of non-stop transitions.
        stopped: (K,) bool; makes no difference here.
        instance: (K,) int; makes no difference here.
        log_pb: (K, T) log P_B of the same transitions; None where the state graph is a tree.
        subtb_lambda: λ in (0, ∞).
        residual_clip: Where the penalty turns from quadratic to linear, in nats (see `output.penalise`).

    Returns:
        The loss and the common metrics.

    Raises:
        ValueError: Inputs that do not fit together, or λ out of its range.
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
    # One potential per state would be cheaper, but rounding log R + Σ log P_F at −1e4 costs 1e-3 nats in
    # float32; differences of like with like keep the small terms whole.
    residual = log_path_between(batch.log_ratio) + later_minus_earlier(batch.log_p_stop)
    residual = residual - later_minus_earlier(batch.log_reward)
    return penalise_pairs(
        residual, is_state=batch.is_state, length=batch.length, subtb_lambda=subtb_lambda, residual_clip=residual_clip
    )


def penalise_pairs(
    residual: Tensor, *, is_state: Tensor, length: Tensor, subtb_lambda: float, residual_clip: float | None
) -> LossOutput:
    """Turn the residuals of all pairs of states into the loss, weighted λ^(j−i).

    Args:
        residual: (K, S, S) at (i, j), in nats; only i < j among visited states counts.
        is_state: (K, S) bool, where a state was visited.
        length: (K,) int, number of transitions between the visited states.
        subtb_lambda: λ in (0, ∞).
        residual_clip: See `output.penalise`.

    Raises:
        ValueError: λ or the clip is out of its range.
    """
    mask = (is_state[:, :, None] & is_state[:, None, :]).triu(diagonal=1)
    weight = subtrajectory_weights(length, num_states=mask.shape[1], subtb_lambda=subtb_lambda, dtype=residual.dtype)
    return penalise(
        residual.flatten(start_dim=1),
        mask=mask.flatten(start_dim=1),
        weight=weight.flatten(start_dim=1),
        residual_clip=residual_clip,
    )


def log_path_between(log_ratio: Tensor) -> Tensor:
    """(K, S, S) with Σ_{i≤t<j} log_ratio[t] at (i, j), of (K, S−1) log-ratios of transitions."""
    return later_minus_earlier(pad(log_ratio.cumsum(dim=1), (1, 0)))


def later_minus_earlier(per_state: Tensor) -> Tensor:
    """(K, S, S) with per_state[j] − per_state[i] at (i, j)."""
    return per_state[:, None, :] - per_state[:, :, None]


def subtrajectory_weights(length: Tensor, *, num_states: int, subtb_lambda: float, dtype: torch.dtype) -> Tensor:
    """Relative weights λ^(j−i) of the pairs i < j ≤ n of each trajectory, the heaviest of them 1.

    The scale is each trajectory's own, so that an extreme λ neither makes the largest weight overflow nor
    all of them underflow.

    Args:
        length: (K,) int, n.
        num_states: S, the number of state columns.
        subtb_lambda: λ in (0, ∞).
        dtype: Of the result.

    Returns:
        (K, S, S); what stands outside i < j ≤ n means nothing.

    Raises:
        ValueError: λ is not positive and finite.
    """
    if not (subtb_lambda > 0 and math.isfinite(subtb_lambda)):
        raise ValueError(f"subtb_lambda must be positive and finite, got {subtb_lambda}")
    state = torch.arange(num_states, device=length.device)
    heaviest = torch.ones_like(length) if subtb_lambda <= 1 else length
    exponent = (state - state[:, None]) - heaviest[:, None, None]
    return (exponent.to(dtype) * math.log(subtb_lambda)).exp()
