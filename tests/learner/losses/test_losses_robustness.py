"""Padding, empty and cut-off batches, float32 at the reward floor, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gflowvlm.learner.losses import LOSSES, LossOutput
from tests.learner.losses import support

NAMES = sorted(LOSSES)
LOG_PROBABILITIES = ("log_pf", "log_p_stop", "log_reward", "log_pb", "log_z", "log_flow")


def run(name: str, rollouts: list[support.Rollout], **pad_options: Any) -> tuple[LossOutput, dict[str, Tensor]]:
    """The loss, and the gradients of every floating input, after a backward pass."""
    batch = support.pad_rollouts(rollouts, **pad_options)
    batch |= support.extras(name, rollouts, batch, padding=pad_options.get("padding", math.nan))
    inputs = {key: batch[key].requires_grad_() for key in LOG_PROBABILITIES if key in batch}
    output = LOSSES[name](**batch)
    output.loss.backward()
    gradients = {key: value.grad for key, value in inputs.items() if value.grad is not None}
    assert set(gradients) >= {"log_pf", "log_p_stop", "log_reward"}
    return output, gradients


@pytest.mark.parametrize("padding", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_neither_values_nor_gradients(name: str, padding: float) -> None:
    rollouts = support.random_rollouts(2)
    clean, clean_gradients = run(name, rollouts, padding=0.0, with_pb=True)
    dirty, dirty_gradients = run(name, rollouts, padding=padding, with_pb=True)
    for key, value in clean.metrics.items():
        assert torch.equal(dirty.metrics[key], value), key
    for key, gradient in clean_gradients.items():
        assert torch.equal(dirty_gradients[key], gradient), key
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["tb", "var_tb"])
def test_cut_off_trajectories_are_dropped_whatever_they_hold(name: str) -> None:
    rollouts = support.random_rollouts(8)
    complete = [r for r in rollouts if r.stopped]
    assert 0 < len(complete) < len(rollouts)
    batch = support.pad_rollouts(rollouts)
    batch |= support.extras(name, rollouts, batch)
    for key in LOG_PROBABILITIES:
        if key in batch:
            batch[key][~batch["stopped"]] = math.nan
            batch[key].requires_grad_()
    output = LOSSES[name](**batch)
    output.loss.backward()
    expected, _ = run(name, complete)
    assert output.loss.item() == pytest.approx(expected.loss.item(), abs=1e-12)
    cut_off = len(rollouts) - len(complete)
    assert output.metrics["trajectories_dropped"] == expected.metrics["trajectories_dropped"] + cut_off
    for key in ("log_pf", "log_p_stop", "log_reward"):
        gradient = batch[key].grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient[~batch["stopped"]].count_nonzero() == 0


@pytest.mark.parametrize("name", support.WITH_FLOW)
def test_cut_off_trajectories_teach_the_transitions_they_have(name: str) -> None:
    rollouts = [r for r in support.random_rollouts(9) if not r.stopped]
    output, gradients = run(name, rollouts)
    assert output.metrics["trajectories_used"] == sum(r.n > 0 for r in rollouts)
    assert gradients["log_pf"].count_nonzero() == sum(r.n for r in rollouts)
    assert gradients["log_p_stop"].count_nonzero() == 0


@pytest.mark.parametrize("name", ["db", "subtb"])
def test_cut_off_trajectories_count_in_the_sub_trajectory_losses(name: str) -> None:
    rollouts = support.random_rollouts(9)
    batch = support.pad_rollouts(rollouts)
    output = LOSSES[name](**batch)
    batch["stopped"] = torch.ones_like(batch["stopped"])
    assert output.loss.item() == LOSSES[name](**batch).loss.item()
    assert output.metrics["trajectories_used"] == sum(r.n > 0 for r in rollouts)


def without_residual(name: str) -> list[support.Rollout]:
    rollouts = support.random_rollouts(10)
    if name == "tb":
        return [r for r in rollouts if not r.stopped]
    if name == "var_tb":  # one complete trajectory an instance
        return list({r.instance: r for r in rollouts if r.stopped}.values())
    if name in support.WITH_FLOW:  # a stop is a transition, too
        return [r for r in support.random_rollouts(10, count=60) if r.n == 0 and not r.stopped]
    return [r for r in rollouts if r.n == 0]


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_batch_without_residual_gives_a_differentiable_zero_and_says_so(name: str, extra: int) -> None:
    rollouts = without_residual(name)
    assert rollouts
    output, gradients = run(name, rollouts, extra=extra)
    assert output.loss.item() == 0.0
    assert output.metrics["trajectories_used"] == 0
    assert output.metrics["trajectories_dropped"] == len(rollouts)
    assert all(value.isfinite() for value in output.metrics.values())
    assert all(gradient.count_nonzero() == 0 for gradient in gradients.values())
    if name == "var_tb":
        assert output.metrics["groups_of_one"] == len(rollouts)
        assert output.metrics["groups"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_batch_without_trajectories_gives_a_differentiable_zero(name: str) -> None:
    output, _ = run(name, [])
    assert output.loss.item() == 0.0
    assert output.metrics["trajectories_used"] == 0


@pytest.mark.parametrize("name", ["tb", "var_tb"])
def test_trajectories_that_stop_at_once_have_their_one_residual(name: str) -> None:
    """T = 0: only the stop action, P(⊤) = 1/2 and 1/4 under R = 1 and log Z = 0."""
    batch: dict[str, Any] = {
        "log_pf": torch.zeros(2, 0, dtype=torch.float64),
        "log_p_stop": torch.tensor([[0.5], [0.25]], dtype=torch.float64).log(),
        "log_reward": torch.zeros(2, 1, dtype=torch.float64),
        "length": torch.tensor([0, 0]),
        "stopped": torch.tensor([True, True]),
        "instance": torch.tensor([4, 4]),
    }
    if name == "tb":
        batch["log_z"] = torch.zeros(2, dtype=torch.float64)
    ln2 = math.log(2)
    expected = (ln2**2 + (2 * ln2) ** 2) / 2 if name == "tb" else (ln2 / 2) ** 2
    assert LOSSES[name](**batch).loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_float32_stays_accurate_where_rewards_stand_at_the_floor(name: str) -> None:
    """log R around −1e4 throughout, and log Z with it: residuals are differences of a few nats."""
    rollouts = support.random_rollouts(12, count=64, longest=24, instances=8, log_reward_scale=3.0)
    for r in rollouts:
        r.log_reward = [float(torch.tensor(x - 1e4, dtype=torch.float32)) for x in r.log_reward]
        r.log_z = r.log_z - 1e4
        r.log_flow = [float(torch.tensor(x - 1e4, dtype=torch.float32)) for x in r.log_flow]
    single, gradients = run(name, rollouts, dtype=torch.float32)
    double, _ = run(name, rollouts, dtype=torch.float64)
    assert single.loss.item() == pytest.approx(double.loss.item(), rel=1e-5)
    for key in ("residual_abs_mean", "residual_abs_max"):
        assert single.metrics[key].item() == pytest.approx(double.metrics[key].item(), rel=1e-5), key
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_finite_when_single_states_fall_to_the_floor(name: str) -> None:
    rollouts = support.random_rollouts(13, count=64, longest=24, instances=8)
    for k, r in enumerate(rollouts):
        r.log_reward = [-1e4 if (k + t) % 5 == 0 else x for t, x in enumerate(r.log_reward)]
    single, gradients = run(name, rollouts, dtype=torch.float32)
    double, _ = run(name, rollouts, dtype=torch.float64)
    assert single.loss.item() == pytest.approx(double.loss.item(), rel=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_subtb_residual_between_high_states_survives_a_floor_state_between_them() -> None:
    """A perfect policy but for a state at log R = −1e4 in the middle; λ → ∞ looks across it."""
    batch = {
        "log_pf": torch.tensor([[-0.1234567, -0.7654321]]),
        "log_p_stop": torch.tensor([[-1.0, -1.0, -1.0]]),
        "log_reward": torch.tensor([[0.8888888, -1e4, 0.0]]),
        "length": torch.tensor([2]),
        "stopped": torch.tensor([True]),
        "instance": torch.tensor([0]),
    }
    assert LOSSES["subtb"](**batch, subtb_lambda=1e300).loss.item() < 1e-12


rollout_lists = st.builds(
    support.random_rollouts,
    st.integers(0, 2**31),
    count=st.integers(1, 9),
    longest=st.integers(0, 5),
    instances=st.integers(1, 4),
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(rollouts=rollout_lists, extra=st.integers(0, 4), data=st.data())
def test_order_and_extra_padding_do_not_matter(
    name: str, rollouts: list[support.Rollout], extra: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(rollouts))))
    first, first_gradients = run(name, rollouts, with_pb=True)
    second, second_gradients = run(name, [rollouts[k] for k in order], extra=extra, with_pb=True)
    for key, value in first.metrics.items():
        assert second.metrics[key].item() == pytest.approx(value.item(), abs=1e-9), key
    for key, gradient in first_gradients.items():
        moved = second_gradients[key]
        kept = moved[:, : gradient.shape[1]] if gradient.dim() == 2 else moved
        torch.testing.assert_close(kept, gradient[list(order)])
        if moved.dim() == 2:
            assert moved[:, gradient.shape[1] :].count_nonzero() == 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(rollouts=rollout_lists, data=st.data())
def test_var_tb_does_not_see_a_shift_of_an_instances_log_rewards(
    rollouts: list[support.Rollout], data: st.DataObject
) -> None:
    """R → c_g · R only changes Z(g), which the variance removes, instance by instance."""
    before, _ = run("var_tb", rollouts)
    shifts = data.draw(st.lists(st.floats(-50, 50), min_size=4, max_size=4))
    for r in rollouts:
        r.log_reward = [x + shifts[r.instance] for x in r.log_reward]
    after, _ = run("var_tb", rollouts)
    assert after.loss.item() == pytest.approx(before.loss.item(), abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("log_pf", torch.zeros(3), "log_pf must have shape"),
        ("log_p_stop", torch.zeros(3, 2), r"log_p_stop must have shape \(3, 3\)"),
        ("log_reward", torch.zeros(3, 3, dtype=torch.bfloat16), "log_reward must be float32 or float64"),
        ("length", torch.tensor([0, 1, 3]), r"length must hold whole numbers in 0\.\.2"),
        ("length", torch.tensor([0, 1, -1]), r"length must hold whole numbers in 0\.\.2"),
        ("stopped", torch.ones(3), "stopped must be bool"),
        ("instance", torch.zeros(4), "instance must have shape"),
        ("log_pb", torch.zeros(3, 3), "log_pb must have shape"),
        ("residual_clip", 0.0, "residual_clip must be positive"),
        ("residual_clip", math.nan, "residual_clip must be positive"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name: str, key: str, value: object, message: str) -> None:
    batch: dict[str, Any] = {
        "log_pf": torch.zeros(3, 2),
        "log_p_stop": torch.zeros(3, 3),
        "log_reward": torch.zeros(3, 3),
        "length": torch.tensor([0, 1, 2]),
        "stopped": torch.tensor([True, True, False]),
        "instance": torch.tensor([0, 0, 1]),
    }
    if name == "tb":
        batch["log_z"] = torch.zeros(3)
    if name in support.WITH_FLOW:
        batch["log_flow"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=message):
        LOSSES[name](**{**batch, key: value})


@pytest.mark.parametrize("name", ["subtb", "flow_subtb", "fl_subtb"])
@pytest.mark.parametrize("subtb_lambda", [0.0, -0.5, math.inf, math.nan])
def test_subtb_refuses_a_lambda_that_is_not_positive_and_finite(name: str, subtb_lambda: float) -> None:
    rollouts = support.random_rollouts(0)
    batch = support.pad_rollouts(rollouts)
    with pytest.raises(ValueError, match="subtb_lambda must be positive and finite"):
        LOSSES[name](**batch, **support.extras(name, rollouts, batch), subtb_lambda=subtb_lambda)


@pytest.mark.parametrize("name", support.WITH_FLOW)
def test_a_flow_of_another_shape_is_refused(name: str) -> None:
    batch = support.pad_rollouts(support.random_rollouts(0))
    with pytest.raises(ValueError, match="log_flow must have shape"):
        LOSSES[name](**batch, log_flow=torch.zeros(()))


@pytest.mark.parametrize("name", support.WITH_FLOW)
def test_only_the_stop_that_was_taken_counts_beside_a_learned_flow(name: str) -> None:
    rollouts = support.random_rollouts(17)
    before, gradients = run(name, rollouts)
    taken = gradients["log_p_stop"] != 0
    assert taken.sum() == sum(r.stopped for r in rollouts)
    for r in rollouts:
        r.log_p_stop[: r.n] = [-9.0] * r.n
    after, _ = run(name, rollouts)
    assert after.loss.item() == before.loss.item()


def test_tb_refuses_log_z_of_another_shape() -> None:
    batch = support.pad_rollouts(support.random_rollouts(0))
    with pytest.raises(ValueError, match="log_z must have shape"):
        LOSSES["tb"](**batch, log_z=torch.zeros(()))
