"""State graphs small enough to write down, and what is exactly true of a policy on them.

A policy is a table (S, A+1) of log-probabilities; its last column is the stop action. Everything here is computed
by dynamic programming in float64, nothing is sampled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class StateGraph:
    """An acyclic graph of S states with A actions besides "stop", which every state allows. State 0 is the start.

    Attributes:
        features: (S, F) float32, what a policy sees of a state.
        child: (S, A) int64, the state an action leads to; the state itself where the action is not allowed.
        allowed: (S, A) bool.
        arrived_by: (S, A) bool, whether an action leads into the state. One action, one parent; a state with a
            single one has P_B = 1, so that a tree needs nothing of its own.
        log_reward: (S,) float64, log R of stopping there.
        outcome: (S,) int64, which outcome stopping there is; several states may share one.
        is_mode: (O,) bool, the outcomes that count as modes.
        longest: The most actions before stopping.
        start_policy: (S, A+1) probabilities, the stop action's last, that a policy is made to have before it is
            trained; None: it starts with random weights.
    """

    features: Tensor
    child: Tensor
    allowed: Tensor
    arrived_by: Tensor
    log_reward: Tensor
    outcome: Tensor
    is_mode: Tensor
    longest: int
    start_policy: Tensor | None = None

    @property
    def num_states(self) -> int:
        """S."""
        return self.child.shape[0]

    @property
    def num_actions(self) -> int:
        """A, without the stop action."""
        return self.child.shape[1]

    @cached_property
    def allowed_or_stop(self) -> Tensor:
        """(S, A+1) bool, the allowed actions with the stop action last."""
        return torch.cat([self.allowed, torch.ones(self.num_states, 1, dtype=torch.bool)], dim=1)

    @cached_property
    def log_z(self) -> float:
        """log of the sum of all rewards."""
        return float(self.log_reward.logsumexp(0))

    @cached_property
    def target(self) -> Tensor:
        """(O,) float64, R/Z: the distribution over outcomes that a perfect policy has."""
        return self.per_outcome((self.log_reward - self.log_z).exp())

    def per_outcome(self, per_state: Tensor) -> Tensor:
        """(O,) float64, a (S,) quantity added up over the states of each outcome."""
        return torch.zeros(self.is_mode.shape[0], dtype=torch.float64).index_add(0, self.outcome, per_state.double())

    def uniform_log_pb(self) -> Tensor:
        """(S, A) float64 log P_B of the action that led into a state: all alike, −inf where none does.

        The start has no parent; it has 0.
        """
        parents = self.arrived_by.sum(dim=1, keepdim=True)
        log_pb = torch.where(self.arrived_by, -parents.double().log(), -math.inf)
        return torch.where(parents == 0, 0.0, log_pb)

    def along(self, per_arrival: Tensor) -> Tensor:
        """(S, A) entries of a table (state, action that led into it), at (state, action that leaves it)."""
        return per_arrival[self.child, torch.arange(self.num_actions)]


def outcome_distribution(graph: StateGraph, log_policy: Tensor) -> Tensor:
    """Returns (O,) float64, the exact probability of each outcome under a policy.

    Args:
        graph: The state graph.
        log_policy: (S, A+1), −inf where an action is not allowed.
    """
    policy = log_policy.detach().double().exp()
    at = torch.zeros(graph.num_states, dtype=torch.float64)
    at[0] = 1.0
    visits = at.clone()
    for _ in range(graph.longest):
        moved = at[:, None] * policy[:, :-1]
        at = torch.zeros_like(at).index_add(0, graph.child.flatten(), moved.flatten())
        visits += at
    return graph.per_outcome(visits * policy[:, -1])


def perfect_policy(graph: StateGraph, log_pb: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the one policy that is in balance with a backward policy, and its state flows.

    F(s) = R(s) + Σ_a P_B(s | s') F(s'), P_F(s' | s) = P_B(s | s') F(s') / F(s), P_F(⊤ | s) = R(s) / F(s).

    Args:
        graph: The state graph.
        log_pb: (S, A) log P_B of the action that led into a state.

    Returns:
        (S, A+1) log P_F with the stop action last, and (S,) log F; float64. log F(0) is log Z.
    """
    log_pb_leaving = torch.where(graph.allowed, graph.along(log_pb.double()), -math.inf)
    log_flow = graph.log_reward
    for _ in range(graph.longest):
        log_flow = _edges(graph, log_pb_leaving, log_flow).logsumexp(dim=1)
    return _edges(graph, log_pb_leaving, log_flow) - log_flow[:, None], log_flow


def _edges(graph: StateGraph, log_pb_leaving: Tensor, log_flow: Tensor) -> Tensor:
    """(S, A+1) log flow through each action, the stop action's last."""
    return torch.cat([log_pb_leaving + log_flow[graph.child], graph.log_reward[:, None]], dim=1)


def total_variation(p: Tensor, q: Tensor) -> float:
    """Returns ½ Σ |p − q|, in 0..1."""
    return float((p - q).abs().sum() / 2)


def jensen_shannon(p: Tensor, q: Tensor) -> float:
    """Returns the Jensen-Shannon divergence in nats, in 0..log 2."""
    middle = (p + q) / 2
    divergence = torch.xlogy(p, p / middle.clamp(min=1e-300)) + torch.xlogy(q, q / middle.clamp(min=1e-300))
    return float(divergence.sum() / 2)
