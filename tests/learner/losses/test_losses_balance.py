"""What the losses are for: zero at the policy that samples in proportion to R, and training gets there."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gflowvlm.learner.losses import LOSSES
from tests.learner.losses.support import WITH_FLOW, Rollout, extras, pad_rollouts

NAMES = sorted(LOSSES)


@dataclass
class Tree:
    """A rooted tree whose nodes are the states; at a leaf the environment forces the stop."""

    parent: list[int]
    log_reward: list[float]

    def children(self, node: int) -> list[int]:
        return [k for k, p in enumerate(self.parent) if p == node]

    def flow(self, node: int) -> float:
        """Z of the sub-tree."""
        return math.exp(self.log_reward[node]) + sum(self.flow(child) for child in self.children(node))

    def path(self, node: int) -> list[int]:
        return [node] if node == 0 else [*self.path(self.parent[node]), node]


def random_tree(seed: int, size: int) -> Tree:
    rng = random.Random(seed)
    return Tree([-1] + [rng.randrange(k) for k in range(1, size)], [rng.uniform(-4, 2) for _ in range(size)])


def perfect_rollouts(tree: Tree, instance: int) -> list[Rollout]:
    """Every trajectory of the tree, by the policy that samples x as R(x) / Z; each once more, cut off."""
    rollouts = []
    for end, stopped in itertools.product(range(len(tree.parent)), [True, False]):
        path = tree.path(end)
        flows = [tree.flow(node) for node in path]
        rollouts.append(
            Rollout(
                log_pf=[math.log(b / a) for a, b in itertools.pairwise(flows)],
                log_p_stop=[tree.log_reward[s] - math.log(f) for s, f in zip(path, flows, strict=True)],
                log_reward=[tree.log_reward[s] for s in path],
                log_pb=[0.0] * (len(path) - 1),
                stopped=stopped,
                instance=instance,
                log_z=math.log(tree.flow(0)),
                log_flow=[math.log(f) for f in flows],
            )
        )
    return rollouts


def loss_of(name: str, rollouts: list[Rollout], *, with_pb: bool = False) -> Tensor:
    batch = pad_rollouts(rollouts, with_pb=with_pb)
    return LOSSES[name](**batch, **extras(name, rollouts, batch)).loss


@pytest.mark.parametrize("name", NAMES)
def test_perfect_policy_on_trees_with_different_z_has_zero_loss(name: str) -> None:
    """Two instances in one batch: a variance across them, with their unequal Z, would not be zero."""
    rollouts = [r for g in range(2) for r in perfect_rollouts(random_tree(g, 8 + 16 * g), g)]
    assert abs(rollouts[0].log_z - rollouts[-1].log_z) > 0.1
    assert loss_of(name, rollouts).item() < 1e-20


@pytest.mark.parametrize("name", NAMES)
def test_imperfect_policy_has_positive_loss(name: str) -> None:
    rollouts = perfect_rollouts(random_tree(0, 12), 0)
    for r in rollouts:  # less probability for one of the root's stop and its transitions
        r.log_p_stop[0] -= 0.5
    assert rollouts[0].n == 0
    assert loss_of(name, rollouts).item() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_float32_sees_small_residuals_at_the_reward_floor(name: str) -> None:
    """A nearly perfect policy, log R and log Z around −1e4, where neighbouring float32 numbers are 1e-3 apart."""
    tree = random_tree(2, 24)
    # Multiples of 1/512: rounding to float32 at −1e4 must not move the rewards themselves.
    tree.log_reward = [round(x * 512) / 512 for x in tree.log_reward]
    rollouts = perfect_rollouts(tree, 0)
    rng = random.Random(0)
    for r in rollouts:
        r.log_pf = [x + rng.uniform(-0.01, 0.01) for x in r.log_pf]
        r.log_reward = [x - 1e4 for x in r.log_reward]
        r.log_z = round(r.log_z * 512) / 512 - 1e4
        r.log_flow = [round(x * 512) / 512 - 1e4 for x in r.log_flow]
    single = pad_rollouts(rollouts, dtype=torch.float32)
    single |= extras(name, rollouts, single)
    double = {key: value.double() if value.is_floating_point() else value for key, value in single.items()}
    for key in ("residual_abs_mean", "residual_abs_max"):
        expected = LOSSES[name](**double).metrics[key].item()
        assert 1e-3 < expected < 0.1
        assert LOSSES[name](**single).metrics[key].item() == pytest.approx(expected, abs=5e-6), key


@pytest.mark.parametrize("name", NAMES)
def test_perfect_policy_on_a_grid_with_a_uniform_backward_policy_has_zero_loss(name: str) -> None:
    """A 3 × 3 grid walked by +1 along either axis: no tree, so P_B counts."""
    side = 3
    states = [(x, y) for x in range(side) for y in range(side)]
    reward = {(x, y): math.exp(math.sin(3.0 * x + y)) for x, y in states}

    def backward(x: int, y: int) -> float:
        return 1 / ((x > 0) + (y > 0))

    def successors(x: int, y: int) -> list[tuple[int, int]]:
        return [(u, v) for u, v in ((x + 1, y), (x, y + 1)) if max(u, v) < side]

    flow: dict[tuple[int, int], float] = {}
    for s in reversed(states):
        flow[s] = reward[s] + sum(flow[c] * backward(*c) for c in successors(*s))

    def walks(s: tuple[int, int]) -> list[list[tuple[int, int]]]:
        return [[s]] + [[s, *rest] for c in successors(*s) for rest in walks(c)]

    rollouts = [
        Rollout(
            log_pf=[math.log(flow[b] * backward(*b) / flow[a]) for a, b in itertools.pairwise(walk)],
            log_p_stop=[math.log(reward[s] / flow[s]) for s in walk],
            log_reward=[math.log(reward[s]) for s in walk],
            log_pb=[math.log(backward(*b)) for b in walk[1:]],
            stopped=True,
            instance=0,
            log_z=math.log(flow[0, 0]),
            log_flow=[math.log(flow[s]) for s in walk],
        )
        for walk in walks((0, 0))
    ]
    assert math.exp(rollouts[0].log_z) == pytest.approx(sum(reward.values()))
    assert loss_of(name, rollouts, with_pb=True).item() < 1e-20
    assert loss_of(name, rollouts, with_pb=False).item() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_training_a_tabular_policy_reaches_the_reward_distribution(name: str) -> None:
    """All trajectories of a 7-state tree as the batch, from a uniform policy: total variation below 1 %."""
    tree = random_tree(5, 7)
    size = len(tree.parent)
    paths = [tree.path(end) for end in range(size)]
    batch = pad_rollouts(perfect_rollouts(tree, 0)[::2])
    # allowed[s, c]: c is a child of s; the column `size` is the stop action.
    allowed = torch.tensor([[tree.parent[c] == s for c in range(size)] + [True] for s in range(size)])
    logits = torch.zeros(size, size + 1, dtype=torch.float64, requires_grad=True)
    log_z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    # One log F (or log F̃) a state; its last column is only ever padding.
    log_flow = torch.zeros(size + 1, dtype=torch.float64, requires_grad=True)
    at_state = torch.tensor([[*path, *[size] * (batch["log_reward"].shape[1] - len(path))] for path in paths])
    optimiser = torch.optim.Adam([logits, log_z, log_flow], lr=0.1)

    def policy() -> tuple[Tensor, Tensor]:
        """(log_pf, log_p_stop) along every path."""
        log_p = torch.where(allowed, logits, -torch.inf).log_softmax(dim=1)
        log_pf, log_p_stop = torch.zeros_like(batch["log_pf"]), torch.zeros_like(batch["log_p_stop"])
        for k, path in enumerate(paths):
            log_pf[k, : len(path) - 1] = log_p[path[:-1], path[1:]]
            log_p_stop[k, : len(path)] = log_p[path, size]
        return log_pf, log_p_stop

    def total_variation() -> float:
        with torch.no_grad():
            log_pf, log_p_stop = policy()
            sampled = torch.stack(
                [f[:n].sum() + s[n] for f, s, n in zip(log_pf, log_p_stop, batch["length"], strict=True)]
            )
        target = torch.tensor(tree.log_reward, dtype=torch.float64).softmax(dim=0)
        return 0.5 * float((sampled.exp() - target).abs().sum())

    assert total_variation() > 0.1
    for _ in range(300):
        log_pf, log_p_stop = policy()
        inputs = batch | {"log_pf": log_pf, "log_p_stop": log_p_stop}
        if name == "tb":
            inputs["log_z"] = log_z.expand(size)
        if name in WITH_FLOW:
            inputs["log_flow"] = log_flow[at_state]
        optimiser.zero_grad()
        LOSSES[name](**inputs).loss.backward()
        optimiser.step()
    assert total_variation() < 0.01
