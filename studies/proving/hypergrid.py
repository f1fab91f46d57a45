"""Hypergrids as state graphs: the grid itself (a DAG), and the tree of its paths (non-Markovian states).

From the cell 0 a step adds 1 to one coordinate; every cell may stop (Bengio et al. 2021, arXiv 2106.04399).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from gflowvlm.studies.proving.state_graph import StateGraph

R0, R1, R2 = 0.1, 0.5, 2.0
"""The reward of any cell, what the outer ring of all coordinates adds, and what the modes add to it."""

BONUS = 4.0
"""Factor of the reward of a path whose first and last step go along the same dimension."""

FAR = 1.0
"""How much energy a step of the `additive-far` reward loses on average."""

GridReward = Literal["modes", "additive", "additive-far"]
PathReward = Literal["divided", "whole", "bonus"]


def grid_cells(dimensions: int, side: int) -> Tensor:
    """Returns (side**dimensions, dimensions) int64, the coordinates of all cells; the start is first."""
    axis = torch.arange(side)
    return torch.cartesian_prod(*[axis] * dimensions).reshape(-1, dimensions)


def mode_reward(cells: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Returns (S,) float64 log R, and (S,) bool: the cells with R0 + R1 + R2, the modes.

    With u = |x / (side − 1) − ½| in each dimension: R0 + R1 · [all u > ¼] + R2 · [all 0.3 < u < 0.4]. A side
    below 7 has no modes.
    """
    off_centre = (cells.double() / (side - 1) - 0.5).abs()
    # Sides such as 6 put cells right on a border: a hair decides the same way on every machine.
    ring = (off_centre > 0.25 + 1e-9).all(dim=1)
    mode = ((off_centre > 0.3 + 1e-9) & (off_centre < 0.4 - 1e-9)).all(dim=1)
    return (R0 + R1 * ring.double() + R2 * mode.double()).log(), mode


def additive_log_reward(cells: Tensor, side: int, pull: float) -> tuple[Tensor, Tensor]:
    """Returns (S,) float64 −E of an energy that every step adds to, and (S,) bool: the eight cells lowest in E.

    A step in dimension d to coordinate k adds an e_{d,k} drawn once and for all from N(−pull, 1). The order of
    the steps makes no difference, so that E belongs to the cell.
    """
    generator = torch.Generator().manual_seed(2302_01687)
    step = torch.randn(cells.shape[1], side - 1, generator=generator, dtype=torch.float64) - pull
    so_far = torch.cat([torch.zeros(cells.shape[1], 1, dtype=torch.float64), step.cumsum(dim=1)], dim=1)
    log_reward = -sum((so_far[d][cells[:, d]] for d in range(cells.shape[1])), torch.zeros(()))
    lowest = torch.zeros(cells.shape[0], dtype=torch.bool)
    lowest[log_reward.topk(8).indices] = True
    return log_reward, lowest


def hypergrid(dimensions: int, side: int, *, reward: GridReward = "modes") -> StateGraph:
    """Returns the grid: a state is a cell, whatever the path to it, so that P_B has a choice.

    Args:
        dimensions: D.
        side: H, cells along each dimension.
        reward: `modes`: `mode_reward`. `additive`: `additive_log_reward` without a pull, much of whose mass lies
            near the start. `additive-far`: with a pull of `FAR`; the mass lies at the far end.
    """
    cells = grid_cells(dimensions, side)
    if reward == "modes":
        log_reward, is_mode = mode_reward(cells, side)
    else:
        log_reward, is_mode = additive_log_reward(cells, side, pull=FAR if reward == "additive-far" else 0.0)
    stride = side ** torch.arange(dimensions - 1, -1, -1)
    allowed = cells < side - 1
    state = torch.arange(cells.shape[0])
    return StateGraph(
        features=one_hot(cells, side).flatten(start_dim=1).float(),
        child=torch.where(allowed, state[:, None] + stride, state[:, None]),
        allowed=allowed,
        arrived_by=cells > 0,
        log_reward=log_reward,
        outcome=state,
        is_mode=is_mode,
        longest=dimensions * (side - 1),
    )


def path_tree(dimensions: int, side: int, *, reward: PathReward = "divided", sees_path: bool = True) -> StateGraph:
    """Returns the tree of all paths through a grid: a state is the whole history, P_B = 1.

    What a path is worth decides what is learned: with P_B = 1 a cell gets the rewards of all its paths together.

    Args:
        dimensions: D.
        side: H. There are C(2H, H) − 1 paths in two dimensions.
        reward: `divided`: R(cell) · P_B(path | cell) with the grid's uniform P_B. The paths of a cell add up to
            R(cell): outcomes are cells, and their target is the grid's.
            `whole`: R(cell) for each path. Outcomes are cells, each weighted by its number of paths.
            `bonus`: as `divided`, times `BONUS` where the first and the last step go along the same dimension.
            Outcomes are paths; no policy that sees the cell alone can be right.
        sees_path: Whether the features hold the steps taken, or the cell alone.
    """
    grid = hypergrid(dimensions, side)
    steps, cell, log_share, child, num_states = _expand(grid)
    state = torch.arange(num_states)
    allowed = grid.allowed[cell]
    taken = steps >= 0
    last = steps[state, (taken.sum(dim=1) - 1).clamp(min=0)]
    returns = taken.any(dim=1) & (steps[:, 0] == last)
    log_reward = grid.log_reward[cell]
    if reward != "whole":
        log_reward = log_reward + log_share
    if reward == "bonus":
        log_reward = torch.where(returns, log_reward + torch.tensor(BONUS).double().log(), log_reward)
    history = (one_hot(steps.clamp(min=0), dimensions) * taken[:, :, None]).flatten(start_dim=1).float()
    return StateGraph(
        features=torch.cat([grid.features[cell], history], dim=1) if sees_path else grid.features[cell],
        child=torch.where(allowed, child, state[:, None]),
        allowed=allowed,
        arrived_by=one_hot(last.clamp(min=0), dimensions).bool() & taken.any(dim=1, keepdim=True),
        log_reward=log_reward,
        outcome=state if reward == "bonus" else cell,
        is_mode=grid.is_mode[cell] if reward == "bonus" else grid.is_mode,
        longest=grid.longest,
    )


def _expand(grid: StateGraph) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Walks a grid breadth first without ever joining paths.

    Returns:
        Of each path: (S, longest) int64 its steps and −1 after them, (S,) its cell, (S,) float64 log of the
        uniform P_B along it, (S, A) int64 its continuations (−1 where not allowed); and S.
    """
    log_pb = grid.uniform_log_pb()
    steps = torch.full((1, grid.longest), -1)
    cell, log_share = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    levels, num_states = [], 1
    for t in range(grid.longest + 1):
        parent, action = grid.allowed[cell].nonzero(as_tuple=True)
        child = torch.full((cell.shape[0], grid.num_actions), -1)
        child[parent, action] = num_states + torch.arange(parent.shape[0])
        levels.append((steps, cell, log_share, child))
        num_states += parent.shape[0]
        steps = steps[parent]
        if t < grid.longest:
            steps[:, t] = action
        cell = grid.child[cell[parent], action]
        log_share = log_share[parent] + log_pb[cell, action]
    joined = [torch.cat(column) for column in zip(*levels, strict=True)]
    return joined[0], joined[1], joined[2], joined[3], num_states
