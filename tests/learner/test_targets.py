import math

import pytest
import torch

from learner.losses import LOSSES
from learner.targets import Target, loss_inputs
from shared.trajectory import EndReason

BETA, ALPHA, GAMMA = 2.0, 0.3, 0.4


def target(state_wise=True, alpha=ALPHA, gamma=GAMMA, terminal=True):
    return Target(BETA, alpha, gamma, cut_is_terminal=terminal, state_wise=state_wise)


def random_scores(trajectories, seed=0):
    """(S, 3) made-up scores; malformed steps have no action and no stop, as `Scorer` gives them."""
    steps = [step for t in trajectories for step in t.steps]
    scores = -torch.rand(len(steps), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    for row, step in enumerate(steps):
        if step.action is None:
            scores[row, [0, 2]] = 0.0
    return scores


def loss(name, inputs):
    return LOSSES[name](**inputs.arguments())


def test_terms_of_a_trajectory_that_chose_to_stop(make_trajectory):
    trajectory = make_trajectory(["+", "[DONE]"], EndReason.DONE, log_rewards=[1.0, 3.0])
    scores = torch.tensor([[-1.0, -10.0, -2.0], [-0.5, -20.0, -0.5]], dtype=torch.float64)
    inputs = loss_inputs([trajectory], scores, torch.tensor([-11.0, -22.0]), target())
    torch.testing.assert_close(inputs.log_pf, torch.tensor([[-1.0 - 4.0]], dtype=torch.float64))
    torch.testing.assert_close(inputs.log_p_stop, torch.tensor([[-2.0 - 4.0, -0.5 - 8.0]], dtype=torch.float64))
    rewards = [[2.0 - 0.3 * 11, 6.0 - 0.3 * 33]]
    torch.testing.assert_close(inputs.log_reward, torch.tensor(rewards, dtype=torch.float64))
    assert (inputs.length.tolist(), inputs.stopped.tolist()) == ([1], [True])


@pytest.mark.parametrize("end", [EndReason.ENVIRONMENT, EndReason.STEP_LIMIT, EndReason.INVALID])
def test_a_forced_stop_has_probability_one_and_no_chain_of_thought(make_trajectory, end):
    trajectory = make_trajectory(["+", "jump"], end, log_rewards=[1.0, 3.0, 0.5])
    scores = random_scores([trajectory])
    inputs = loss_inputs([trajectory], scores, torch.tensor([-11.0, -22.0]), target())
    assert float(inputs.log_p_stop[0, 2]) == 0.0
    assert float(inputs.log_p_stop[0, 1]) == pytest.approx(float(scores[1, 2] + GAMMA * scores[1, 1]))
    assert float(inputs.log_reward[0, 2]) == pytest.approx(1.0 - 0.3 * 33)
    assert (inputs.length.tolist(), inputs.stopped.tolist()) == ([2], [True])


@pytest.mark.parametrize("state_wise", [True, False])
def test_a_cut_that_is_no_end_drops_the_last_transition(make_trajectory, state_wise):
    trajectory = make_trajectory(["+", "+"], EndReason.STEP_LIMIT, log_rewards=[1.0, 3.0, 0.5])
    scores = random_scores([trajectory])
    inputs = loss_inputs([trajectory], scores, torch.tensor([-11.0, -22.0]), target(state_wise, terminal=False))
    assert (inputs.length.tolist(), inputs.stopped.tolist()) == ([1], [False])
    assert float(inputs.log_p_stop[0, 1]) == pytest.approx(float(scores[1, 2] + GAMMA * scores[1, 1]))
    assert float(inputs.log_reward[0, 1]) == pytest.approx(6.0 - 0.3 * 33)


def test_groups_are_task_instances(make_trajectory):
    trajectories = [make_trajectory(["+"], EndReason.STEP_LIMIT, instance=i) for i in (4, 7, 4)]
    assert loss_inputs(trajectories, random_scores(trajectories), None, target(alpha=0)).instance.tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", ["var_tb", "subtb", "db"])
@pytest.mark.parametrize("terminal", [True, False])
def test_chains_of_thought_cancel_when_they_follow_the_reference(make_trajectory, name, terminal):
    """With alpha = gamma and the policy equal to the reference no residual depends on log P_CoT."""
    trajectories = [*make_trajectory.batch(), make_trajectory([None], EndReason.INVALID)]
    scores, other = random_scores(trajectories), random_scores(trajectories)
    other[:, 1] = 5 * random_scores(trajectories, seed=1)[:, 1]
    rule = target(state_wise=name != "var_tb", alpha=GAMMA, terminal=terminal)
    losses = [loss(name, loss_inputs(trajectories, s, s[:, 1], rule)).loss for s in (scores, other)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    assert float(losses[0]) > 0
    without = [
        loss(name, loss_inputs(trajectories, s, None, target(rule.state_wise, 0.0))).loss for s in (scores, other)
    ]
    assert not torch.allclose(without[0], without[1])


def test_state_wise_losses_skip_the_state_of_a_malformed_response(make_trajectory):
    """Its two transitions become one; the balance left is that from earlier states to the floored end."""
    trajectory = make_trajectory(["+", "+", None], EndReason.INVALID, log_rewards=[1.0, 2.0, 3.0, 0.0])
    scores = random_scores([trajectory])
    reference = torch.tensor([-1.0, -2.0, -4.0], dtype=torch.float64)
    inputs = loss_inputs([trajectory], scores, reference, target())
    log_pf = scores[:, 0] + GAMMA * scores[:, 1]
    torch.testing.assert_close(inputs.log_pf[0], torch.stack([log_pf[0], log_pf[1] + log_pf[2]]))
    rewards = torch.tensor([2.0 - 0.3, 4.0 - 0.9, 0.0 - 0.3 * 7], dtype=torch.float64)
    torch.testing.assert_close(inputs.log_reward[0], rewards)
    assert inputs.length.tolist() == [2]
    assert float(inputs.log_p_stop[0, 2]) == 0.0

    whole = loss_inputs([trajectory], scores, reference, target(state_wise=False))
    assert whole.length.tolist() == [3]
    assert float(whole.log_pf.sum()) == pytest.approx(float(inputs.log_pf.sum()))


@pytest.mark.parametrize("name", ["var_tb", "subtb", "db"])
@pytest.mark.parametrize("bad", [None, "jump"], ids=["malformed", "inadmissible"])
@pytest.mark.parametrize("before", [[], ["+"]], ids=["at once", "later"])
def test_every_loss_pushes_bad_responses_down(make_trajectory, name, bad, before):
    good = make_trajectory(["+", "[DONE]"], EndReason.DONE, log_rewards=[4.0, 4.6])
    wrong = make_trajectory([*before, bad], EndReason.INVALID, log_rewards=[4.0] * (len(before) + 1) + [0.0])
    scores = random_scores([good, wrong]).requires_grad_()
    reference = scores.detach()[:, 1]
    rule = target(state_wise=name != "var_tb", alpha=GAMMA)
    loss(name, loss_inputs([good, wrong], scores, reference, rule)).loss.backward()
    # The last response's: its text where it is malformed, its action where it is not admissible.
    assert float(scores.grad[-1, 1 if bad is None else 0]) > 0


def test_a_first_malformed_response_is_in_balance_at_its_share_of_the_flow(make_trajectory):
    """Z = R_0 / P_stop from the companion; P(text)^gamma = R_floor P_ref^alpha / Z leaves no residual."""
    stops = make_trajectory(["+"], EndReason.STEP_LIMIT, log_rewards=[1.5, 3.0])
    wrong = make_trajectory([None], EndReason.INVALID, log_rewards=[1.5, 0.25])
    log_z = 7.0
    cot, reference_cot, reference_text = -2.0, -3.0, -6.0
    log_stop = BETA * 1.5 + ALPHA * reference_cot - log_z - GAMMA * cot
    log_act = log_z + BETA * 3.0 - BETA * 1.5 - log_z - GAMMA * cot + log_stop + GAMMA * cot
    text = (BETA * 0.25 + ALPHA * reference_text - log_z) / GAMMA
    scores = torch.tensor([[log_act, cot, log_stop], [0.0, text, 0.0]], dtype=torch.float64)
    reference = torch.tensor([reference_cot, reference_text], dtype=torch.float64)
    inputs = loss_inputs([stops, wrong], scores, reference, target())
    assert float(loss("subtb", inputs).loss) == pytest.approx(0.0, abs=1e-20)
    assert float(loss("subtb", inputs).metrics["trajectories_used"]) == 2
    scores[1, 1] += 1.0
    output = loss("subtb", loss_inputs([stops, wrong], scores, reference, target()))
    assert float(output.loss) == pytest.approx(GAMMA**2 / 2)


def test_a_first_malformed_response_without_companion_is_counted_and_not_used(make_trajectory):
    trajectories = [
        make_trajectory([None], EndReason.INVALID, instance=1),
        make_trajectory(["+"], EndReason.STEP_LIMIT, instance=2),
    ]
    inputs = loss_inputs(trajectories, random_scores(trajectories), None, target(alpha=0.0))
    assert inputs.without_flow == 1
    assert inputs.length.tolist() == [0, 1]
    assert float(loss("subtb", inputs).metrics["trajectories_used"]) == 1


def test_large_reward_exponents_stay_finite(make_trajectory):
    trajectories = make_trajectory.batch()
    rule = Target(100.0, 1.0, 1.0, cut_is_terminal=True, state_wise=True)
    scores = random_scores(trajectories)
    assert math.isfinite(float(loss("subtb", loss_inputs(trajectories, scores, scores[:, 1], rule)).loss))


def test_the_floor_raises_only_what_lies_below_it(make_trajectory):
    trajectory = make_trajectory(["+", "[DONE]"], EndReason.DONE, log_rewards=[1.0, 3.0])
    scores = torch.zeros(2, 3, dtype=torch.float64)
    rule = Target(BETA, 0.0, GAMMA, cut_is_terminal=True, state_wise=True, log_reward_floor=4.0)
    inputs = loss_inputs([trajectory], scores, None, rule)
    assert inputs.log_reward.tolist() == [[4.0, 6.0]]
