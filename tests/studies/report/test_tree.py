"""Target flows, and the tree of what was sampled beside them."""

import math
from collections import defaultdict
from dataclasses import replace

import pytest

from gflowvlm.envs.numberline.environment import NumberLineEnv
from gflowvlm.envs.numberline.settings import NumberLineSettings
from gflowvlm.envs.registry import make_env
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.task_settings import default_settings
from gflowvlm.studies.report import tree
from gflowvlm.studies.report.tree import Target, Targets, action_probability, sampled_tree, target_flows
from tests.studies.report.played import numberline_group


@pytest.mark.parametrize("task", ["numberline", "numbersequence", "blackjack"])
@pytest.mark.parametrize("beta", [1.0, 8.0])
def test_flows_of_leaves_sum_up_to_the_tasks_own_target(task: str, beta: float) -> None:
    env = make_env(default_settings(task).model_copy(update={"max_steps": 6}))
    env.reset(seed=5)
    flows = target_flows(env, beta)
    assert flows is not None
    below: dict[tuple[str, ...], float] = defaultdict(float)
    for path, flow in flows.items():
        if path:
            below[path[:-1]] += flow
    for path, total in below.items():
        assert total == pytest.approx(flows[path], rel=1e-9)
    outcomes: dict[str, float] = defaultdict(float)
    for path in flows.keys() - below.keys():
        env.reset(seed=5)
        for action in path:
            env.advance(action)
        outcomes[env.outcome] += flows[path]
    assert dict(outcomes) == pytest.approx(env.target_distribution(beta))


def test_a_tree_that_is_too_large_has_no_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "MAX_STATES", 100)
    env = NumberLineEnv(NumberLineSettings(max_steps=60))
    env.reset(seed=1)
    assert target_flows(env, 8.0) is None
    target = Targets(env, 8.0).of(1, "id")
    assert target is not None
    assert target.flows is None
    assert sum(target.outcomes.values()) == pytest.approx(1)


def rows_of(drawn: dict) -> dict[tuple[str, ...], dict]:
    found, path = {}, []
    for row in drawn["rows"]:
        path = [*path[: row["depth"] - 1], row["action"]] if row["depth"] > 0 else []
        found[tuple(path)] = row
    return found


def test_the_tree_counts_what_was_sampled_and_what_was_not() -> None:
    env = NumberLineEnv(NumberLineSettings())
    group = numberline_group(0, seed=7)
    target = Targets(env, 8.0).of(7, "id")
    assert target is not None
    assert target.flows is not None
    drawn = sampled_tree(group, target)
    rows = rows_of(drawn)
    assert drawn["sampled"] == rows[()]["count"] == 4
    assert (rows[()]["expert"], rows[()]["share"], rows[()]["target"]) == (1, 1.0, pytest.approx(1.0))
    stop = rows[DONE_TOKEN,]
    assert (stop["count"], stop["share"]) == (1, 0.25)
    assert stop["ends"]["end"] == "done"
    assert stop["policy"] == pytest.approx(math.exp(-0.5))
    assert stop["target"] == pytest.approx(target.flows[DONE_TOKEN,])
    assert stop["target_policy"] == pytest.approx(target.flows[DONE_TOKEN,])
    back = rows["+", "-"]
    assert back["target_policy"] == pytest.approx(target.flows["+", "-"] / target.flows["+",])
    inadmissible = rows["+", "fly (inadmissible)"]
    assert (inadmissible["target"], inadmissible["ends"]["end"]) == (0.0, "invalid")
    never = rows["+", "+"] if ("+", "+") in rows and rows["+", "+"]["count"] == 0 else rows["-",]
    assert never["target"] > 0
    by_name = {outcome["name"]: outcome for outcome in drawn["outcomes"]}
    assert sum(outcome["share"] for outcome in drawn["outcomes"]) == pytest.approx(1)
    assert by_name["invalid"] == {"name": "invalid", "share": 0.25, "target": 0.0}
    gaps = [abs(outcome["share"] - outcome["target"]) for outcome in drawn["outcomes"]]
    assert drawn["total_variation"] == pytest.approx(sum(gaps) / 2)


def test_without_a_target_the_tree_is_of_what_was_sampled_alone() -> None:
    drawn = sampled_tree(numberline_group(0, seed=7), None)
    assert drawn["total_variation"] is None
    assert all(row["target"] is None and row["target_policy"] is None for row in drawn["rows"])
    assert all(row["count"] + row["expert"] > 0 for row in drawn["rows"])
    assert all(outcome["target"] is None for outcome in drawn["outcomes"])


def test_an_instance_that_only_the_expert_played_has_no_shares() -> None:
    expert = numberline_group(0, seed=7)[-1]
    drawn = sampled_tree([expert], Target({"3": 1.0}, None))
    assert (drawn["sampled"], drawn["total_variation"], drawn["rows"][0]["share"]) == (0, None, None)


def test_what_was_not_sampled_has_no_probability() -> None:
    policy, expert = numberline_group(0, seed=7)[0].steps[0], numberline_group(0, seed=7)[-1].steps[0]
    assert action_probability(policy) == pytest.approx(math.exp(-0.5))
    assert action_probability(expert) is None
    assert action_probability(replace(policy, cot_end=4, action_end=4)) is None
