"""The proving ground's tree of walks is NumberLine's, with the target the preset trains towards."""

import math

import pytest
import torch

from gflowvlm.envs.numberline.target import log_reward, outcome_distribution, walks_by_end
from gflowvlm.envs.wording import comparisons
from gflowvlm.run.preset_library import load_preset
from gflowvlm.studies.proving.policy import Policy, imitate
from gflowvlm.studies.proving.state_graph import outcome_distribution as policy_distribution
from gflowvlm.studies.proving.state_graph import total_variation
from gflowvlm.studies.proving.training import Training, train
from gflowvlm.studies.proving.walks import HIGHEST, REWARD_EXPONENT, THOUGHT_COST, walk_tree


def ends(tree):
    """The number each walk ends on, and its number of moves, read from the features."""
    distance = tree.features[:, : 2 * HIGHEST + 1].argmax(dim=1) - HIGHEST
    moves = tree.features[:, 2 * HIGHEST + 1 : 2 * HIGHEST + 2 + tree.longest].argmax(dim=1)
    return distance, moves


def test_without_the_cost_of_thoughts_its_target_is_the_environments():
    tree = walk_tree(start=1, target=4, longest=6)
    distance, moves = ends(tree)
    weights = (tree.log_reward + THOUGHT_COST * (moves + 1).clamp(max=6)).exp()
    by_end = torch.zeros(HIGHEST + 1, dtype=torch.float64).index_add(0, distance + 4, weights)
    expected = outcome_distribution(walks_by_end(1, 0, HIGHEST, 6), 0, 4, REWARD_EXPONENT)
    assert {str(n): float(p) for n, p in enumerate(by_end / by_end.sum())} == pytest.approx(expected, rel=1e-9)


def test_its_numbers_are_those_of_the_default_preset():
    config = load_preset("numberline-tiny")
    assert config.target.reward_exponent == REWARD_EXPONENT
    assert REWARD_EXPONENT * log_reward(0, HIGHEST) > config.target.log_reward_floor, "it would concern walks"
    assert config.task.n_max == HIGHEST
    power = config.target.reference_weight / config.policy.cot_weight
    wordings = len(comparisons(1, 4))
    assert -config.policy.cot_weight * math.log(wordings * wordings**-power) == pytest.approx(THOUGHT_COST)


def test_every_walk_is_there_once_and_a_policy_sees_which():
    tree = walk_tree(longest=5)
    assert tree.num_states == 2**6 - 1
    assert tree.features.unique(dim=0).shape[0] == tree.num_states
    assert (tree.arrived_by.sum(dim=1) == 1).sum() == tree.num_states - 1
    parents = tree.child[tree.allowed]
    assert sorted(parents.tolist()) == list(range(1, tree.num_states))


def test_moves_lead_up_and_down_and_stay_within_the_numbers():
    tree = walk_tree(start=5, target=4, longest=3)
    distance, moves = ends(tree)
    up, down = tree.child[0].tolist()
    assert (distance[0], distance[up], distance[down]) == (1, 1, 0)
    assert (moves[0], moves[up], moves[down]) == (0, 1, 1)
    assert tree.is_mode.tolist() == (distance == 0).tolist()
    arrived = tree.arrived_by[tree.child[0]].tolist()
    assert arrived == [[True, False], [False, True]]


def test_imitation_reaches_the_start_policy_on_all_walks():
    tree = walk_tree()
    policy = Policy(tree, hidden=64, learned_backward=False, seed=0)
    imitate(policy, tree.start_policy)
    with torch.no_grad():
        reached = policy_distribution(tree, policy().log_pf)
    assert total_variation(reached, policy_distribution(tree, tree.start_policy.log())) < 0.02


def test_training_goes_on_from_the_start_policy_towards_the_target():
    tree = walk_tree(longest=6)
    curve = list(
        train(tree, Training("var_tb", trajectories=3_200, batch_size=32, learning_rate=3e-3, evaluations=2), 0)
    )
    at_start = total_variation(policy_distribution(tree, tree.start_policy.log()), tree.target)
    assert curve[0].total_variation == pytest.approx(at_start, abs=0.02)
    assert curve[-1].total_variation < at_start / 2
