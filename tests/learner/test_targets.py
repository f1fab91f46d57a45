import math

import pytest
import torch

from gflowvlm.learner.heads import first_estimates
from gflowvlm.learner.losses import LOSSES
from gflowvlm.learner.targets import STATE_WISE, Target, loss_inputs
from gflowvlm.shared.trajectory import EndReason

BETA, ALPHA, GAMMA = 2.0, 0.3, 0.4


def target(name="subtb", alpha=ALPHA, gamma=GAMMA, terminal=True):
    return Target(BETA, alpha, gamma, cut_is_terminal=terminal, loss=name)


def random_scores(trajectories, seed=0):
    """(S, 4) made-up scores; malformed steps have no action and no stop, as `Scorer` gives them."""
    steps = [step for t in trajectories for step in t.steps]
    scores = -torch.rand(len(steps), 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    for row, step in enumerate(steps):
        if step.action is None:
            scores[row, [0, 2]] = 0.0
    return scores


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def loss(name, inputs):
    return LOSSES[name](**inputs.arguments())


def test_terms_of_a_trajectory_that_chose_to_stop(make_trajectory):
    trajectory = make_trajectory(["+", "[DONE]"], EndReason.DONE, log_rewards=[1.0, 3.0])
    scores = torch.tensor([[-1.0, -10.0, -2.0], [-0.5, -20.0, -0.5]], dtype=torch.float64)
    inputs = loss_inputs([trajectory], scores, torch.tensor([-11.0, -22.0]), target())
    close(inputs.log_pf, [[-1.0 - 4.0 + 0.3 * 11]])
    close(inputs.log_p_stop, [[-2.0 - 4.0 + 0.3 * 11, -0.5 - 8.0 + 0.3 * 22]])
    close(inputs.log_reward, [[2.0, 6.0]])
    close(inputs.policy_log_pf, [[-1.0 - 4.0]])
    assert (inputs.length.tolist(), inputs.stopped.tolist()) == ([1], [True])


@pytest.mark.parametrize("end", [EndReason.ENVIRONMENT, EndReason.STEP_LIMIT, EndReason.INVALID])
def test_a_forced_stop_has_probability_one_and_no_chain_of_thought(make_trajectory, end):
    trajectory = make_trajectory(["+", "jump"], end, log_rewards=[1.0, 3.0, 0.5])
    scores = random_scores([trajectory])
    inputs = loss_inputs([trajectory], scores, torch.tensor([-11.0, -22.0]), target())
    assert float(inputs.log_p_stop[0, 2]) == 0.0
    assert float(inputs.log_p_stop[0, 1]) == pytest.approx(float(scores[1, 2] + GAMMA * scores[1, 1]) + 0.3 * 22)
    assert float(inputs.log_reward[0, 2]) == pytest.approx(1.0)
    assert (inputs.length.tolist(), inputs.stopped.tolist()) == ([2], [True])


@pytest.mark.parametrize("name", ["subtb", "var_tb", "flow_subtb", "fl_db"])
def test_a_cut_that_is_no_end_drops_the_last_transition(make_trajectory, name):
    trajectory = make_trajectory(["+", "+"], EndReason.STEP_LIMIT, log_rewards=[1.0, 3.0, 0.5])
    scores = random_scores([trajectory])
    inputs = loss_inputs([trajectory], scores, torch.tensor([-11.0, -22.0]), target(name, terminal=False))
    assert (inputs.length.tolist(), inputs.stopped.tolist()) == ([1], [False])
    assert float(inputs.log_p_stop[0, 1]) == pytest.approx(float(scores[1, 2] + GAMMA * scores[1, 1]) + 0.3 * 22)
    assert float(inputs.log_reward[0, 1]) == pytest.approx(6.0)
    if name.startswith("fl"):
        assert torch.equal(inputs.log_flow, scores[None, :, 3])


@pytest.mark.parametrize("end", [EndReason.RESPONSE_CUT, EndReason.PROMPT_TOO_LONG])
@pytest.mark.parametrize("name", LOSSES)
def test_what_a_limit_of_tokens_cut_off_is_incomplete_whatever_a_cut_at_the_step_limit_is(make_trajectory, name, end):
    played, again = (make_trajectory(["+", "+"], e, log_rewards=[1.0, 3.0, 0.5]) for e in (end, EndReason.STEP_LIMIT))
    scores = random_scores([played])
    found = loss_inputs([played], scores, None, target(name, 0.0, terminal=True))
    expected = loss_inputs([again], scores, None, target(name, 0.0, terminal=False))
    assert (found.length.tolist(), found.stopped.tolist()) == ([1], [False])
    assert torch.equal(found.log_p_stop, expected.log_p_stop)
    assert torch.equal(found.log_reward, expected.log_reward)
    # Without a step there is nothing to learn, and nothing breaks.
    none, other = make_trajectory([], end, log_rewards=[1.0]), make_trajectory.batch()
    scores = random_scores([none, *other])
    both = loss(name, loss_inputs([none, *other], scores, None, target(name, 0.0)))
    alone = loss(name, loss_inputs(other, scores, None, target(name, 0.0)))
    torch.testing.assert_close(both.loss, alone.loss)


def test_groups_are_task_instances(make_trajectory):
    trajectories = [make_trajectory(["+"], EndReason.STEP_LIMIT, instance=i) for i in (4, 7, 4)]
    assert loss_inputs(trajectories, random_scores(trajectories), None, target(alpha=0)).instance.tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("terminal", [True, False])
def test_chains_of_thought_cancel_when_they_follow_the_reference(make_trajectory, name, terminal):
    """With alpha = gamma and the policy equal to the reference no residual depends on log P_CoT."""
    trajectories = [*make_trajectory.batch(), make_trajectory([None], EndReason.INVALID)]
    scores, other = random_scores(trajectories), random_scores(trajectories)
    other[:, 1] = 5 * random_scores(trajectories, seed=1)[:, 1]
    rule = target(name, alpha=GAMMA, terminal=terminal)
    losses = [loss(name, loss_inputs(trajectories, s, s[:, 1], rule)).loss for s in (scores, other)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    assert float(losses[0]) > 0
    without = [loss(name, loss_inputs(trajectories, s, None, target(name, 0.0))).loss for s in (scores, other)]
    assert not torch.allclose(without[0], without[1])


def test_state_wise_losses_skip_the_state_of_a_malformed_response(make_trajectory):
    """Its two transitions become one; the balance left is that from earlier states to the floored end."""
    trajectory = make_trajectory(["+", "+", None], EndReason.INVALID, log_rewards=[1.0, 2.0, 3.0, 0.0])
    scores = random_scores([trajectory])
    reference = torch.tensor([-1.0, -2.0, -4.0], dtype=torch.float64)
    inputs = loss_inputs([trajectory], scores, reference, target())
    log_pf = scores[:, 0] + GAMMA * scores[:, 1]
    torch.testing.assert_close(inputs.policy_log_pf[0], torch.stack([log_pf[0], log_pf[1] + log_pf[2]]))
    log_pf = log_pf - ALPHA * reference
    torch.testing.assert_close(inputs.log_pf[0], torch.stack([log_pf[0], log_pf[1] + log_pf[2]]))
    close(inputs.log_reward[0], [2.0, 4.0, 0.0])
    assert inputs.length.tolist() == [2]
    assert float(inputs.log_p_stop[0, 2]) == 0.0

    whole = loss_inputs([trajectory], scores, reference, target("var_tb"))
    assert whole.length.tolist() == [3]
    assert float(whole.log_pf.sum()) == pytest.approx(float(inputs.log_pf.sum()))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bad", [None, "jump"], ids=["malformed", "inadmissible"])
@pytest.mark.parametrize("before", [[], ["+"]], ids=["at once", "later"])
def test_every_loss_pushes_bad_responses_down(make_trajectory, name, bad, before):
    good = make_trajectory(["+", "[DONE]"], EndReason.DONE, log_rewards=[4.0, 4.6])
    wrong = make_trajectory([*before, bad], EndReason.INVALID, log_rewards=[4.0] * (len(before) + 1) + [0.0])
    scores = random_scores([good, wrong])
    scores[:, 3] += 12.0 if name[:3] in ("tb", "flo") else 5.0  # more flow than the floor holds
    scores.requires_grad_()
    reference = scores.detach()[:, 1]
    rule = target(name, alpha=GAMMA)
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
    rule = Target(100.0, 1.0, 1.0, cut_is_terminal=True, loss="subtb")
    scores = random_scores(trajectories)
    assert math.isfinite(float(loss("subtb", loss_inputs(trajectories, scores, scores[:, 1], rule)).loss))


def test_the_floor_raises_only_what_lies_below_it(make_trajectory):
    trajectory = make_trajectory(["+", "[DONE]"], EndReason.DONE, log_rewards=[1.0, 3.0])
    scores = torch.zeros(2, 3, dtype=torch.float64)
    rule = Target(BETA, 0.0, GAMMA, cut_is_terminal=True, loss="subtb", log_reward_floor=4.0)
    inputs = loss_inputs([trajectory], scores, None, rule)
    assert inputs.log_reward.tolist() == [[4.0, 6.0]]


def test_the_reference_weighs_as_if_its_product_stood_in_the_reward(make_trajectory):
    """Residuals written out by hand, R(x)^beta Π_{k<=t} P_ref(c_k)^alpha as the reward of stopping at t."""
    trajectory = make_trajectory(["+", "-", "[DONE]"], EndReason.DONE, log_rewards=[1.0, 3.0, 2.0])
    act, cot, stop = [-1.0, -2.0, -0.5], [-10.0, -20.0, -30.0], [-4.0, -3.0, -0.5]
    ref = [-11.0, -18.0, -33.0]
    scores = torch.tensor([act, cot, stop], dtype=torch.float64).T
    rewards = [
        2.0 * 1.0 + 0.3 * (-11.0),
        2.0 * 3.0 + 0.3 * (-11.0 - 18.0),
        2.0 * 2.0 + 0.3 * (-11.0 - 18.0 - 33.0),
    ]
    forward = [a + 0.4 * c for a, c in zip(act, cot, strict=True)]
    ends = [s + 0.4 * c for s, c in zip(stop, cot, strict=True)]

    def residual(i, j):
        return rewards[i] + sum(forward[i:j]) + ends[j] - rewards[j] - ends[i]

    inputs = loss_inputs([trajectory], scores, torch.tensor(ref), target("subtb"))
    db = (residual(0, 1) ** 2 + residual(1, 2) ** 2) / 2
    assert float(loss("db", inputs).loss) == pytest.approx(db, rel=1e-12)
    weights = {(0, 1): 0.9, (1, 2): 0.9, (0, 2): 0.81}
    subtb = sum(w * residual(*pair) ** 2 for pair, w in weights.items()) / sum(weights.values())
    assert float(loss("subtb", inputs).loss) == pytest.approx(subtb, rel=1e-12)

    other = make_trajectory(["+"], EndReason.STEP_LIMIT, log_rewards=[1.0, 3.0])
    both = torch.cat([scores, torch.tensor([[-1.5, -7.0, -1.0]], dtype=torch.float64)])
    inputs = loss_inputs([trajectory, other], both, torch.tensor([*ref, -5.0]), target("var_tb"))
    zeta = sum(forward[:2]) + ends[2] - rewards[2], -1.5 + 0.4 * -7.0 - (2.0 * 3.0 + 0.3 * -5.0)
    assert float(loss("var_tb", inputs).loss) == pytest.approx(((zeta[0] - zeta[1]) / 2) ** 2, rel=1e-12)


@pytest.mark.parametrize("end", [EndReason.ENVIRONMENT, EndReason.STEP_LIMIT, EndReason.INVALID])
def test_a_forced_end_is_a_state_of_known_flow(make_trajectory, end):
    trajectory = make_trajectory(["+", None if end is EndReason.INVALID else "+"], end, log_rewards=[1.0, 3.0, 0.5])
    scores = random_scores([trajectory])
    flow = loss_inputs([trajectory], scores, None, target("flow_db", alpha=0.0))
    close(flow.log_flow, [[*scores[:, 3].tolist(), BETA * 0.5]])
    ahead = loss_inputs([trajectory], scores, None, target("fl_db", alpha=0.0))
    close(ahead.log_flow, [[*scores[:, 3].tolist(), 0.0]])
    for inputs in (flow, ahead):
        assert (inputs.length.tolist(), inputs.stopped.tolist()) == ([2], [False])
        assert inputs.from_head.tolist() == [[True, True, False]]
    step = scores[:, 0] + GAMMA * scores[:, 1]
    residuals = [scores[0, 3] + step[0] - scores[1, 3], scores[1, 3] + step[1] - BETA * 0.5]
    assert float(loss("flow_db", flow).loss) == pytest.approx(float(sum(r**2 for r in residuals)) / 2)
    residuals = [residuals[0] + BETA * (1.0 - 3.0), scores[1, 3] + BETA * 3.0 + step[1] - BETA * 0.5]
    assert float(loss("fl_db", ahead).loss) == pytest.approx(float(sum(r**2 for r in residuals)) / 2)


def test_a_chosen_stop_leads_from_a_learned_flow_to_the_reward(make_trajectory):
    trajectory = make_trajectory(["+", "[DONE]"], EndReason.DONE, log_rewards=[1.0, 3.0])
    scores = random_scores([trajectory])
    inputs = loss_inputs([trajectory], scores, None, target("flow_db", alpha=0.0))
    assert (inputs.length.tolist(), inputs.stopped.tolist()) == ([1], [True])
    assert torch.equal(inputs.log_flow, scores[None, :, 3])
    step = scores[0, 0] + GAMMA * scores[0, 1]
    stop = scores[1, 2] + GAMMA * scores[1, 1]
    residuals = [scores[0, 3] + step - scores[1, 3], scores[1, 3] + stop - BETA * 3.0]
    assert float(loss("flow_db", inputs).loss) == pytest.approx(float(sum(r**2 for r in residuals)) / 2)


@pytest.mark.parametrize("name", ["tb", "flow_db", "flow_subtb", "fl_db", "fl_subtb"])
def test_estimates_of_the_head_are_in_balance_for_the_trajectory_they_come_from(make_trajectory, name):
    """A head that says exactly what followed each state leaves no residual."""
    trajectories = [
        make_trajectory(["+", "-", "[DONE]"], EndReason.DONE),
        make_trajectory(["-", None], EndReason.INVALID),
    ]
    scores = random_scores(trajectories)
    inputs = loss_inputs(trajectories, scores, scores[:, 1], target(name))
    tensors = inputs.arguments()
    ahead = name.startswith("fl_")
    common = ("log_pf", "log_p_stop", "log_reward", "length", "stopped")
    flows = first_estimates(**{key: tensors[key] for key in common}, ahead=ahead)
    assert torch.equal(flows.isnan(), torch.arange(3) > inputs.length[:, None])
    tensors["log_z" if name == "tb" else "log_flow"] = flows[:, 0] if name == "tb" else flows
    output = LOSSES[name](**tensors)
    assert float(output.loss) == pytest.approx(0.0, abs=1e-20)
    assert float(output.metrics["trajectories_used"]) == 2
    learned = 1 if name == "tb" else 3
    assert float(inputs.first_estimates()[0]) == pytest.approx(float(flows[0, :learned].mean()))


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_malformed_responses_has_a_finite_loss(make_trajectory, name):
    trajectories = [make_trajectory([None], EndReason.INVALID, instance=i // 2) for i in range(4)]
    scores = random_scores(trajectories).requires_grad_()
    output = loss(name, loss_inputs(trajectories, scores, scores.detach()[:, 1], target(name)))
    output.loss.backward()
    assert math.isfinite(output.loss.item())
    assert bool(scores.grad.isfinite().all())
    # Only the state-wise losses need another trajectory to know the flow of the first state.
    assert float(output.metrics["trajectories_used"]) == (0 if name in STATE_WISE else 4)


@pytest.mark.parametrize("name", ["tb", "flow_subtb"])
def test_a_trajectory_without_any_response_is_not_used(make_trajectory, name):
    trajectory = make_trajectory([], EndReason.ENVIRONMENT, log_rewards=[1.0])
    output = loss(name, loss_inputs([trajectory], torch.zeros(0, 4), None, target(name)))
    assert float(output.metrics["trajectories_used"]) == 0
