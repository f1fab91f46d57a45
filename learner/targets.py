"""From trajectories and token scores to the padded tensors that the losses take.

What is in a state's terms
--------------------------
With γ = `cot_weight`, α = `reference_weight`, β = `reward_exponent`, c_t the chain of thought and a_t the
action at state z_t:

    log_pf[t]     = log P_Act(a_t | c_t) + γ log P_CoT(c_t) − α log P_ref(c_t)
    log_p_stop[t] = log P([DONE] | c_t)  + γ log P_CoT(c_t) − α log P_ref(c_t)
    log_reward[t] = β log R(z_{0:t}⊤), floored

The target of an object x = (c_0, a_0, …, c_n, ⊤) is R(x)^β Π_{k≤n} P_ref(c_k)^α. Its reference factors stand
with the forward terms of the same response: in every residual that is the same as having their product in the
reward (a test holds this). c_t precedes both branches at z_t, so its terms are in both of the first two.

* Whole trajectory (TB, VarTB). Σ_{t<n} log_pf[t] + log_p_stop[n] holds γ log P_CoT − α log P_ref of c_0 … c_n.
  Where the stop was forced, log_p_stop[n] = 0 and there is no c_n.
* State-wise (DB, SubTB), residual(i, j) = log_reward[i] + Σ_{i≤t<j} log_pf[t] + log_p_stop[j]
  − log_reward[j] − log_p_stop[i] holds the same of c_{i+1} … c_j; with α = γ and the policy equal to the
  reference they cancel. (It is detailed balance on the tree whose nodes are u_t = (z_t, c_t), with
  F(u_t) = R_t / P(⊤ | u_t) and the edge u_t → u_{t+1} of probability P_Act(a_t | c_t) P_CoT(c_{t+1})^γ.)
* Learned flow. F(z_t) collects what can follow z_t, R^β Π_{k≥t} P_ref(c_k)^α. No earlier chain of thought is in
  it: it depends on the state alone, which is what a head can learn from a prompt that shows none. Forward-looking
  losses take log_reward at inner states for what has been earned so far; it is what the environment gives at
  every visited state (`Trajectory.log_rewards`), so sub-goals that it pays for are local credit, also in
  incomplete trajectories.

Ends of trajectories in losses with a learned flow
--------------------------------------------------
A chosen stop leads from z_n to the terminal state x, as those losses have it. Where the stop is forced (by the
environment, by an invalid response, or by a cut that counts as terminal) z_n *is* x: no response was asked for,
so nothing could read a flow off its prompt, and the flow is known, log F = log_reward[n] (log F̃ = 0). Such a
trajectory is passed with that flow at n and without a stop action: `stopped` is False, though nothing is missing.
A malformed response is then a transition to x like any other (log P_Act = 0), from a state whose flow is
learned, so nothing of the next section is needed. In an incomplete trajectory the state behind the cut has no
prompt that was answered; it ends one state earlier, with a learned flow.

Malformed responses in losses that use log P(⊤)
-----------------------------------------------
A malformed response is a chain of thought without an action: the trajectory never reaches a node u_t at
which it could have stopped, so P(⊤) does not exist there and no number stands in for it. Sums over whole
trajectories do not need it. State-wise losses skip the node: its transition is merged with the one before,
log_pf = (… + log P_Act(a_{t−1})) + (γ log P(text) − α log P_ref(text)), which is what eliminating F(z_t) from
the balance conditions on both sides gives. Every sub-trajectory from an earlier node to the floored end
remains, and that is what pushes malformed responses down.
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

from gflowvlm.learner.heads import HEAD_OF_LOSS, HeadKind, first_estimates
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.trajectory import EndReason, Step, Trajectory

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
        loss: Name of the loss.
        log_reward_floor: Smallest log R^β, nats.
    """

    reward_exponent: float
    reference_weight: float
    cot_weight: float
    cut_is_terminal: bool
    loss: str
    log_reward_floor: float = -math.inf

    @classmethod
    def of(cls, config: RunConfig, loss: str | None = None) -> Target:
        """Returns the target of a run, for its own loss or another."""
        return cls(
            reward_exponent=config.target.reward_exponent,
            log_reward_floor=config.target.log_reward_floor,
            reference_weight=config.target.reference_weight,
            cot_weight=config.policy.cot_weight,
            cut_is_terminal=config.target.truncation == "terminal",
            loss=config.objective.loss if loss is None else loss,
        )

    @property
    def head(self) -> HeadKind | None:
        """What the loss learns besides the policy."""
        return HEAD_OF_LOSS.get(self.loss)

    @property
    def learns_flow(self) -> bool:
        """Whether the loss learns the flow of every state."""
        return self.head in (HeadKind.LOG_FLOW, HeadKind.LOG_FLOW_AHEAD)


@dataclass(frozen=True)
class LossInputs:
    """The losses' common arguments (objectives.md), float64 and on the CPU; K trajectories.

    Attributes:
        log_pf: (K, T).
        log_p_stop: (K, T+1).
        log_reward: (K, T+1).
        length: (K,) int64.
        stopped: (K,) bool; with a learned flow only where the policy chose to stop.
        instance: (K,) int64.
        log_flow: (K, T+1) what the head says of the visited states, and the known flow of terminal ones; None
            without a head. `tb` uses the first state's.
        from_head: (K, T+1) bool, where log_flow is the head's.
        policy_log_pf: (K, T) log P_F of the policy itself, without the reference; detached.
        without_flow: Trajectories that a state-wise loss cannot use: malformed at the first state, and no
            companion that tells the flow there.
        head: What the head learns; None without one.
    """

    log_pf: Tensor
    log_p_stop: Tensor
    log_reward: Tensor
    length: Tensor
    stopped: Tensor
    instance: Tensor
    log_flow: Tensor | None
    from_head: Tensor
    policy_log_pf: Tensor
    without_flow: int
    head: HeadKind | None

    def arguments(self) -> dict[str, Tensor]:
        """The keyword arguments of the loss."""
        names = ("log_pf", "log_p_stop", "log_reward", "length", "stopped", "instance")
        arguments: dict[str, Tensor] = {name: getattr(self, name) for name in names}
        if self.log_flow is not None and self.head is HeadKind.LOG_Z:
            arguments["log_z"] = self.log_flow[:, 0]
        elif self.log_flow is not None:
            arguments["log_flow"] = self.log_flow
        return arguments

    def log_first_flow(self) -> Tensor | None:
        """(K,) the learned log F(z_0), which is log Z(g); None for losses that learn no flow of states."""
        if self.log_flow is None or self.head is HeadKind.LOG_Z:
            return None
        first = self.log_flow[:, 0]
        return first + self.log_reward[:, 0] if self.head is HeadKind.LOG_FLOW_AHEAD else first

    def first_estimates(self) -> Tensor:
        """(K,) nats: what the head should say by this batch, a trajectory's mean; NaN where it says nothing."""
        ahead = self.head is HeadKind.LOG_FLOW_AHEAD
        path = {name: getattr(self, name).detach() for name in ("log_pf", "log_p_stop", "log_reward")}
        estimates = first_estimates(**path, length=self.length, stopped=self.stopped, ahead=ahead)
        return torch.where(self.from_head, estimates, math.nan).nanmean(dim=1)


@dataclass(frozen=True)
class _Layout:
    """Which states of a trajectory are nodes of the loss, and which steps lie between them.

    Attributes:
        nodes: Visited states that count, in order.
        column: For every step, the transition it belongs to, or None when it is cut off.
        stop_node: For every step, the node whose log P(⊤) it scores, or None.
        head_node: For every step, the node whose state the head reads off its prompt, or None.
        stopped: Whether the trajectory ended in ⊤; with a learned flow, whether the policy chose to.
        borrows: Whether node 0 has no stop of its own (malformed first response).
    """

    nodes: list[int]
    column: list[int | None]
    stop_node: list[int | None]
    head_node: list[int | None]
    stopped: bool
    borrows: bool


def is_malformed(step: Step) -> bool:
    """Whether a step has no action position."""
    return step.action_end <= step.cot_end


def _scores_stop(step: Step) -> bool:
    """Whether a step tells log P(⊤) at its state; one that does not is to a state-wise loss what a malformed one is."""
    return not is_malformed(step) and len(step.stop_ids) > 0


def instance_numbers(trajectories: Sequence[Trajectory]) -> Tensor:
    """Returns (K,) int64, equal for trajectories of the same task instance g."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(t.instance_id for t in trajectories))}
    return torch.tensor([numbers[t.instance_id] for t in trajectories], dtype=torch.int64)


def loss_inputs(
    trajectories: Sequence[Trajectory], scores: Tensor, reference_log_cot: Tensor | None, target: Target
) -> LossInputs:
    """Builds the losses' tensors (see the module's text for the formulas and the treatment of ends).

    Args:
        trajectories: K trajectories with S steps in all.
        scores: (S, 3 or more) log P_Act, log P_CoT and log P([DONE]) of the steps, in order
            (`StepScores.stacked`); for a loss with a head its number of their states in the last column.
        reference_log_cot: (S,) log P_ref(c) of the steps; None where `reference_weight` is 0.
        target: Exponents, weights and rules.

    Returns:
        The tensors, differentiable in `scores`.
    """
    layouts = [_layout(t, target) for t in trajectories]
    K, T = len(trajectories), max((len(layout.nodes) - 1 for layout in layouts), default=0)
    log_reward = torch.zeros(K, T + 1, dtype=torch.float64)
    for k, (trajectory, layout) in enumerate(zip(trajectories, layouts, strict=True)):
        log_reward[k, : len(layout.nodes)] = _node_log_rewards(trajectory, layout, target)

    log_act, log_cot, log_done = scores[:, :3].cpu().double().unbind(dim=1)
    log_cot = target.cot_weight * log_cot
    reference = torch.zeros_like(log_cot) if reference_log_cot is None else reference_log_cot.double()
    of_text = log_cot - target.reference_weight * reference
    transitions = [layout.column for layout in layouts]
    log_pf = _placed(log_act + of_text, transitions, T)
    log_p_stop = _placed(log_done + of_text, [layout.stop_node for layout in layouts], T + 1)
    instance = instance_numbers(trajectories)
    length = torch.tensor([len(layout.nodes) - 1 for layout in layouts], dtype=torch.int64)
    stopped = torch.tensor([layout.stopped for layout in layouts], dtype=torch.bool)
    borrows = torch.tensor([layout.borrows for layout in layouts], dtype=torch.bool)
    scored_first = torch.tensor([0 in layout.stop_node for layout in layouts], dtype=torch.bool)
    log_p_stop, without = _share_first_flow_of_group(log_p_stop, log_reward, instance, borrows, scored_first)
    log_flow, from_head = _log_flow(scores, layouts, log_reward, target)
    return LossInputs(
        log_pf=log_pf,
        log_p_stop=log_p_stop,
        log_reward=log_reward,
        length=torch.where(without, 0, length),
        stopped=stopped,
        instance=instance,
        log_flow=log_flow,
        from_head=from_head,
        policy_log_pf=_placed(log_act + log_cot, transitions, T).detach(),
        without_flow=int(without.sum()),
        head=target.head,
    )


def _layout(trajectory: Trajectory, target: Target) -> _Layout:
    steps = trajectory.steps
    at_limit = trajectory.end is EndReason.STEP_LIMIT and not target.cut_is_terminal
    cut = at_limit or trajectory.end.by_token_limit
    # The state behind a cut has no scored stop: an incomplete trajectory ends one state earlier.
    last = max(trajectory.length - 1, 0) if cut else trajectory.length
    forced = not cut and trajectory.end is not EndReason.DONE
    states = range(last + 1)
    nodes = list(states)
    borrows = False
    if target.loss in STATE_WISE:
        nodes = [t for t in states if (forced and t == last) or (t < len(steps) and _scores_stop(steps[t]))]
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
    # Without state-wise merging node t is state t; log Z belongs to the first.
    reads = range(last + 1 if target.learns_flow else 1 if target.head is not None else 0)
    head_node = [t if t in reads else None for t in range(len(steps))]
    stopped = not cut and not (forced and target.learns_flow)
    if target.head is not None and len(steps) == 0:
        # No prompt was shown, so nothing says what log Z is.
        stopped = False
    return _Layout(nodes, column, stop_node, head_node, stopped, borrows)


def _node_log_rewards(trajectory: Trajectory, layout: _Layout, target: Target) -> Tensor:
    log_rewards = torch.tensor(trajectory.log_rewards, dtype=torch.float64)[layout.nodes]
    return (target.reward_exponent * log_rewards).clamp(min=target.log_reward_floor)


def _log_flow(
    scores: Tensor, layouts: Sequence[_Layout], log_reward: Tensor, target: Target
) -> tuple[Tensor | None, Tensor]:
    """Returns `LossInputs.log_flow` and `LossInputs.from_head`."""
    states = log_reward.shape[1]
    if target.head is None:
        return None, torch.zeros_like(log_reward, dtype=torch.bool)
    columns = [layout.head_node for layout in layouts]
    ones = torch.ones(scores.shape[0], dtype=torch.float64)
    from_head = _placed(ones, columns, states) > 0
    known = log_reward if target.head is HeadKind.LOG_FLOW else torch.zeros_like(log_reward)
    return torch.where(from_head, _placed(scores[:, -1].cpu().double(), columns, states), known), from_head


def _placed(values: Tensor, columns: Sequence[Sequence[int | None]], width: int) -> Tensor:
    """Returns (K, width) zeros with each step's value added in its column (merged transitions add up).

    Args:
        values: (S,) of all steps, trajectory after trajectory.
        columns: For every trajectory and step the column, or None.
        width: Number of columns.
    """
    rows = [(k, column) for k, of_steps in enumerate(columns) for column in of_steps]
    source = torch.tensor([s for s, (_, column) in enumerate(rows) if column is not None], dtype=torch.int64)
    slot = torch.tensor([k * width + column for k, column in rows if column is not None], dtype=torch.int64)
    placed = torch.zeros(len(columns) * width, dtype=values.dtype).index_add(0, slot, values[source])
    return placed.view(len(columns), width)


def _share_first_flow_of_group(
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
