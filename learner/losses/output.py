"""What every loss shares: its result, the masking of padding, and the mean over trajectories.

A loss is a *residual* (the log-space violation of a balance condition, in nats) computed in the loss's own
module, followed by the *penalty* and the averaging in `penalise`, which are the same for all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import huber_loss


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A loss and what to log about it.

    Attributes:
        loss: Scalar, differentiable in every input that requires a gradient.
        metrics: Detached scalar tensors (`float(...)` reads one). Every loss reports

            * `loss`;
            * `residual_abs_mean`, `residual_abs_max`: |residual| in nats, the mean weighted as in the loss;
            * `residual_clipped_share`: the share (same weights) of residuals beyond `residual_clip`;
            * `trajectories_used`, `trajectories_dropped`: trajectories with and without any residual.

            Means over an empty set are 0: where `trajectories_used` is 0, the others say nothing.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class MaskedBatch:
    """The tensors of a batch with 0 in all places that do not count, whatever stood there.

    Attributes:
        log_ratio: (K, T) log P_F − log P_B of the non-stop transitions.
        log_p_stop: (K, T+1) log P_F(⊤) at the visited states.
        log_reward: (K, T+1) log R at the visited states.
        length: (K,) int64, number of non-stop transitions.
        is_transition: (K, T) bool, where a transition was taken.
        is_state: (K, T+1) bool, where a state was visited.
    """

    log_ratio: Tensor
    log_p_stop: Tensor
    log_reward: Tensor
    length: Tensor
    is_transition: Tensor
    is_state: Tensor

    def log_path(self) -> Tensor:
        """(K,) Σ_{t<n} (log P_F − log P_B)(t) + log P_F(⊤) at state n: the path with its stop action."""
        return self.log_ratio.sum(dim=1) + self.at_last_state(self.log_p_stop)

    def at_last_state(self, per_state: Tensor) -> Tensor:
        """(K,) the entry of a (K, T+1) tensor at each trajectory's state n."""
        return per_state.gather(1, self.length[:, None]).squeeze(1)


def mask_batch(
    *,
    log_pf: Tensor,
    log_p_stop: Tensor,
    log_reward: Tensor,
    length: Tensor,
    stopped: Tensor,
    instance: Tensor,
    log_pb: Tensor | None = None,
    complete_only: bool,
) -> MaskedBatch:
    """Check a padded batch and blank its padding.

    Padding is replaced before any arithmetic, so that a NaN or an infinity in it reaches neither the values
    nor, as 0 · NaN, the gradients.

    Args:
        log_pf: (K, T) log P_F of the non-stop transition taken at state t.
        log_p_stop: (K, T+1) log P_F(⊤) at the states 0..n.
        log_reward: (K, T+1) log R(z_{0:t}⊤).
        length: (K,) int, n.
        stopped: (K,) bool, whether the trajectory is complete.
        instance: (K,) int, the task instance.
        log_pb: (K, T) backward policy; None for trees, where it is 0.
        complete_only: Blank cut-off trajectories as well (they count as dropped).

    Raises:
        ValueError: A shape, a dtype or a length that does not fit.
    """
    _check_batch(log_pf, log_p_stop, log_reward, length, stopped, instance, log_pb)
    length = length.long()
    state = torch.arange(log_p_stop.shape[1], device=log_pf.device)
    is_state = state <= length[:, None]
    is_transition = state[:-1] < length[:, None]
    if complete_only:
        is_state = is_state & stopped[:, None]
        is_transition = is_transition & stopped[:, None]
    log_ratio = torch.where(is_transition, log_pf, 0.0)
    if log_pb is not None:
        log_ratio = log_ratio - torch.where(is_transition, log_pb, 0.0)
    return MaskedBatch(
        log_ratio=log_ratio,
        log_p_stop=torch.where(is_state, log_p_stop, 0.0),
        log_reward=torch.where(is_state, log_reward, 0.0),
        length=length,
        is_transition=is_transition,
        is_state=is_state,
    )


def _check_batch(
    log_pf: Tensor,
    log_p_stop: Tensor,
    log_reward: Tensor,
    length: Tensor,
    stopped: Tensor,
    instance: Tensor,
    log_pb: Tensor | None,
) -> None:
    if log_pf.dim() != 2:
        raise ValueError(f"log_pf must have shape (K, T), got {tuple(log_pf.shape)}")
    K, T = log_pf.shape
    expected = [
        ("log_p_stop", log_p_stop, (K, T + 1)),
        ("log_reward", log_reward, (K, T + 1)),
        ("length", length, (K,)),
        ("stopped", stopped, (K,)),
        ("instance", instance, (K,)),
    ]
    if log_pb is not None:
        expected.append(("log_pb", log_pb, (K, T)))
    for name, tensor, shape in expected:
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape} next to log_pf {(K, T)}, got {[*tensor.shape]}")
    for name, tensor in (("log_pf", log_pf), ("log_p_stop", log_p_stop), ("log_reward", log_reward)):
        # Sums of token log-probabilities in half precision are off by whole nats.
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 or float64, got {tensor.dtype}")
    if stopped.dtype != torch.bool:
        raise ValueError(f"stopped must be bool, got {stopped.dtype}")
    if length.is_floating_point() or bool(((length < 0) | (length > T)).any()):
        raise ValueError(f"length must hold whole numbers in 0..{T}, got {length.tolist()}")


def penalise(
    residual: Tensor, *, mask: Tensor, residual_clip: float | None, weight: Tensor | None = None
) -> LossOutput:
    """Turn residuals into the loss: penalty, weighted mean within a trajectory, mean over trajectories.

    The penalty is r² for |r| ≤ c and 2c|r| − c² beyond (Huber's, twice its usual scale), c = `residual_clip`;
    it is continuously differentiable, and its slope is at most 2c. Clamping r itself would cut the gradient
    off exactly where the violation is largest. With None the penalty is r² everywhere.

    Args:
        residual: (K, N) in nats.
        mask: (K, N) bool, the residuals that exist. A row without any is left out of the mean.
        residual_clip: c > 0 in nats, or None.
        weight: (K, N) relative weights, with a positive one in each row that has residuals; None: all alike.

    Raises:
        ValueError: `residual_clip` is not positive.
    """
    if residual_clip is not None and not residual_clip > 0:
        raise ValueError(f"residual_clip must be positive or None, got {residual_clip}")
    clip = math.inf if residual_clip is None else residual_clip
    residual = torch.where(mask, residual, 0.0)
    if math.isinf(clip):
        penalty = residual.square()
    else:
        penalty = 2 * huber_loss(residual, torch.zeros_like(residual), reduction="none", delta=clip)

    weight = mask.to(residual.dtype) if weight is None else torch.where(mask, weight, 0.0)
    has_residual = mask.any(dim=1)
    weight = weight / torch.where(has_residual, weight.sum(dim=1), 1.0)[:, None]
    used = has_residual.sum()

    def mean(per_residual: Tensor) -> Tensor:
        return (weight * per_residual).sum() / used.clamp(min=1)

    loss = mean(penalty)
    size = residual.detach().abs()
    metrics = {
        "loss": loss.detach(),
        "residual_abs_mean": mean(size),
        # The extra 0 stands in where there is no residual at all (T = 0).
        "residual_abs_max": torch.cat([size.flatten(), size.new_zeros(1)]).max(),
        "residual_clipped_share": mean((size > clip).to(size.dtype)),
        "trajectories_used": used,
        "trajectories_dropped": mask.shape[0] - used,
    }
    return LossOutput(loss, metrics)
