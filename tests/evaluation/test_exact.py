import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch

from gflowvlm.envs.base import TaskEnv
from gflowvlm.envs.blackjack.settings import BlackjackSettings
from gflowvlm.envs.numberline.settings import NumberLineSettings
from gflowvlm.envs.numbersequence.settings import NumberSequenceSettings
from gflowvlm.envs.registry import make_env
from gflowvlm.evaluation.action_tree import MAX_STATES, expand_tree, tree_size
from gflowvlm.evaluation.exact import (
    ActionProbabilities,
    action_probabilities,
    state_probabilities,
)
from gflowvlm.evaluation.exact_match import exact_match, log_thought_factors, mean_match
from gflowvlm.learner.losses import LOSSES
from gflowvlm.learner.model import load_base_model
from gflowvlm.learner.packing import ScoredStep
from gflowvlm.learner.scoring import Scorer
from gflowvlm.learner.tiny_policy import build_tiny_policy
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.response import DONE_TOKEN
from tests.shared.json_answers import format_response

BETA = 3.0
SAMPLES = 2


@pytest.fixture
def env():
    env = make_env(NumberLineSettings(max_steps=4))
    env.reset(seed=3)
    return env


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.set_num_threads(1)
    return str(build_tiny_policy(tmp_path_factory.mktemp("tiny"), seed=2))


def perfect(states):
    """The policy that samples action sequences as R^beta / Z."""
    flow = {}
    for state in reversed(states):
        below = sum(flow[(*state.actions, a)] for a in state.responses)
        flow[state.actions] = math.exp(BETA * state.log_reward) + below
    return [
        None
        if s.forced
        else ActionProbabilities(
            {
                DONE_TOKEN: math.exp(BETA * s.log_reward) / flow[s.actions],
                **{a: flow[(*s.actions, a)] / flow[s.actions] for a in s.responses},
            },
            uncovered=0.0,
        )
        for s in states
    ]


def test_the_tree_holds_every_action_sequence_once_with_what_stopping_there_gives(env):
    states = expand_tree(env)
    walks = [w for n in range(5) for w in itertools.product("+-", repeat=n)]
    assert sorted(s.actions for s in states) == sorted(walks)
    assert len(states) == tree_size(env) == 31
    for state in states:
        env.reset(seed=3)
        for action in state.actions:
            env.step(action)
        assert (state.prompt, state.image, state.outcome) == (env.prompt(), env.image_png(), env.outcome)
        assert state.log_reward == env.log_reward
        assert state.forced == (len(state.actions) == 4) == (not state.responses)
        assert state.solved == (env.current == env.target)


def test_a_perfect_policy_matches_the_target_of_the_environment(env):
    states = expand_tree(env)
    match = exact_match(states, perfect(states), BETA, None, SAMPLES)
    for distance in ("total_variation", "jensen_shannon", "sequence_total_variation", "sequence_jensen_shannon"):
        assert getattr(match, distance) == pytest.approx(0.0, abs=1e-12)
    env.reset(seed=3)
    assert match.success == pytest.approx(env.target_success(BETA))


def test_the_aim_has_the_floor_of_the_log_reward_and_the_target_has_none(env):
    states = expand_tree(env)
    floor = max(BETA * state.log_reward for state in states) + 1.0
    no_thoughts = [0.0] * len(states)
    free, floored = (exact_match(states, perfect(states), BETA, no_thoughts, SAMPLES, f) for f in (-math.inf, floor))
    assert free.aim_sequence_total_variation == pytest.approx(0.0, abs=1e-12)
    # With all rewards at the floor the aim is uniform over the sequences.
    chances = [math.exp(BETA * state.log_reward) for state in states]
    uniform = sum(abs(chance / sum(chances) - 1 / len(chances)) for chance in chances) / 2
    assert floored.aim_sequence_total_variation == pytest.approx(uniform)
    assert floored.sequence_total_variation == free.sequence_total_variation


def test_div_at_n_is_that_of_all_that_can_be_sampled(env):
    """Brute force: every pair of sequences, with its probability."""
    states = expand_tree(env)
    uniform = [
        None if s.forced else ActionProbabilities(dict.fromkeys((DONE_TOKEN, *s.responses), 1 / 3), uncovered=0.0)
        for s in states
    ]
    match = exact_match(states, uniform, BETA, None, SAMPLES)
    # A walk has a third for each of its actions and for its stop, which at the step limit is forced.
    chance = {s.actions: 3.0 ** -(len(s.actions) + (not s.forced)) for s in states}
    solved = {s.actions for s in states if s.solved}
    different = some = 0.0
    for pair in itertools.product(chance, repeat=SAMPLES):
        found = len(solved & set(pair))
        different += found * math.prod(chance[actions] for actions in pair)
        some += (found > 0) * math.prod(chance[actions] for actions in pair)
    assert match.div_at_n == pytest.approx(different / some)
    assert exact_match(states, perfect(states), BETA, None, SAMPLES).div_at_n == pytest.approx(match.target_div_at_n)
    nowhere = [None if p is None else ActionProbabilities({}, uncovered=1.0) for p in uniform]
    assert exact_match(states, nowhere, BETA, None, SAMPLES).div_at_n == 0.0


@pytest.mark.parametrize("settings", [BlackjackSettings(), NumberSequenceSettings(continuation=2)])
def test_the_trees_of_other_tasks_are_small_and_match_their_target(settings):
    env = make_env(settings)
    for seed in range(4):
        env.reset(seed=seed)
        states = expand_tree(env)
        assert len(states) == tree_size(env) < 100
        assert any(s.forced for s in states)
        match = exact_match(states, perfect(states), BETA, None, SAMPLES)
        assert match.total_variation == pytest.approx(0.0, abs=1e-12)
        assert match.success == pytest.approx(env.target_success(BETA))


def test_counting_the_states_of_a_huge_tree_ends():
    env = make_env(NumberLineSettings(max_steps=64))
    env.reset(seed=0)
    assert tree_size(env) == MAX_STATES + 1


def test_the_tree_of_a_task_without_a_target_is_not_walked(monkeypatch):
    env = make_env(BlackjackSettings())
    env.reset(seed=0)
    assert tree_size(env) < 100
    monkeypatch.setattr(env, "target_distribution", lambda beta: None)
    monkeypatch.delattr(TaskEnv, "branch")
    assert tree_size(env) > MAX_STATES


def test_mass_that_gets_lost_counts_as_distance(env):
    states = expand_tree(env)
    leaky = [
        None if p is None else ActionProbabilities({a: 0.9 * q for a, q in p.of.items()}, uncovered=0.1)
        for p in perfect(states)
    ]
    match = exact_match(states, leaky, BETA, None, SAMPLES)
    stops_at_once = perfect(states)[0].of[DONE_TOKEN]
    assert 0.1 <= match.uncovered < 1
    assert match.uncovered > 0.1 + 0.09 * (1 - stops_at_once) - 1e-12
    assert match.total_variation >= match.uncovered - 1e-12
    assert 0 < match.jensen_shannon <= math.log(2)


def test_probabilities_of_actions_are_sums_over_the_chains_of_thought(env, tiny):
    inputs = PolicyInputs.load(tiny)
    model = load_base_model(tiny, "float32").eval()
    scorer = Scorer(model, inputs, torch.device("cpu"), token_budget=4000)
    states = expand_tree(env)
    done = []
    found = action_probabilities(states, scorer, inputs, done.append)
    assert sum(done) == pytest.approx(1.0)
    assert [given is None for given in found] == [state.forced for state in states]
    for state, given in itertools.islice(zip(states, found, strict=True), 3):
        assert set(given.of) == {"+", "-", DONE_TOKEN}
        total = stopping = 0.0
        for response in state.responses["+"]:
            # One response alone, by the scorer that the learner trains with.
            ids = inputs.encode_response(response)
            layout = inputs.read(ids).layout
            step = ScoredStep(state.prompt, state.image, ids, layout.cot_end, layout.action_end, layout.stop_ids)
            with torch.no_grad():
                scores = scorer.score_steps(scorer.pack([step])[0])
            total += float((scores.log_cot + scores.log_act).double().exp())
            stopping += float((scores.log_cot + scores.log_stop).double().exp())
        assert given.of["+"] == pytest.approx(total, rel=1e-4)
        assert given.of[DONE_TOKEN] == pytest.approx(stopping, rel=1e-4)
        assert given.uncovered == pytest.approx(1 - sum(given.of.values()))


def test_sampled_thoughts_count_once_with_their_own_probability_where_demonstrations_leave_much_out(env, tiny):
    inputs = PolicyInputs.load(tiny)
    scorer = Scorer(load_base_model(tiny, "float32").eval(), inputs, torch.device("cpu"), token_budget=4000)
    root = expand_tree(env)[0]
    root = replace(root, responses={action: responses[:1] for action, responses in root.responses.items()})
    odd = format_response("-", "odd")
    asked = []

    def sample_thoughts(some):
        asked.append([state.actions for state in some])
        return [[odd, odd.replace('"-"', '"+"'), root.responses["+"][0], "no response", odd] for _ in some]

    def score(response):
        ids = inputs.encode_response(response)
        layout = inputs.read(ids).layout
        with torch.no_grad():
            step = ScoredStep(root.prompt, root.image, ids, layout.cot_end, layout.action_end)
            scores = scorer.score_steps(scorer.pack([step])[0])
        return float(scores.log_cot.double().exp()), float(scores.log_act.double().exp())

    (plain,), (more,) = (
        state_probabilities([root], [1.0], scorer, inputs, sampler) for sampler in (None, sample_thoughts)
    )
    assert asked == [[()]]
    cot, act = score(odd)
    assert len(more.thoughts) == len(plain.thoughts) + 1 == 2
    assert more.thoughts[-1] == pytest.approx(cot, rel=1e-4)
    assert more.of["-"] - plain.of["-"] == pytest.approx(cot * act, rel=1e-4)
    assert plain.uncovered - more.uncovered == pytest.approx(sum(more.of.values()) - sum(plain.of.values()))
    # Nothing is sampled at a state that is hardly ever come to.
    assert state_probabilities([root], [1e-6], scorer, inputs, sample_thoughts) == [plain]
    assert len(asked) == 1


def test_what_is_left_out_are_the_rarest_states_and_no_more_mass_than_was_allowed(env, tiny, monkeypatch):
    inputs = PolicyInputs.load(tiny)
    scorer = Scorer(load_base_model(tiny, "float32").eval(), inputs, torch.device("cpu"), token_budget=4000)
    states = expand_tree(env)
    whole = action_probabilities(states, scorer, inputs, lambda _: None)
    reach = {(): 1.0}
    for state, given in zip(states, whole, strict=True):
        for action in state.responses:
            reach[(*state.actions, action)] = reach[state.actions] * given.of[action]
    inner = [reach[s.actions] for s in states if not s.forced and s.actions]
    allowed = 0.5 * sum(sorted(inner)[: len(inner) // 2])
    monkeypatch.setattr("gflowvlm.evaluation.exact._STATES_AT_ONCE", 1)
    done = []
    part = action_probabilities(states, scorer, inputs, done.append, allowed)
    assert sum(done) == pytest.approx(1.0)
    left_out = [s for s, given in zip(states, part, strict=True) if given is not None and not given.of]
    assert left_out
    at_the_edge = [reach[s.actions] for s in left_out if s.actions[:-1] not in {o.actions for o in left_out}]
    assert sum(at_the_edge) <= allowed
    for given, expected in zip(part, whole, strict=True):
        if given is not None and given.of:
            assert given.of == pytest.approx(expected.of, rel=1e-4)
    exact, bounded = (exact_match(states, found, BETA, None, SAMPLES) for found in (whole, part))
    assert bounded.uncovered <= exact.uncovered + allowed + 1e-9
    assert abs(bounded.total_variation - exact.total_variation) <= allowed + 1e-9


def test_figures_of_several_instances_are_averaged(env):
    states = expand_tree(env)
    match = exact_match(states, perfect(states), BETA, None, SAMPLES)
    other = exact_match(states, perfect(states), BETA + 1, None, SAMPLES)
    assert mean_match([match, other]).total_variation == pytest.approx(other.total_variation / 2)


GAMMA, ALPHA = 0.4, 1.0


@dataclass
class Thinking:
    """A policy with chains of thought on a tree, at the minimum of the losses for a random reference policy."""

    log_reference: dict
    log_thought: dict
    log_action: dict


def at_the_minimum(states, thoughts, seed):
    draw = torch.Generator().manual_seed(seed)
    flow, best = {}, Thinking({}, {}, {})
    for state in reversed(states):
        reward = BETA * state.log_reward
        if state.forced:
            flow[state.actions] = reward
            continue
        reference = torch.rand(thoughts, generator=draw, dtype=torch.float64).log_softmax(0)
        below = {a: flow[(*state.actions, a)] for a in state.responses} | {DONE_TOKEN: reward}
        total = torch.logsumexp(torch.tensor(list(below.values()), dtype=torch.float64), 0)
        best.log_reference[state.actions] = reference
        best.log_action[state.actions] = {a: f - float(total) for a, f in below.items()}
        thought = (ALPHA * reference + total) / GAMMA
        flow[state.actions] = float(GAMMA * thought.logsumexp(0))
        best.log_thought[state.actions] = thought.log_softmax(0)
    return best, flow[()]


def every_trajectory(states, policy, thoughts):
    """The losses' inputs for every sequence of thoughts and actions."""
    rewards = {s.actions: BETA * s.log_reward for s in states}
    length, paths, stops, log_rewards = [], [], [], []
    most = max(len(s.actions) for s in states)
    for state in states:
        n = len(state.actions)
        visited = [state.actions[:k] for k in range(n + 1)]
        for thought in itertools.product(range(thoughts), repeat=n + (not state.forced)):
            said = [
                GAMMA * policy.log_thought[z][c] - ALPHA * policy.log_reference[z][c]
                for z, c in zip(visited, thought, strict=False)
            ]
            path = [x + policy.log_action[z][a] for x, z, a in zip(said, visited, state.actions, strict=False)]
            stop = [x + policy.log_action[z][DONE_TOKEN] for x, z in zip(said, visited, strict=False)]
            length.append(n)
            paths.append(path + [math.nan] * (most - n))
            stops.append(stop + [0.0] * state.forced + [math.nan] * (most - n))
            log_rewards.append([rewards[z] for z in visited] + [math.nan] * (most - n))
    return {
        "log_pf": torch.tensor(paths, dtype=torch.float64),
        "log_p_stop": torch.tensor(stops, dtype=torch.float64),
        "log_reward": torch.tensor(log_rewards, dtype=torch.float64),
        "length": torch.tensor(length),
        "stopped": torch.ones(len(length), dtype=torch.bool),
        "instance": torch.zeros(len(length), dtype=torch.int64),
    }


def test_what_training_aims_at_is_where_every_loss_is_zero():
    env = make_env(NumberLineSettings(max_steps=3))
    env.reset(seed=3)
    states = expand_tree(env)
    policy, log_z = at_the_minimum(states, thoughts=2, seed=0)
    inputs = every_trajectory(states, policy, thoughts=2)
    for name in ("var_tb", "db", "subtb", "tb"):
        given = {"log_z": torch.full((len(inputs["length"]),), log_z, dtype=torch.float64)} if name == "tb" else {}
        assert float(LOSSES[name](**inputs, **given).loss) == pytest.approx(0.0, abs=1e-18), name

    def probabilities(log_thought):
        return [
            None
            if s.forced
            else ActionProbabilities(
                {a: math.exp(x) for a, x in policy.log_action[s.actions].items()},
                uncovered=0.0,
                thoughts=log_thought[s.actions].exp().tolist(),
            )
            for s in states
        ]

    factors = log_thought_factors(probabilities(policy.log_reference), ALPHA, GAMMA)
    match = exact_match(states, probabilities(policy.log_thought), BETA, factors, SAMPLES)
    assert match.aim_total_variation == pytest.approx(0.0, abs=1e-12)
    assert match.aim_sequence_total_variation == pytest.approx(0.0, abs=1e-12)
    assert match.aim_div_at_n == pytest.approx(match.div_at_n)
    # Longer walks cost more than in R^beta / Z, which a policy that matches that one shows too.
    assert match.sequence_total_variation > 0.01
    assert exact_match(states, perfect(states), BETA, factors, SAMPLES).aim_sequence_total_variation == pytest.approx(
        match.sequence_total_variation
    )


def test_equal_weights_of_policy_and_reference_aim_at_the_target_itself(env):
    states = expand_tree(env)
    factors = log_thought_factors(perfect(states), 0.4, 0.4)
    match = exact_match(states, perfect(states), BETA, factors, SAMPLES)
    assert match.aim_sequence_total_variation == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.2, 0.4), (0.0, 0.4), (1.0, 0.0)])
def test_what_training_aims_at_is_not_known_where_undemonstrated_thoughts_decide_it(env, alpha, gamma):
    states = expand_tree(env)
    assert log_thought_factors(perfect(states), alpha, gamma) is None
    match = exact_match(states, perfect(states), BETA, None, SAMPLES)
    assert match.aim_total_variation is None
    assert mean_match([match, match]).aim_total_variation is None


def test_what_training_aims_at_is_not_known_where_the_reference_says_nothing_that_is_demonstrated(env):
    states = expand_tree(env)
    never = [None if given is None else ActionProbabilities({}, uncovered=1.0) for given in perfect(states)]
    assert log_thought_factors(never, 1.0, 0.4) is None
