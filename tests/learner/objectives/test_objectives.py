"""The objectives as the learner uses them: the real tiny model, whole steps."""

import dataclasses
import math

import pytest
import torch

from gflowvlm.learner.baselines import generalised_advantages
from gflowvlm.learner.distributed import Ranks
from gflowvlm.learner.learner import Learner
from gflowvlm.learner.objectives import OBJECTIVES, ScoredBatch, make_objective
from gflowvlm.learner.scoring import LOG_ACT, LOG_COT, LOG_STOP
from gflowvlm.shared.objective_settings import LossName
from gflowvlm.shared.trajectory import EndReason

ALONE = Ranks(0, 1, torch.device("cpu"))
GAMMA = 0.4


def rewarded(trajectory, rewards, expert=False):
    return dataclasses.replace(trajectory, original_rewards=[float(r) for r in rewards], expert=expert)


def scored(trajectories, columns=4, seed=0):
    steps = sum(len(t.steps) for t in trajectories)
    scores = -torch.rand(steps, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ScoredBatch(trajectories, scores, None)


def scores_moved(batch, row, column, by):
    scores = batch.scores.clone()
    scores[row, column] += by
    return scores


def test_every_loss_of_the_configuration_has_an_objective():
    assert set(OBJECTIVES) == set(LossName.__args__)


@pytest.mark.parametrize("truncation", ["terminal", "incomplete"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_that_use_no_stops_need_only_those_that_were_played(name, truncation, make_config, make_trajectory):
    config = make_config(objective={"loss": name}, target={"truncation": truncation, "reference_weight": 0.0})
    objective = make_objective(config)
    batch = scored([dataclasses.replace(t, expert=True) for t in make_trajectory.batch()], columns=5)
    played = torch.tensor([step.action == "[DONE]" for t in batch.trajectories for step in t.steps])
    without = batch.scores.clone()
    without[~played, LOG_STOP] = 0.0
    figures = []
    for scores in (batch.scores, without):
        scores = scores.clone().requires_grad_()
        output = objective.prepare(dataclasses.replace(batch, scores=scores.detach()), ALONE)(scores)
        figures.append(torch.cat([output.loss[None], *torch.autograd.grad(output.loss, scores)[0]]))
    assert torch.equal(*figures) == (not objective.uses_stops)


def test_ppo_adds_the_clipped_surrogate_of_normalised_advantages_and_the_value_loss(make_config, make_trajectory):
    first = rewarded(make_trajectory(["+", "-", "[DONE]"], EndReason.DONE), [0, -1, 1])
    second = rewarded(make_trajectory(["-"], EndReason.STEP_LIMIT), [-1])
    config = make_config(objective={"loss": "ppo"}, policy={"cot_weight": GAMMA})
    batch = scored([first, second], columns=5)
    output = make_objective(config).prepare(batch, ALONE)(batch.scores)
    settings = config.objective.policy_gradient
    value = torch.zeros(2, 3, dtype=torch.float64)
    value[0], value[1, 0] = batch.scores[:3, 4], batch.scores[3, 4]
    advantage = generalised_advantages(
        reward=torch.tensor([[0.0, -1.0, 1.0], [-1.0, 0.0, 0.0]], dtype=torch.float64),
        value=value,
        length=torch.tensor([3, 1]),
        last_value=torch.zeros(2, dtype=torch.float64),
        discount=settings.discount,
        gae_lambda=settings.gae_lambda,
    )
    flat = torch.cat([advantage[0], advantage[1, :1]])
    # Before any update all ratios are 1, and normalised advantages have mean 0.
    assert output.metrics.means["policy_loss"][0] == pytest.approx(0.0, abs=1e-9)
    assert float(output.loss) == pytest.approx(0.5 * 0.5 * float(flat.square().mean()), rel=1e-9)
    assert output.count == 4.0

    # A response with a positive advantage that becomes likelier lowers the loss, up to the clip.
    best = int(flat.argmax())
    weight = (flat[best] - flat.mean()) / flat.std(correction=0)
    prepared = make_objective(config).prepare(batch, ALONE)
    for by, ratio in ((0.1, math.exp(0.1)), (1.0, 1 + settings.ratio_clip)):
        moved = prepared(scores_moved(batch, best, LOG_ACT, by)).loss
        assert float(moved - output.loss) == pytest.approx(-(ratio - 1) * float(weight) / 4, rel=1e-6)
    in_thought = prepared(scores_moved(batch, best, LOG_COT, 0.1)).loss
    assert float(in_thought - output.loss) == pytest.approx(-(math.exp(GAMMA * 0.1) - 1) * float(weight) / 4, rel=1e-6)


def test_grpo_compares_a_trajectory_with_its_group_only(make_config, make_trajectory):
    group = [rewarded(make_trajectory(["+", "[DONE]"], EndReason.DONE, 0), [0, r]) for r in (1, -1)]
    other = [rewarded(make_trajectory(["+"], EndReason.STEP_LIMIT, 1), [5]) for _ in range(2)]
    config = make_config(objective={"loss": "grpo"}, policy={"cot_weight": GAMMA})
    batch = scored(group + other)
    prepared = make_objective(config).prepare(batch, ALONE)
    scores = batch.scores.clone().requires_grad_()
    prepared(scores).loss.backward()
    # 6 responses; the first trajectory's advantage is 1, the second's -1, the other group's 0.
    expected = torch.tensor([-1.0, -1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64) / 6
    torch.testing.assert_close(scores.grad[:, LOG_ACT], expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(scores.grad[:, LOG_COT], GAMMA * expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("loss", ["ppo", "grpo"])
def test_the_revised_reward_is_that_of_the_gflownet_losses_at_the_end(make_config, make_trajectory, loss):
    rewards = [math.log(20.0), math.log(100.0)]
    played = make_trajectory(["+"], EndReason.STEP_LIMIT, log_rewards=rewards)
    stayed = make_trajectory(["-"], EndReason.STEP_LIMIT, log_rewards=[rewards[0], rewards[0]])
    config = make_config(objective={"loss": loss, "policy_gradient": {"reward": "revised"}})
    batch = scored([rewarded(played, [-7]), rewarded(stayed, [9])], columns=5 if loss == "ppo" else 4)
    output = make_objective(config).prepare(batch, ALONE)(batch.scores)
    assert output.metrics.means["reward_mean"] == pytest.approx((120, 2))


def test_ppo_learns_the_same_from_a_tasks_rewards_whatever_their_size(make_config, make_trajectory):
    played = [make_trajectory(["+", "[DONE]"], EndReason.DONE), make_trajectory(["-"], EndReason.STEP_LIMIT)]
    outputs = []
    for task, largest in (("numberline", 1), ("alfworld", 50)):
        config = make_config(objective={"loss": "ppo"}, task={"name": task})
        batch = scored([rewarded(t, [largest] * len(t.steps)) for t in played], columns=5)
        outputs.append(make_objective(config).prepare(batch, ALONE)(batch.scores))
        assert outputs[-1].metrics.means["reward_mean"] == pytest.approx((3 * largest, 2))
    assert float(outputs[0].loss) == pytest.approx(float(outputs[1].loss), rel=1e-12)


def test_behind_a_cut_ppo_expects_what_the_last_shown_state_is_worth(make_config, make_trajectory):
    cut = rewarded(make_trajectory(["+", "-"], EndReason.STEP_LIMIT), [0.5, 100])
    config = make_config(objective={"loss": "ppo"}, target={"truncation": "incomplete"})
    batch = scored([cut], columns=5)
    output = make_objective(config).prepare(batch, ALONE)(batch.scores)
    value = batch.scores[:, 4]
    error = value[0] - (0.5 + config.objective.policy_gradient.discount * value[1])
    assert float(output.loss) == pytest.approx(0.25 * float(error) ** 2)
    assert output.count == 1.0


@pytest.mark.parametrize("truncation", ["terminal", "incomplete"])
def test_what_a_limit_of_tokens_cut_off_is_incomplete_for_ppo_too(make_config, make_trajectory, truncation):
    outputs = []
    for end, rule in ((EndReason.RESPONSE_CUT, truncation), (EndReason.STEP_LIMIT, "incomplete")):
        config = make_config(objective={"loss": "ppo"}, target={"truncation": rule})
        batch = scored([rewarded(make_trajectory(["+", "-"], end), [0.5, 100])], columns=5)
        outputs.append(make_objective(config).prepare(batch, ALONE)(batch.scores))
    assert float(outputs[0].loss) == float(outputs[1].loss)
    assert outputs[0].count == 1.0


def test_grpo_leaves_what_a_limit_of_tokens_cut_off_out_of_its_group(make_config, make_trajectory):
    group = [rewarded(make_trajectory(["+", "[DONE]"], EndReason.DONE, 0), [0, r]) for r in (1, -1)]
    cut = rewarded(make_trajectory(["-"], EndReason.RESPONSE_CUT, 0), [-9])
    config = make_config(objective={"loss": "grpo"}, policy={"cot_weight": GAMMA})
    batch = scored([*group, cut])
    scores = batch.scores.clone().requires_grad_()
    output = make_objective(config).prepare(batch, ALONE)(scores)
    output.loss.backward()
    expected = torch.tensor([-1.0, -1.0, 1.0, 1.0, 0.0], dtype=torch.float64) / 4
    torch.testing.assert_close(scores.grad[:, LOG_ACT], expected, rtol=1e-5, atol=1e-9)
    assert output.metrics.means["reward_mean"] == pytest.approx((0, 2))


def test_sft_is_the_mean_cross_entropy_of_the_experts_tokens(tiny_model, make_config, make_trajectory):
    expert = rewarded(make_trajectory(["+", "[DONE]"], EndReason.DONE), [0, 1], expert=True)
    own = make_trajectory(["-", "[DONE]"], EndReason.DONE)
    config = make_config(objective={"loss": "sft"})
    learner = Learner(config, tiny_model)
    tokens = [value for step in learner.score([expert])[0] for value in step]
    metrics = learner.step([expert, own])
    assert metrics["loss"] == pytest.approx(-sum(tokens) / len(tokens), rel=1e-4)
    assert (metrics["trajectories_used"], metrics["trajectories_dropped"]) == (1.0, 1.0)


def test_sft_without_done_leaves_the_stopping_responses_out(make_config, make_trajectory):
    expert = rewarded(make_trajectory(["+", "[DONE]"], EndReason.DONE), [0, 1], expert=True)
    batch = scored([expert])
    losses = {}
    for done in (True, False):
        objective = make_objective(make_config(objective={"loss": "sft", "sft_done": done}))
        output = objective.prepare(batch, ALONE)
        losses[done] = [float(output(s).loss) for s in (batch.scores, scores_moved(batch, 1, LOG_ACT, 1.0))]
    assert losses[True][0] != losses[True][1]
    assert losses[False][0] == losses[False][1]


@pytest.mark.parametrize("loss", ["sft", "ppo", "grpo"])
def test_a_baseline_learns_on_the_tiny_model(tiny_model, make_config, make_trajectory, loss):
    """Of two actions it takes the one that is paid (or shown) in half a dozen steps."""
    config = make_config(
        objective={"loss": loss, "policy_gradient": {"ratio_clip": 0.5, "learning_rate": 5e-3}},
        learner={"learning_rate": 5e-3, "final_learning_rate": 5e-3},
    )
    good = [rewarded(make_trajectory(["+", "[DONE]"], EndReason.DONE), [0, 1], expert=loss == "sft") for _ in range(2)]
    bad = [rewarded(make_trajectory(["-", "[DONE]"], EndReason.DONE), [0, -1]) for _ in range(2)]
    learner = Learner(config, tiny_model)

    def advantage_of_good():
        values = [sum(map(sum, of_one)) for of_one in learner.score(good + bad)]
        return sum(values[:2]) - sum(values[2:])

    before = advantage_of_good()
    for _ in range(6):
        metrics = learner.step(good + bad)
    assert advantage_of_good() > before + 0.5
    assert all(math.isfinite(value) for value in metrics.values())
    assert learner.steps_taken == 6


@pytest.mark.parametrize("loss", ["sft", "ppo", "grpo"])
def test_a_batch_without_anything_to_learn_from_makes_no_update(tiny_model, make_config, make_trajectory, loss):
    empty = dataclasses.replace(make_trajectory([], EndReason.ENVIRONMENT), original_rewards=[])
    learner = Learner(make_config(objective={"loss": loss}), tiny_model)
    metrics = learner.step([empty, empty])
    assert (metrics["updated"], metrics["trajectories_used"], metrics["loss"]) == (0.0, 0.0, 0.0)
