"""What the losses with a learned state flow share: the terminal state as a state of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gflowvlm.learner.losses.output import MaskedBatch, mask_batch


@dataclass(frozen=True, slots=True)
class FlowBatch:
    """A batch in which a trajectory that stopped goes on to its terminal state x, number n+1.

    Attributes:
        log_ratio: (K, T+1) log P_F − log P_B of the transitions 0..n−1, and log P_F(⊤ | n) at n where it was taken.
        log_flow: (K, T+2) the learned log F (or log F̃) at the states 0..n, 0 elsewhere.
        log_reward: (K, T+2) log R at the states 0..n, and log R_n at n+1 where the trajectory stopped.
        length: (K,) int64, number of transitions with the stop action: n+1, or n when cut off.
        is_terminal: (K, T+2) bool, where x stands.
        is_transition: (K, T+1) bool, where a transition was taken.
        is_state: (K, T+2) bool, where a state was visited, x included.
    """

    log_ratio: Tensor
    log_flow: Tensor
    log_reward: Tensor
    length: Tensor
    is_terminal: Tensor
    is_transition: Tensor
    is_state: Tensor


def mask_flow_batch(
    *,
    log_pf: Tensor,
    log_p_stop: Tensor,
    log_reward: Tensor,
    length: Tensor,
    stopped: Tensor,
    instance: Tensor,
    log_flow: Tensor,
    log_pb: Tensor | None,
) -> FlowBatch:
    """Check a padded batch, blank its padding and append the terminal states.

    Args:
        log_pf: (K, T) log P_F of the non-stop transition taken at state t.
        log_p_stop: (K, T+1) log P_F(⊤) at the states 0..n; only the one that was taken counts.
        log_reward: (K, T+1) log R(z_{0:t}⊤).
        length: (K,) int, n.
        stopped: (K,) bool, whether the trajectory ended in ⊤.
        instance: (K,) int, the task instance.
        log_flow: (K, T+1) the learned log flow at the states 0..n.
        log_pb: (K, T) backward policy; None for trees, where it is 0.

    Raises:
        ValueError: A shape, a dtype or a length that does not fit.
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
    if log_flow.shape != log_reward.shape:
        raise ValueError(f"log_flow must have shape {tuple(log_reward.shape)}, got {tuple(log_flow.shape)}")
    return _with_terminal(batch, torch.where(batch.is_state, log_flow, 0.0), stopped)


def _with_terminal(batch: MaskedBatch, log_flow: Tensor, stopped: Tensor) -> FlowBatch:
    state = torch.arange(batch.log_reward.shape[1] + 1, device=batch.log_reward.device)
    is_terminal = (state == batch.length[:, None] + 1) & stopped[:, None]
    is_stop = is_terminal[:, 1:]
    last_log_reward = batch.at_last_state(batch.log_reward)[:, None]
    return FlowBatch(
        log_ratio=torch.where(is_stop, batch.log_p_stop, pad(batch.log_ratio, (0, 1))),
        log_flow=pad(log_flow, (0, 1)),
        log_reward=torch.where(is_terminal, last_log_reward, pad(batch.log_reward, (0, 1))),
        length=batch.length + stopped,
        is_terminal=is_terminal,
        is_transition=pad(batch.is_transition, (0, 1)) | is_stop,
        is_state=pad(batch.is_state, (0, 1)) | is_terminal,
    )
