"""Small policies on a state graph: any number of states in one forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gflowvlm.studies.proving.state_graph import StateGraph


@dataclass(frozen=True, slots=True)
class PolicyTable:
    """What a policy says of N states; N is S where it was asked for all of them.

    Attributes:
        log_pf: (N, A+1) log P_F, the stop action last; −inf where not allowed.
        log_pb: (N, A) log P_B of the action that led into the state.
        log_flow: (N,) the learned log state flow.
    """

    log_pf: Tensor
    log_pb: Tensor
    log_flow: Tensor


class Policy(nn.Module):
    """A multilayer perceptron on the graph's features with heads for P_F, log F and, on demand, P_B; and log Z.

    Args:
        graph: The state graph.
        hidden: Width of the two hidden layers.
        learned_backward: Whether P_B is learned; otherwise it is uniform.
        seed: Of the initial weights.
    """

    def __init__(self, graph: StateGraph, *, hidden: int, learned_backward: bool, seed: int) -> None:
        super().__init__()
        self._actions = graph.num_actions
        self._features = graph.features
        self._not_allowed = torch.where(graph.allowed_or_stop, 0.0, -math.inf)
        self._log_pb: Tensor | None = None if learned_backward else graph.uniform_log_pb().float()
        # The start has no parent; all-−inf logits would be NaN.
        has_parent = graph.arrived_by.any(dim=1, keepdim=True)
        self._no_arrival = torch.where(graph.arrived_by | ~has_parent, 0.0, -math.inf)
        outputs = graph.num_actions + 2 + (graph.num_actions if learned_backward else 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(graph.features.shape[1], hidden),
                nn.LeakyReLU(),
                nn.Linear(hidden, hidden),
                nn.LeakyReLU(),
                nn.Linear(hidden, outputs),
            )
        self.log_z = nn.Parameter(torch.zeros(()))

    def forward(self, states: Tensor | None = None) -> PolicyTable:
        """Returns the policy at these states: (N,) int64; None: at all of them, in their order."""

        def rows(table: Tensor) -> Tensor:
            return table if states is None else table[states]

        outputs = self.layers(rows(self._features))
        actions = self._actions
        if self._log_pb is not None:
            log_pb = rows(self._log_pb)
        else:
            log_pb = (outputs[:, actions + 2 :] + rows(self._no_arrival)).log_softmax(dim=1)
        return PolicyTable(
            log_pf=(outputs[:, : actions + 1] + rows(self._not_allowed)).log_softmax(dim=1),
            log_pb=log_pb,
            log_flow=outputs[:, actions + 1],
        )


def imitate(policy: Policy, probabilities: Tensor, *, steps: int = 300, learning_rate: float = 1e-2) -> None:
    """Trains a policy, by cross-entropy over all states alike, to act with given probabilities.

    Args:
        policy: Changed in place.
        probabilities: (S, A+1), the stop action's last; 0 where an action is not allowed.
        steps: Steps of Adam.
        learning_rate: Of Adam.
    """
    optimizer = torch.optim.Adam(policy.layers.parameters(), lr=learning_rate, fused=True)
    for _ in range(steps):
        log_pf = policy().log_pf
        loss = -(probabilities * torch.where(probabilities > 0, log_pf, 0.0)).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
