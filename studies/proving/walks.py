"""NumberLine's tree of walks as a state graph: the VLM's own problem, with everything but the objective made exact.

A state is the sequence of moves (P_B = 1), its reward NumberLine's; the policy starts from a weak player as the VLM
does. What a loss does here is the loss's doing, not the model's, the samplers' or the replay buffer's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from gflowvlm.studies.proving.state_graph import StateGraph

HIGHEST = 5
"""Numbers are 0..HIGHEST; a move past either end changes nothing."""

REWARD_EXPONENT = 8.0
"""β of the preset numberline-tiny. Its floor of log R^β is below every walk's."""

THOUGHT_COST = 0.4 * 1.5 * math.log(3)
"""−log κ, nats a response, of that preset: α = 1, γ = 0.4, three wordings alike (evaluation/exact_match.py)."""

START_NOISE = 0.6
"""Share of its moves that the start policy draws uniformly; the others are the expert's."""


def walk_tree(start: int = 1, target: int = 4, longest: int = 10) -> StateGraph:
    """Returns the tree of all walks: + and −, at most `longest` of them; outcomes are walks, modes end on the target.

    log R = β log(100 / (|target − current| + 1)), less `THOUGHT_COST` for every response. It is shifted so that
    Z = 1: the VLM's heads, too, start at an estimate of what they learn.

    Args:
        start: The first number.
        target: The number to reach.
        longest: Moves after which stopping is forced, so that it needs no response.

    Returns:
        The graph of 2^(longest + 1) − 1 states. A policy sees the distance to the target, the moves made, and which.
    """
    steps, current = _walks(start, longest)
    taken = steps >= 0
    moves = taken.sum(dim=1)
    state = torch.arange(steps.shape[0])
    goes_on = (moves < longest)[:, None].expand(-1, 2)
    last = steps[state, (moves - 1).clamp(min=0)].clamp(min=0)
    log_reward = REWARD_EXPONENT * (math.log(100) - ((current - target).abs().double() + 1).log())
    log_reward = log_reward - THOUGHT_COST * (moves + 1).clamp(max=longest)
    history = (one_hot(steps.clamp(min=0), 2) * taken[:, :, None]).flatten(start_dim=1)
    distance = one_hot(current - target + HIGHEST, 2 * HIGHEST + 1)
    return StateGraph(
        features=torch.cat([distance, one_hot(moves, longest + 1), history], dim=1).float(),
        child=torch.where(goes_on, 2 * state[:, None] + torch.tensor([1, 2]), state[:, None]),
        allowed=goes_on,
        arrived_by=one_hot(last, 2).bool() & taken.any(dim=1, keepdim=True),
        log_reward=log_reward - log_reward.logsumexp(0),
        outcome=state,
        is_mode=current == target,
        longest=longest,
        start_policy=_weak_policy(current, target, goes_on),
    )


def _walks(start: int, longest: int) -> tuple[Tensor, Tensor]:
    """Lists the walks in the order of a binary heap.

    Returns:
        Of each walk: (S, longest) its moves (0: +, 1: −, −1 after them), (S,) the number it ends on.
    """
    steps, current = torch.full((1, longest), -1), torch.tensor([start])
    levels = [(steps, current)]
    for t in range(longest):
        move = torch.tensor([0, 1]).repeat(current.shape[0])
        steps = steps.repeat_interleave(2, dim=0)
        steps[:, t] = move
        current = (current.repeat_interleave(2) + 1 - 2 * move).clamp(0, HIGHEST)
        levels.append((steps, current))
    return torch.cat([level[0] for level in levels]), torch.cat([level[1] for level in levels])


def _weak_policy(current: Tensor, target: int, goes_on: Tensor) -> Tensor:
    """Returns (S, 3) probabilities of +, − and stop: `START_NOISE` uniform, the rest the expert's."""
    expert = torch.where(current == target, 2, (current > target).long())
    mixed = START_NOISE / 3 + (1 - START_NOISE) * one_hot(expert, 3)
    allowed = torch.cat([goes_on, torch.ones_like(goes_on[:, :1])], dim=1)
    mixed = mixed * allowed
    return mixed / mixed.sum(dim=1, keepdim=True)
