"""torchgfn's trajectories as ours, and ours averaged its way. Tensors only: torchgfn is not needed here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gflowvlm.studies.proving.rollouts import Rollouts


def to_rollouts(coordinates: Tensor, actions: Tensor, terminating_index: Tensor, *, side: int) -> Rollouts:
    """Returns torchgfn's complete trajectories on a hypergrid, without their stop actions.

    Args:
        coordinates: (L+1, K, D) int64, time first; after a trajectory's end −1, the sink state.
        actions: (L, K) int64; D is the stop action.
        terminating_index: (K,) int64, n+1: when a trajectory reaches the sink state.
        side: Cells along each dimension.
    """
    longest, _, dimensions = coordinates.shape
    stride = side ** torch.arange(dimensions - 1, -1, -1)
    length = terminating_index - 1
    is_state = torch.arange(longest - 1)[:, None] <= length
    is_transition = torch.arange(longest - 2)[:, None] < length
    return Rollouts(
        state=torch.where(is_state, (coordinates[:-1] * stride).sum(dim=-1), 0).T,
        action=torch.where(is_transition, actions[:-1], 0).T,
        length=length,
        stopped=torch.ones_like(length, dtype=torch.bool),
    )


def mean_over_transitions(
    loss: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor], *, stop_is_transition: bool
) -> Tensor:
    """Returns the mean of one of our losses over all transitions of a batch.

    Ours is a mean within each trajectory, then over trajectories; torchgfn's transition-based losses weigh long
    trajectories more. Our loss of each trajectory alone, weighted with its number of transitions, is theirs.

    Args:
        loss: From a batch's tensors to a scalar.
        inputs: See `gflowvlm.studies.proving.rollouts.loss_inputs`.
        stop_is_transition: Whether the loss has a residual for the stop action.
    """
    transitions = inputs["length"] + int(stop_is_transition)
    single = [loss({name: tensor[k : k + 1] for name, tensor in inputs.items()}) for k in range(len(transitions))]
    return (torch.stack(single) * transitions).sum() / transitions.sum()


def weigh_subtrajectories(scores: list[Tensor], length: Tensor, *, subtb_lambda: float) -> Tensor:
    """Returns SubTB(λ) over the sub-trajectories between states that are not the terminal one.

    Args:
        scores: torchgfn's: at k−1 a (L−k+1, K) tensor of the residuals of k transitions, by their first state.
        length: (K,) int64, n; n+1 is the terminal state.
        subtb_lambda: λ.
    """
    longest, count = scores[0].shape
    total, norm = scores[0].new_zeros(count), scores[0].new_zeros(count)
    for k, score in enumerate(scores, start=1):
        exists = torch.arange(longest - k + 1)[:, None] + k <= length
        total = total + subtb_lambda**k * torch.where(exists, score, 0.0).square().sum(dim=0)
        norm = norm + subtb_lambda**k * exists.to(norm.dtype).sum(dim=0)
    moved = length > 0
    return (total[moved] / norm[moved]).mean()
