"""Our losses and torchgfn's on the same trajectories and the same tables: values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from gfn.containers import Trajectories  # type: ignore[import-not-found]
from gfn.estimators import DiscretePolicyEstimator, ScalarEstimator  # type: ignore[import-not-found]
from gfn.gflownet import (  # type: ignore[import-not-found]
    DBGFlowNet,
    LogPartitionVarianceGFlowNet,
    ModifiedDBGFlowNet,
    SubTBGFlowNet,
    TBGFlowNet,
)
from gfn.gym import HyperGrid  # type: ignore[import-not-found]
from gfn.preprocessors import EnumPreprocessor  # type: ignore[import-not-found]
from gfn.samplers import Sampler  # type: ignore[import-not-found]
from torch import Tensor, nn

from gflowvlm.studies.proving.hypergrid import grid_cells, hypergrid
from gflowvlm.studies.proving.policy import PolicyTable
from gflowvlm.studies.proving.rollouts import loss_inputs
from gflowvlm.studies.proving.state_graph import StateGraph
from gflowvlm.studies.proving.torchgfn.report import Agreement
from gflowvlm.studies.proving.torchgfn.trajectories import mean_over_transitions, to_rollouts, weigh_subtrajectories
from gflowvlm.studies.proving.training import batch_loss

GRIDS = ((2, 8), (4, 8))
"""Dimensions and side of the hypergrids."""

BATCHES, BATCH_SIZE = 5, 64
"""Batches on each grid, and trajectories in each."""

LAMBDAS = (0.1, 0.5, 0.9, 1.0, 2.0)

OVER_TRANSITIONS = ", mean over transitions"
SEVERAL_LAMBDAS = f", λ = {', '.join(f'{value:g}' for value in LAMBDAS)}"


class Lookup(nn.Module):
    """A table of what a network says of each state, as the module of an estimator.

    Args:
        table: (S, ...) float64.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, state: Tensor) -> Tensor:
        """Returns the rows of (..., 1) state numbers."""
        return self.table[state.squeeze(-1)]


@dataclass(frozen=True)
class Problem:
    """One batch of trajectories, and random tables that both sides read.

    Attributes:
        graph: Our hypergrid.
        env: torchgfn's.
        trajectories: torchgfn's, sampled by its sampler from another policy than the one in the tables.
        inputs: The same as our losses' tensors.
        tables: The tables, which both losses are differentiated by: logits of P_F (S, A+1) and P_B (S, A), log F
            (S,), log Z ().
    """

    graph: StateGraph
    env: HyperGrid
    trajectories: Trajectories
    inputs: dict[str, Tensor]
    tables: dict[str, nn.Parameter]

    def ours(self, name: str, *, subtb_lambda: float = 0.9, inputs: dict[str, Tensor] | None = None) -> Tensor:
        """Returns one of our losses, on the whole batch or on other inputs."""
        batch = self.inputs if inputs is None else inputs
        return batch_loss(name, batch, log_z=self.tables["log_z"], subtb_lambda=subtb_lambda)

    def ours_over_transitions(self, name: str, *, stop_is_transition: bool) -> Tensor:
        """Returns one of our losses, averaged over all transitions of the batch."""
        return mean_over_transitions(
            lambda inputs: self.ours(name, inputs=inputs), self.inputs, stop_is_transition=stop_is_transition
        )

    def policies(self) -> dict[str, DiscretePolicyEstimator]:
        """Returns torchgfn's estimators of P_F and P_B."""
        return {
            "pf": policy_estimator(self.env, self.tables["logits"]),
            "pb": policy_estimator(self.env, self.tables["backward_logits"], is_backward=True),
        }

    def flow(self, log_flow: Tensor) -> dict[str, ScalarEstimator]:
        """Returns torchgfn's estimator of a (S,) state flow."""
        return {"logF": ScalarEstimator(Lookup(log_flow[:, None]), preprocessor=enumerate_states(self.env))}

    def theirs(self, kind: type, **arguments: object) -> Tensor:
        """Returns a torchgfn loss of the batch, with the state flow of the tables where it has one."""
        flow = self.flow(self.tables["log_flow"]) if kind in (DBGFlowNet, SubTBGFlowNet) else {}
        gflownet = kind(**self.policies(), **flow, **arguments)
        return gflownet.loss_from_trajectories(self.env, self.trajectories, recalculate_all_logprobs=True)

    def theirs_between_stoppable_states(self, subtb_lambda: float) -> Tensor:
        """Returns SubTB(λ) of torchgfn's residuals, for the flow R / P_F(⊤) that our `subtb` has."""
        log_p_stop = masked_log_softmax(self.tables["logits"], self.graph.allowed_or_stop)[:, -1]
        gflownet = SubTBGFlowNet(**self.policies(), **self.flow(self.graph.log_reward - log_p_stop))
        scores, _ = gflownet.get_scores(self.trajectories, recalculate_all_logprobs=True, env=self.env)
        return weigh_subtrajectories(scores, self.inputs["length"], subtb_lambda=subtb_lambda)


def enumerate_states(env: HyperGrid) -> EnumPreprocessor:
    """Returns what hands an estimator the number of a state."""
    return EnumPreprocessor(env.get_states_indices)


def policy_estimator(env: HyperGrid, logits: Tensor, *, is_backward: bool = False) -> DiscretePolicyEstimator:
    """Returns a policy of torchgfn's with these logits."""
    return DiscretePolicyEstimator(
        Lookup(logits), env.n_actions, preprocessor=enumerate_states(env), is_backward=is_backward
    )


def masked_log_softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """Returns log-probabilities, −inf where not allowed; a row without any allowed action keeps all of them."""
    return torch.where(allowed | ~allowed.any(dim=1, keepdim=True), logits, -math.inf).log_softmax(dim=1)


def make_problem(dimensions: int, side: int, seed: int) -> Problem:
    """Returns a batch of random trajectories and tables, in torch's default dtype (float64)."""
    graph = hypergrid(dimensions, side)
    env = HyperGrid(ndim=dimensions, height=side)
    torch.manual_seed(seed)
    behaviour = torch.randn(graph.num_states, dimensions + 1)
    behaviour[:, -1] -= 2.0  # Otherwise most trajectories stop after a step or two.
    trajectories = Sampler(policy_estimator(env, behaviour)).sample_trajectories(env, n=BATCH_SIZE)
    rollouts = to_rollouts(
        trajectories.states.tensor, trajectories.actions.tensor.squeeze(-1), trajectories.terminating_idx, side=side
    )
    tables = {
        "logits": nn.Parameter(torch.randn(graph.num_states, dimensions + 1)),
        "backward_logits": nn.Parameter(torch.randn(graph.num_states, dimensions)),
        "log_flow": nn.Parameter(torch.randn(graph.num_states)),
        "log_z": nn.Parameter(torch.randn(())),
    }
    table = PolicyTable(
        log_pf=masked_log_softmax(tables["logits"], graph.allowed_or_stop),
        log_pb=masked_log_softmax(tables["backward_logits"], graph.arrived_by),
        log_flow=tables["log_flow"],
    )
    inputs = loss_inputs(table, rollouts.state, graph.log_reward, rollouts)
    return Problem(graph, env, trajectories, inputs, tables)


Pairs = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Comparison:
    """Two losses that are to be the same.

    Attributes:
        ours: Name of ours, and how it is averaged where that is not its own way.
        theirs: Name of torchgfn's.
        both: From a problem to pairs of values, ours first.
    """

    ours: str
    theirs: str
    both: Callable[[Problem], Pairs]


def comparisons() -> list[Comparison]:
    """Returns everything that is compared."""
    return [
        Comparison("tb", "TBGFlowNet", lambda p: [(p.ours("tb"), p.theirs(TBGFlowNet, logZ=p.tables["log_z"]))]),
        Comparison(
            "var_tb",
            "LogPartitionVarianceGFlowNet",
            lambda p: [(p.ours("var_tb"), p.theirs(LogPartitionVarianceGFlowNet))],
        ),
        Comparison(
            f"db{OVER_TRANSITIONS}",
            "ModifiedDBGFlowNet",
            lambda p: [(p.ours_over_transitions("db", stop_is_transition=False), p.theirs(ModifiedDBGFlowNet))],
        ),
        Comparison(
            f"subtb{SEVERAL_LAMBDAS}",
            "residuals of SubTBGFlowNet with F = R / P_F(⊤)",
            lambda p: ((p.ours("subtb", subtb_lambda=v), p.theirs_between_stoppable_states(v)) for v in LAMBDAS),
        ),
        *flow_comparisons("flow", forward_looking=False),
        *flow_comparisons("fl", forward_looking=True),
    ]


def flow_comparisons(family: str, *, forward_looking: bool) -> list[Comparison]:
    """Returns what is compared of the losses with a learned flow."""
    db, subtb = f"{family}_db", f"{family}_subtb"
    suffix = ", forward_looking" if forward_looking else ""
    looking = {"forward_looking": forward_looking}
    return [
        Comparison(
            f"{db}{OVER_TRANSITIONS}",
            f"DBGFlowNet{suffix}",
            lambda p: [(p.ours_over_transitions(db, stop_is_transition=True), p.theirs(DBGFlowNet, **looking))],
        ),
        Comparison(
            db,
            f"SubTBGFlowNet, ModifiedDB{suffix}",
            lambda p: [(p.ours(db), p.theirs(SubTBGFlowNet, weighting="ModifiedDB", **looking))],
        ),
        Comparison(
            f"{subtb}{SEVERAL_LAMBDAS}",
            f"SubTBGFlowNet, geometric_within{suffix}",
            lambda p: (
                (
                    p.ours(subtb, subtb_lambda=v),
                    p.theirs(SubTBGFlowNet, weighting="geometric_within", lamda=v, **looking),
                )
                for v in LAMBDAS
            ),
        ),
    ]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Returns the largest |ours − theirs|, relative to the largest of theirs where that is above 1."""
    scale = theirs.detach().abs().max().clamp(min=1.0)
    return float((ours - theirs).detach().abs().max() / scale)


def gradients(loss: Tensor, problem: Problem) -> list[Tensor]:
    """Returns the gradient in each table; 0 where the loss does not depend on it."""
    tables = list(problem.tables.values())
    found = torch.autograd.grad(loss, tables, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tables, found, strict=True)]


def make_problems() -> list[Problem]:
    """Returns the batches of all grids. Needs float64 as torch's default dtype."""
    return [make_problem(*grid, seed) for grid in GRIDS for seed in range(BATCHES)]


def compare(problems: Sequence[Problem]) -> Iterator[Agreement]:
    """Yields what each comparison found, over all problems. Needs float64 as torch's default dtype."""
    yield Agreement("log R of all cells", "HyperGrid.log_reward", max(map(reward_difference, problems)), None)
    for comparison in comparisons():
        in_loss, in_gradient = 0.0, 0.0
        for problem in problems:
            for ours, theirs in comparison.both(problem):
                in_loss = max(in_loss, difference(ours, theirs))
                pairs = zip(gradients(ours, problem), gradients(theirs, problem), strict=True)
                in_gradient = max(in_gradient, *(difference(g, h) for g, h in pairs))
        yield Agreement(comparison.ours, comparison.theirs, in_loss, in_gradient)


def reward_difference(problem: Problem) -> float:
    """Returns how far apart the two rewards are; infinity where the cells do not come in the same order."""
    cells = grid_cells(problem.env.ndim, problem.env.height)
    if not torch.equal(problem.env.get_states_indices(cells), torch.arange(len(cells))):
        return math.inf
    return difference(problem.graph.log_reward, problem.env.log_reward(problem.env.states_from_tensor(cells)))
