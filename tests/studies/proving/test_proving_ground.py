"""The proving ground's exact figures are exact, and its perfect policies are perfect."""

import itertools
import math
from collections import Counter

import pytest
import torch

from gflowvlm.learner.losses import LOSSES
from gflowvlm.studies.proving.experiments import EXPERIMENTS, PROBLEMS, quick
from gflowvlm.studies.proving.hypergrid import BONUS, grid_cells, hypergrid, mode_reward, path_tree
from gflowvlm.studies.proving.policy import Policy, PolicyTable
from gflowvlm.studies.proving.rollouts import Sampler, loss_inputs
from gflowvlm.studies.proving.state_graph import jensen_shannon, outcome_distribution, perfect_policy, total_variation
from gflowvlm.studies.proving.training import Training, batch_loss, train

GRAPHS = {
    "grid": lambda: hypergrid(2, 8),
    "grid-4d": lambda: hypergrid(4, 3),
    "additive": lambda: hypergrid(2, 5, reward="additive"),
    "paths": lambda: path_tree(2, 4),
    "paths-whole": lambda: path_tree(2, 4, reward="whole"),
    "paths-bonus": lambda: path_tree(2, 4, reward="bonus"),
}


def some_policy(graph, seed=0):
    """A policy with random weights, far from uniform."""
    policy = Policy(graph, hidden=16, learned_backward=True, seed=seed)
    with torch.no_grad():
        policy.layers[-1].weight.mul_(6)
        return policy()


def enumerated(graph, log_policy):
    """Outcome probabilities by walking every single trajectory."""
    policy = log_policy.double().exp().tolist()
    reached = [0.0] * graph.is_mode.shape[0]

    def walk(state, probability):
        reached[graph.outcome[state]] += probability * policy[state][-1]
        for action in range(graph.num_actions):
            if graph.allowed[state, action]:
                walk(int(graph.child[state, action]), probability * policy[state][action])

    walk(0, 1.0)
    return torch.tensor(reached, dtype=torch.float64)


@pytest.mark.parametrize("graph", [hypergrid(2, 3), hypergrid(3, 3), path_tree(2, 3)], ids=["2-D", "3-D", "paths"])
def test_the_exact_distribution_is_that_of_all_trajectories_walked_one_by_one(graph):
    log_policy = some_policy(graph).log_pf
    exact = outcome_distribution(graph, log_policy)
    assert exact.sum().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(exact, enumerated(graph, log_policy), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["grid", "paths"])
def test_sampled_frequencies_agree_with_the_exact_distribution(name):
    graph = GRAPHS[name]()
    table = some_policy(graph)
    count = 20_000
    rollouts = Sampler(graph, torch.Generator().manual_seed(0)).sample(table.log_pf, count)
    last = rollouts.state.gather(1, rollouts.length[:, None]).squeeze(1)
    seen = torch.zeros(graph.is_mode.shape[0], dtype=torch.float64)
    seen.index_add_(0, graph.outcome[last], torch.full((count,), 1 / count, dtype=torch.float64))
    exact = outcome_distribution(graph, table.log_pf)
    deviation = (exact * (1 - exact) / count).sqrt()
    assert ((seen - exact).abs() <= 5 * deviation + 2 / count).all()


def test_samples_are_walks_of_the_graph_that_the_seed_repeats():
    graph = hypergrid(3, 4)
    table = some_policy(graph)

    def draw(seed):
        return Sampler(graph, torch.Generator().manual_seed(seed)).sample(table.log_pf, 200, exploration=0.5)

    rollouts = draw(1)
    assert rollouts.stopped.all()
    assert rollouts.action.shape[1] == rollouts.length.max()
    for states, actions, length in zip(rollouts.state, rollouts.action, rollouts.length, strict=True):
        assert states[0] == 0
        for t in range(int(length)):
            assert graph.allowed[states[t], actions[t]]
            assert graph.child[states[t], actions[t]] == states[t + 1]
    assert torch.equal(rollouts.state, draw(1).state)
    assert not torch.equal(rollouts.state[:, :2], draw(2).state[:, :2])


@pytest.mark.parametrize("problem", GRAPHS)
@pytest.mark.parametrize("backward", ["uniform", "random"])
def test_a_perfect_policy_has_the_target_distribution_and_no_loss(problem, backward):
    graph = GRAPHS[problem]()
    log_pb = graph.uniform_log_pb() if backward == "uniform" else some_policy(graph).log_pb.double()
    log_pf, log_flow = perfect_policy(graph, log_pb)
    assert log_flow[0].item() == pytest.approx(graph.log_z, abs=1e-6)
    assert log_pf.exp().sum(dim=1) == pytest.approx(1, abs=1e-12)
    if backward == "uniform":
        assert total_variation(outcome_distribution(graph, log_pf), graph.target) < 1e-9

    sampler = Sampler(graph, torch.Generator().manual_seed(0))
    whole = sampler.sample(log_pf, 64, exploration=0.5)
    for rollouts in (whole, sampler.cut_off(whole, 0.5)):
        for name in LOSSES:
            flow = log_flow - graph.log_reward if name.startswith("fl_") else log_flow
            inputs = loss_inputs(PolicyTable(log_pf, log_pb, flow), rollouts.state, graph.log_reward, rollouts)
            loss = batch_loss(name, inputs, log_z=log_flow[0], subtb_lambda=0.9)
            assert loss.item() < (1e-18 if backward == "uniform" else 1e-10), name
            wrong = PolicyTable(some_policy(graph, 1).log_pf.double(), log_pb, flow)
            inputs = loss_inputs(wrong, rollouts.state, graph.log_reward, rollouts)
            assert batch_loss(name, inputs, log_z=log_flow[0], subtb_lambda=0.9).item() > 1e-3, name


@pytest.mark.parametrize("problem", GRAPHS)
@pytest.mark.parametrize("learned", [False, True])
def test_the_backward_policy_sums_to_one_over_the_parents_of_a_state(problem, learned):
    graph = GRAPHS[problem]()
    log_pb = some_policy(graph).log_pb if learned else graph.uniform_log_pb()
    share = torch.zeros(graph.num_states, dtype=torch.float64)
    for parent, action in graph.allowed.nonzero():
        child = graph.child[parent, action]
        assert graph.arrived_by[child, action]
        share[child] += log_pb[child, action].double().exp()
    assert not graph.arrived_by[0].any()
    assert share[1:] == pytest.approx(1, abs=1e-6)


def test_the_reward_of_the_8_by_8_grid_is_the_published_one():
    log_reward, is_mode = mode_reward(grid_cells(2, 8), 8)
    reward = log_reward.exp().reshape(8, 8)
    assert {(x, y) for x, y in itertools.product(range(8), repeat=2) if is_mode.reshape(8, 8)[x, y]} == {
        (1, 1),
        (1, 6),
        (6, 1),
        (6, 6),
    }
    assert reward[1, 6].item() == pytest.approx(2.6)
    assert reward[0, 1].item() == pytest.approx(0.6)
    assert reward[0, 3].item() == pytest.approx(0.1)
    assert math.exp(hypergrid(2, 8).log_z) == pytest.approx(4 * 2.6 + 12 * 0.6 + 48 * 0.1)
    assert int(hypergrid(4, 8).is_mode.sum()) == 16


@pytest.mark.parametrize("reward", ["additive", "additive-far"])
def test_an_additive_energy_is_the_sum_of_its_steps_whatever_their_order(reward):
    log_reward = hypergrid(2, 5, reward=reward).log_reward.reshape(5, 5)
    assert log_reward[0, 0].item() == 0
    for x, y in itertools.product(range(5), repeat=2):
        assert log_reward[x, y].item() == pytest.approx((log_reward[x, 0] + log_reward[0, y]).item(), abs=1e-12)


def test_the_mass_of_the_far_energy_lies_farther_from_the_start():
    steps = grid_cells(2, 8).sum(dim=1).double()
    near, far = ((hypergrid(2, 8, reward=reward).target * steps).sum() for reward in ("additive", "additive-far"))
    assert far > near + 2


@pytest.mark.parametrize("side", [3, 4, 5])
def test_the_tree_has_every_path_of_the_grid_once(side):
    tree = path_tree(2, side)
    paths = Counter(tree.outcome.tolist())
    for cell, (x, y) in enumerate(grid_cells(2, side).tolist()):
        assert paths[cell] == math.comb(x + y, x)
    assert tree.num_states == math.comb(2 * side, side) - 1
    assert tree.features.unique(dim=0).shape[0] == tree.num_states
    assert (tree.arrived_by.sum(dim=1) == 1).sum() == tree.num_states - 1


def test_the_reward_of_a_cell_is_divided_among_its_paths_or_given_to_each():
    side = 4
    grid = hypergrid(2, side)
    divided, whole = path_tree(2, side), path_tree(2, side, reward="whole")
    torch.testing.assert_close(divided.target, grid.target, rtol=0, atol=1e-12)
    x, y = grid_cells(2, side).unbind(1)
    paths = torch.tensor([math.comb(int(a + b), int(a)) for a, b in zip(x, y, strict=True)], dtype=torch.float64)
    weighted = grid.log_reward.exp() * paths
    torch.testing.assert_close(whole.target, weighted / weighted.sum(), rtol=0, atol=1e-12)


def test_a_path_that_ends_in_the_direction_it_began_in_gets_the_bonus():
    plain, bonus = path_tree(2, 3), path_tree(2, 3, reward="bonus")
    factor = (bonus.log_reward - plain.log_reward).exp()
    history = plain.features[:, 6:].reshape(-1, 4, 2)
    for path, row in zip(history, factor, strict=True):
        steps = [int(step.argmax()) for step in path if step.any()]
        assert row.item() == pytest.approx(BONUS if steps and steps[0] == steps[-1] else 1)


def test_divergences_are_zero_for_equals_and_largest_for_strangers():
    p, q = torch.tensor([0.5, 0.5, 0.0]).double(), torch.tensor([0.0, 0.0, 1.0]).double()
    assert total_variation(p, p) == 0
    assert jensen_shannon(p, p) == pytest.approx(0, abs=1e-15)
    assert total_variation(p, q) == 1
    assert jensen_shannon(p, q) == pytest.approx(math.log(2))


def test_a_share_of_the_trajectories_is_cut_off_before_its_stop():
    graph = hypergrid(2, 8)
    sampler = Sampler(graph, torch.Generator().manual_seed(0))
    whole = sampler.sample(some_policy(graph).log_pf, 2000, exploration=1.0)
    cut = sampler.cut_off(whole, 0.75)
    assert (~cut.stopped).double().mean().item() == pytest.approx(0.75, abs=0.05)
    assert (cut.length <= whole.length).all()
    assert torch.equal(cut.length[cut.stopped], whole.length[cut.stopped])
    assert (cut.length[whole.length > 0] > 0).all()
    assert not sampler.cut_off(whole, 1.0).stopped.any()


@pytest.mark.parametrize("loss", ["tb", "subtb", "fl_subtb"])
def test_a_short_training_nears_the_target(loss):
    training = Training(loss, trajectories=2400, hidden=32, evaluations=2)
    curve = list(train(hypergrid(2, 4), training, seed=0))
    assert [point.trajectories for point in curve] == [0, 1200, 2400]
    assert curve[0].total_variation > 0.3
    assert curve[-1].total_variation < 0.1


@pytest.mark.parametrize("one_pass_states", [0, 512])
def test_a_training_repeats_itself_and_its_modes_are_counted(one_pass_states, monkeypatch):
    monkeypatch.setattr("gflowvlm.studies.proving.training.ONE_PASS_STATES", one_pass_states)

    def run(seed):
        curve = train(hypergrid(2, 8), Training("db", trajectories=160, evaluations=1, exploration=1.0), seed)
        return [(point.total_variation, point.modes) for point in curve]

    assert run(0) == run(0)
    assert run(0) != run(1)
    assert run(0)[0][1] == 0
    assert run(0)[-1][1] > 0


def test_evaluating_visited_states_alone_trains_the_same_policy(monkeypatch):
    graph, training = hypergrid(2, 5), Training("fl_subtb", trajectories=160, evaluations=1, learned_backward=True)
    whole = list(train(graph, training, seed=0))[-1]
    monkeypatch.setattr("gflowvlm.studies.proving.training.ONE_PASS_STATES", 0)
    visited = list(train(graph, training, seed=0))[-1]
    assert visited.total_variation == pytest.approx(whole.total_variation, abs=1e-4)


def test_a_backward_policy_can_be_learned_along():
    training = Training("subtb", trajectories=1200, hidden=32, evaluations=1, learned_backward=True)
    assert list(train(hypergrid(2, 4), training, seed=0))[-1].total_variation < 0.15


def test_every_experiment_names_problems_and_losses_that_exist_and_labels_once():
    for name, experiment in EXPERIMENTS.items():
        labels = [case.label for case in experiment.cases]
        assert len(set(labels)) == len(labels)
        for case in experiment.cases:
            assert case.experiment == name
            assert case.problem in PROBLEMS
            assert case.training.loss in LOSSES
            assert quick(case).training.trajectories == min(4000, case.training.trajectories)
