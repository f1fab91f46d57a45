from dataclasses import replace

import numpy as np
import pytest

from gflowvlm.envs.blackjack.settings import BlackjackSettings
from gflowvlm.envs.numberline.environment import NumberLineEnv
from gflowvlm.envs.numbersequence.settings import NumberSequenceSettings
from gflowvlm.envs.registry import make_env
from gflowvlm.evaluation.metrics import (
    EvaluationPlan,
    div_at_n,
    evaluate_trajectories,
    mean_interval,
    noise_floor,
    total_variation,
)
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.metrics import EVALUATION_METRICS
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.trajectory import EndReason, Step, Trajectory, Validity

CONFIG = RunConfig()


def played(seed, actions, split="id", config=CONFIG):
    """The trajectory of an action sequence in the real environment; None is a malformed response."""
    env = make_env(config.task)
    env.reset(seed=seed, options={"split": split})
    log_rewards, steps, rewards = [env.log_reward], [], []
    for action in actions:
        validity = Validity.VALID
        if action is None:
            validity = Validity.MALFORMED
        elif action not in env.admissible_actions:
            validity = Validity.INADMISSIBLE
        _, reward, *_ = env.step(action if action is not None else "")
        rewards.append(reward)
        steps.append(Step("p", 0, [1, 2], "r", 0, 1, [0.0, 0.0], 1, action, validity))
        if env.end is not EndReason.DONE:
            log_rewards.append(env.log_reward)
        if env.end is not None:
            break
    return Trajectory(
        trajectory_id=f"{seed}-{actions}",
        group_id="g",
        instance_id=env.instance_id,
        instance_seed=seed,
        task=env.task,
        split=split,
        steps=steps,
        images=[b""],
        log_rewards=log_rewards,
        original_rewards=rewards,
        end=env.end,
        success=env.success,
        outcome=env.outcome,
        expert=False,
    )


def expert_actions(seed, config=CONFIG):
    env = make_env(config.task)
    env.reset(seed=seed, options={"split": "id"})
    actions = []
    while env.end is None:
        actions.append(env.expert_action())
        env.step(actions[-1])
    return actions


def test_div_at_n_counts_the_right_continuations_of_a_sequence():
    config = RunConfig(task=NumberSequenceSettings(ambiguous_share=1.0))
    plan = EvaluationPlan("id", instances=6, samples=4, seed=0)
    sampled = []
    for seed in plan.seeds:
        env = make_env(config.task)
        env.reset(seed=seed)
        a = env.prefix[0]
        for actions in ([str(4 * a), DONE_TOKEN], [str(5 * a), DONE_TOKEN], [DONE_TOKEN], [str(4 * a), None]):
            sampled.append(played(seed, actions, config=config))
    figures = evaluate_trajectories(config, plan, 1, sampled, sampled[::4])
    assert (figures.success, figures.success_greedy, figures.div_at_n) == (0.5, 1.0, 2.0)
    assert figures.total_variation == pytest.approx(0.5, abs=0.05)
    assert figures.success_bound > 0.99


def test_the_17_rule_is_measured_against_what_a_perfect_sampler_wins():
    config = RunConfig(task=BlackjackSettings())
    plan = EvaluationPlan("id", instances=60, samples=1, seed=0)
    sampled = [played(s, expert_actions(s, config), config=config) for s in plan.seeds]
    figures = evaluate_trajectories(config, plan, 1, sampled, sampled)
    assert 0.2 < figures.success < figures.success_bound < 1.0
    assert 0.0 <= figures.total_variation <= 1.0
    assert figures.div_at_n == 1.0


def test_the_expert_succeeds_everywhere_and_is_measured_so():
    plan = EvaluationPlan("id", instances=5, samples=2, seed=100)
    sampled = [played(s, expert_actions(s)) for s in plan.seeds for _ in range(2)]
    figures = evaluate_trajectories(CONFIG, plan, 7, sampled, sampled[::2])
    assert (figures.version, figures.instances) == (7, 5)
    assert figures.success == figures.success_greedy == 1.0
    assert figures.div_at_n == 1.0
    assert figures.malformed_rate == figures.inadmissible_rate == 0.0
    assert figures.mean_response_tokens == 2.0
    assert 0.9 < figures.success_bound <= 1.0
    assert figures.total_variation < 0.1
    assert figures.total_variation_low <= figures.total_variation <= figures.total_variation_high


def test_success_is_told_for_each_kind_of_task_where_there_are_several(monkeypatch):
    plan = EvaluationPlan("id", instances=3, samples=2, seed=100, temperature=1.5)
    solved, failed = [played(s, expert_actions(s)) for s in plan.seeds], [played(s, [None]) for s in plan.seeds]
    sampled = [*solved, solved[0], *failed[1:]]
    assert evaluate_trajectories(CONFIG, plan, 0, sampled, solved).success_by_category is None
    monkeypatch.setattr(NumberLineEnv, "category", lambda self, seed, split: f"{split} {seed % 2}")
    figures = evaluate_trajectories(CONFIG, plan, 0, sampled, solved)
    assert figures.success_by_category == {"id 0": 0.75, "id 1": 0.5}
    assert figures.temperature == 1.5


def test_the_figures_have_the_documented_keys():
    plan = EvaluationPlan("id", instances=1, samples=1, seed=100)
    trajectory = played(100, expert_actions(100))
    keys = set(evaluate_trajectories(CONFIG, plan, 0, [trajectory], [trajectory]).as_dict())
    assert keys >= {spec.name for spec in EVALUATION_METRICS}
    assert keys >= {
        "success",
        "success_greedy",
        "success_bound",
        "div_at_n",
        "malformed_rate",
        "inadmissible_rate",
        "mean_response_tokens",
        "total_variation",
    }


def test_the_interval_of_a_mean_shrinks_with_the_number_of_values():
    values = np.random.default_rng(1).normal(size=400)
    (low, high), (lower, higher) = (mean_interval(v, np.random.default_rng(0)) for v in (values, values[:20]))
    assert lower < low < float(values.mean()) < high < higher
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.2)


def test_failures_malformed_and_inadmissible_responses_are_counted():
    plan = EvaluationPlan("id", instances=1, samples=3, seed=100)
    sampled = [played(100, [None]), played(100, ["jump"]), played(100, [DONE_TOKEN])]
    figures = evaluate_trajectories(CONFIG, plan, 0, sampled, sampled[:1])
    assert figures.success == 0.0
    assert figures.div_at_n == 0.0
    assert figures.malformed_rate == pytest.approx(1 / 3)
    assert figures.inadmissible_rate == pytest.approx(1 / 3)
    assert figures.total_variation > 0.9
    assert figures.cut_rate == 0.0


def test_what_a_limit_of_tokens_cut_off_is_counted_and_no_success():
    plan = EvaluationPlan("id", instances=1, samples=2, seed=100)
    cut = replace(played(100, ["+"]), end=EndReason.RESPONSE_CUT, success=False, outcome="cut off")
    figures = evaluate_trajectories(CONFIG, plan, 0, [played(100, expert_actions(100)), cut], [cut])
    assert (figures.success, figures.success_greedy) == (0.5, 0.0)
    assert (figures.cut_rate, figures.malformed_rate) == (0.5, 0.0)


def test_diversity_counts_different_action_sequences_of_solved_instances_only():
    solved = played(100, expert_actions(100))
    detour = replace(
        played(100, expert_actions(100)), steps=[*solved.steps[:-1], replace(solved.steps[-1], action="x")]
    )
    failed = replace(solved, success=False)
    assert div_at_n({1: [solved, solved, detour, failed], 2: [solved, solved], 3: [failed]}) == 1.5


def test_total_variation_of_counts():
    assert total_variation({"a": 1, "b": 1}, {"a": 0.5, "b": 0.5}) == 0.0
    assert total_variation({"a": 2}, {"b": 1.0}) == 1.0
    assert total_variation({"a": 3, "invalid": 1}, {"a": 1.0}) == 0.25


def test_the_noise_floor_falls_with_the_number_of_draws():
    target = {str(i): 0.1 for i in range(10)}
    few, many = (noise_floor(target, n, np.random.default_rng(0)) for n in (8, 800))
    assert few > 0.3
    assert many < 0.06
