"""Sampling trajectories on a state graph, all at once, and turning them into the losses' tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gflowvlm.studies.proving.policy import PolicyTable
from gflowvlm.studies.proving.state_graph import StateGraph


@dataclass(frozen=True, slots=True)
class Rollouts:
    """K trajectories of at most T actions besides the stop action.

    Attributes:
        state: (K, T+1) int64, the states 0..n; 0 in the padding.
        action: (K, T) int64; 0 in the padding.
        length: (K,) int64, n.
        stopped: (K,) bool, False where the trajectory was cut off.
    """

    state: Tensor
    action: Tensor
    length: Tensor
    stopped: Tensor


class Sampler:
    """Draws trajectories from tables of probabilities.

    Args:
        graph: The state graph.
        generator: Source of all randomness.
    """

    def __init__(self, graph: StateGraph, generator: torch.Generator) -> None:
        self._longest, self._num_states, self._actions = graph.longest, graph.num_states, graph.num_actions
        self._generator = generator
        # Stopping leads to one more state, which nothing leaves: no step needs to know who has stopped.
        ended = torch.full((graph.num_states, 1), graph.num_states)
        child = torch.cat([graph.child, ended], dim=1)
        self._child = torch.cat([child, torch.full((1, graph.num_actions + 1), graph.num_states)]).flatten()
        allowed = graph.allowed_or_stop.float()
        self._uniform = allowed / allowed.sum(dim=1, keepdim=True)

    def sample(self, log_policy: Tensor, count: int, *, exploration: float = 0.0) -> Rollouts:
        """Returns complete trajectories.

        Args:
            log_policy: (S, A+1), −inf where not allowed.
            count: K.
            exploration: Share of actions drawn uniformly from the allowed ones.
        """
        policy = torch.lerp(log_policy.detach().exp(), self._uniform.to(log_policy.dtype), exploration)
        # Without the stop column: whatever rounding leaves of 1 is the stop action's, which is always allowed.
        cumulative = torch.cat([policy[:, :-1].cumsum(dim=1), policy.new_ones(1, self._actions)])
        draw = torch.rand(self._longest + 1, count, 1, generator=self._generator).unbind()
        state = torch.zeros(count, dtype=torch.int64)
        states, actions = [], []
        for t in range(self._longest + 1):
            action = (draw[t] >= cumulative.index_select(0, state)).sum(dim=1)
            states.append(state)
            actions.append(action)
            state = self._child.index_select(0, torch.add(action, state, alpha=self._actions + 1))
        visited = torch.stack(states, dim=1)
        alive = visited < self._num_states
        length = alive.sum(dim=1) - 1
        longest = int(length.max())
        return Rollouts(
            state=torch.where(alive, visited, 0)[:, : longest + 1],
            action=torch.where(alive[:, 1:], torch.stack(actions[:-1], dim=1), 0)[:, :longest],
            length=length,
            stopped=torch.ones(count, dtype=torch.bool),
        )

    def cut_off(self, rollouts: Rollouts, share: float) -> Rollouts:
        """Returns the same trajectories, each cut off with probability `share` after 1..n of its n transitions.

        What is cut off never shows its stop action.
        """
        is_cut, where = torch.rand(2, *rollouts.length.shape, generator=self._generator)
        cut = is_cut < share
        kept = (1 + (where * rollouts.length).long()).minimum(rollouts.length)
        return replace(rollouts, length=torch.where(cut, kept, rollouts.length), stopped=rollouts.stopped & ~cut)


def loss_inputs(table: PolicyTable, row: Tensor, log_reward: Tensor, rollouts: Rollouts) -> dict[str, Tensor]:
    """Returns what every loss takes, and `log_flow`, of one batch.

    Args:
        table: The policy at the visited states, at least.
        row: (K, T+1) int64, where in the table each visited state stands.
        log_reward: (S,) the graph's, in the dtype of the table.
        rollouts: The batch.
    """
    columns = table.log_pf.shape[1]
    first = row * columns
    return {
        "log_pf": table.log_pf.take(first[:, :-1] + rollouts.action),
        "log_p_stop": table.log_pf.take(first + (columns - 1)),
        "log_reward": log_reward[rollouts.state],
        "length": rollouts.length,
        "stopped": rollouts.stopped,
        "instance": torch.zeros_like(rollouts.length),
        "log_pb": table.log_pb.take(row[:, 1:] * (columns - 1) + rollouts.action),
        "log_flow": table.log_flow.take(row),
    }
