"""From trajectories and token scores to the padded tensors that the losses take.

What is in a state's terms
--------------------------
With γ = `cot_weight`, α = `reference_weight`, c_t the chain of thought and a_t the action at state z_t:

    log_pf[t]     = log P_Act(a_t | c_t) + γ log P_CoT(c_t)
    log_p_stop[t] = log P([DONE] | c_t)  + γ log P_CoT(c_t)
    log_reward[t] = β log R(z_{0:t}⊤)    + α Σ_{k ≤ t} log P_ref(c_k)

c_t precedes both branches at z_t, so it is in both of the first two, and stopping at z_t makes an object
x = (c_0, a_0, …, c_t, ⊤) that contains c_t; hence the sum to k = t *inclusive* in the third. Two checks:

* Whole trajectory (TB, VarTB). Σ_{t<n} log_pf[t] + log_p_stop[n] holds γ log P_CoT of c_0 … c_n, and
  log_reward[n] holds α log P_ref of the same. Where the stop was forced, log_p_stop[n] = 0 and there is no
  c_n on either side.
* State-wise (DB, SubTB), residual(i, j) = log_reward[i] + Σ_{i≤t<j} log_pf[t] + log_p_stop[j]
  − log_reward[j] − log_p_stop[i]. From the policy: γ (c_i + … + c_{j−1}) + γ c_j − γ c_i = γ (c_{i+1} + … + c_j).
  From the target: α (c_{i+1} + … + c_j). The same chains of thought; with α = γ and the policy equal to the
  reference they cancel exactly. (It is detailed balance on the tree whose nodes are u_t = (z_t, c_t), with
  F(u_t) = R_t / P(⊤ | u_t) and the edge u_t → u_{t+1} of probability P_Act(a_t | c_t) P_CoT(c_{t+1})^γ.)

Malformed responses
-------------------
A malformed response is a chain of thought without an action: the trajectory never reaches a node u_t at
which it could have stopped, so P(⊤) does not exist there and no number stands in for it. Sums over whole
trajectories do not need it. State-wise losses skip the node: its transition is merged with the one before,
log_pf = (… + log P_Act(a_{t−1})) + γ log P(text), which is what eliminating F(z_t) from the balance
conditions on both sides gives. Every sub-trajectory from an earlier node to the floored end remains, and
that is what pushes malformed responses down.
At the first state there is no node before. The flow through z_0 *before* any thought is Z(g), and every
other trajectory of the same instance that answered z_0 properly estimates it:
log Z = log_reward[0] − log_p_stop[0]. Their mean, detached, stands in for log F(z_0). Without such a
companion the trajectory carries no state-wise signal: its length becomes 0 and it is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.trajectory import EndReason, Step, Trajectory

STATE_WISE = frozenset({"db", "subtb"})
"""Losses that use log P(⊤) at inner states."""


@dataclass(frozen=True)
class Target:
    """What of the configuration the loss inputs depend on.

    Attributes:
        reward_exponent: β.
        reference_weight: α.
        cot_weight: γ.
        cut_is_terminal: Whether a cut at the step limit counts as a forced stop; else it is incomplete.
        state_wise: Whether the loss uses log P(⊤) at inner states.
        log_reward_floor: Smallest log R^β, nats.
    """

    reward_exponent: float
    reference_weight: float
    cot_weight: float
    cut_is_terminal: bool
    state_wise: bool
    log_reward_floor: float = -math.inf


@dataclass(frozen=True)
class LossInputs:
    """The losses' common arguments (objectives.md), float64 and on the CPU; K trajectories.

    Attributes:
        log_pf: (K, T).
        log_p_stop: (K, T+1).
        log_reward: (K, T+1).
        length: (K,) int64.
        stopped: (K,) bool.
        instance: (K,) int64.
        without_flow: Trajectories that a state-wise loss cannot use: malformed at the first state, and no
            companion that tells the flow there.
    """

    log_pf: Tensor
    log_p_stop: Tensor
    log_reward: Tensor
    length: Tensor
    stopped: Tensor
    instance: Tensor
    without_flow: int

    def arguments(self) -> dict[str, Tensor]:
        """The keyword arguments of a loss."""
        names = ("log_pf", "log_p_stop", "log_reward", "length", "stopped", "instance")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class _Layout:
    """Which states of a trajectory are nodes of the loss, and which steps lie between them.

    Attributes:
        nodes: Visited states that count, in order.
        column: For every step, the transition it belongs to, or None when it is cut off.
        stop_node: For every step, the node whose log P(⊤) it scores, or None.
        stopped: Whether the trajectory ended in ⊤.
        borrows: Whether node 0 has no stop of its own (malformed first response).
    """

    nodes: list[int]
    column: list[int | None]
    stop_node: list[int | None]
    stopped: bool
    borrows: bool


def is_malformed(step: Step) -> bool:
    """Whether a step has no action position."""
    return step.action_end <= step.cot_end


def loss_inputs(
    trajectories: Sequence[Trajectory], scores: Tensor, reference_log_cot: Tensor | None, target: Target
) -> LossInputs:
    """Builds the losses' tensors (see the module's text for the formulas and the treatment of ends).

    Args:
        trajectories: K trajectories with S steps in all.
        scores: (S, 3) log P_Act, log P_CoT and log P([DONE]) of the steps, in order (`StepScores.stacked`).
        reference_log_cot: (S,) log P_ref(c) of the steps; None where `reference_weight` is 0.
        target: Exponents, weights and rules.

    Returns:
        The tensors, differentiable in `scores`.
    """
    layouts = [_layout(t, target) for t in trajectories]
    K, T = len(trajectories), max((len(layout.nodes) - 1 for layout in layouts), default=0)
    pf_slot, pf_step, stop_slot, stop_step = [], [], [], []
    log_reward = torch.zeros(K, T + 1, dtype=torch.float64)
    reference = [0.0] * scores.shape[0] if reference_log_cot is None else reference_log_cot.tolist()
    first = 0
    for k, (trajectory, layout) in enumerate(zip(trajectories, layouts, strict=True)):
        for s, (column, node) in enumerate(zip(layout.column, layout.stop_node, strict=True), start=first):
            if column is not None:
                pf_slot.append(k * T + column)
                pf_step.append(s)
            if node is not None:
                stop_slot.append(k * (T + 1) + node)
                stop_step.append(s)
        here = reference[first : first + len(trajectory.steps)]
        log_reward[k, : len(layout.nodes)] = _node_log_rewards(trajectory, layout, here, target)
        first += len(trajectory.steps)

    log_act, log_cot, log_done = scores.cpu().double().unbind(dim=1)
    log_pf = _placed(log_act + target.cot_weight * log_cot, pf_step, pf_slot, K * T).view(K, T)
    log_p_stop = _placed(log_done + target.cot_weight * log_cot, stop_step, stop_slot, K * (T + 1)).view(K, T + 1)
    numbers = {name: i for i, name in enumerate(dict.fromkeys(t.instance_id for t in trajectories))}
    instance = torch.tensor([numbers[t.instance_id] for t in trajectories], dtype=torch.int64)
    length = torch.tensor([len(layout.nodes) - 1 for layout in layouts], dtype=torch.int64)
    stopped = torch.tensor([layout.stopped for layout in layouts], dtype=torch.bool)
    borrows = torch.tensor([layout.borrows for layout in layouts], dtype=torch.bool)
    scored_first = torch.tensor([0 in layout.stop_node for layout in layouts], dtype=torch.bool)
    log_p_stop, without = _borrow_first_flow(log_p_stop, log_reward, instance, borrows, scored_first)
    length = torch.where(without, 0, length)
    return LossInputs(log_pf, log_p_stop, log_reward, length, stopped, instance, int(without.sum()))


def _layout(trajectory: Trajectory, target: Target) -> _Layout:
    steps = trajectory.steps
    cut = trajectory.end is EndReason.STEP_LIMIT and not target.cut_is_terminal
    # The state behind a cut has no scored stop: an incomplete trajectory ends one state earlier.
    last = max(trajectory.length - 1, 0) if cut else trajectory.length
    forced = not cut and trajectory.end is not EndReason.DONE
    states = range(last + 1)
    nodes = list(states)
    borrows = False
    if target.state_wise:
        nodes = [t for t in states if (forced and t == last) or (t < len(steps) and not is_malformed(steps[t]))]
        borrows = (len(nodes) == 0 or nodes[0] != 0) and len(steps) > 0
        if len(nodes) == 0 or nodes[0] != 0:
            nodes = [0, *nodes]
    column: list[int | None] = []
    stop_node: list[int | None] = []
    node = 0
    for t, step in enumerate(steps):
        while node + 1 < len(nodes) and nodes[node + 1] <= t:
            node += 1
        column.append(node if node + 1 < len(nodes) else None)
        is_scored = t <= last and nodes[node] == t and not is_malformed(step)
        stop_node.append(node if is_scored else None)
    return _Layout(nodes, column, stop_node, stopped=not cut, borrows=borrows)


def _node_log_rewards(trajectory: Trajectory, layout: _Layout, reference: Sequence[float], target: Target) -> Tensor:
    log_rewards = torch.tensor(trajectory.log_rewards, dtype=torch.float64)[layout.nodes]
    log_rewards = (target.reward_exponent * log_rewards).clamp(min=target.log_reward_floor)
    if target.reference_weight > 0:
        until = torch.tensor([0.0, *reference], dtype=torch.float64).cumsum(dim=0)
        # States without a response of their own (forced stops) add nothing beyond the one before.
        count = [min(t + 1, len(reference)) for t in layout.nodes]
        log_rewards = log_rewards + target.reference_weight * until[count]
    return log_rewards


def _placed(values: Tensor, source: list[int], slot: list[int], size: int) -> Tensor:
    """Returns `size` zeros with values[source] added at `slot` (merged transitions add up)."""
    indices = torch.tensor(slot, dtype=torch.int64)
    chosen = values[torch.tensor(source, dtype=torch.int64)]
    return torch.zeros(size, dtype=values.dtype).index_add(0, indices, chosen)


def _borrow_first_flow(
    log_p_stop: Tensor, log_reward: Tensor, instance: Tensor, borrows: Tensor, scored_first: Tensor
) -> tuple[Tensor, Tensor]:
    """Gives state 0 of trajectories that began malformed the flow that their companions estimate.

    Returns:
        log_p_stop with the entries that make log_reward[0] − log_p_stop[0] that flow (so that whatever
        log_reward[0] holds there cancels), and which trajectories (K,) have no companion to borrow from.
    """
    log_flow = (log_reward[:, 0] - log_p_stop[:, 0]).detach()
    lends = (instance[:, None] == instance) & scored_first
    lenders = lends.sum(dim=1)
    borrowed = torch.where(lends, log_flow, 0.0).sum(dim=1) / lenders.clamp(min=1)
    use = borrows & (lenders > 0)
    first = torch.where(use, log_reward[:, 0] - borrowed, log_p_stop[:, 0])
    return torch.cat([first[:, None], log_p_stop[:, 1:]], dim=1), borrows & (lenders == 0)
