"""Values, metrics and gradients against plain loops in float64, and the limits of SubTB(λ)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gflowvlm.learner.losses import LOSSES, db, subtb, tb, var_tb
from tests.learner.losses import support

SEEDS = range(6)


@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("with_pb", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss_and_residual_metrics_equal_the_loops(name: str, seed: int, with_pb: bool, clip: float | None) -> None:
    rollouts = support.random_rollouts(seed)
    batch = support.pad_rollouts(rollouts, with_pb=with_pb)
    output = LOSSES[name](**batch, **support.extras(name, rollouts, batch), residual_clip=clip)

    weighted = support.REFERENCES[name](rollouts if with_pb else support.without_pb(rollouts))
    residuals = [r for row in weighted for _, r in row]
    expected = {
        "loss": support.reference_mean(weighted, lambda r: support.reference_penalty(r, clip)),
        "residual_abs_mean": support.reference_mean(weighted, abs),
        "residual_abs_max": max(abs(r) for r in residuals),
        "residual_clipped_share": support.reference_mean(weighted, lambda r: float(clip is not None and abs(r) > clip)),
        "trajectories_used": sum(bool(row) for row in weighted),
        "trajectories_dropped": sum(not row for row in weighted),
    }
    assert output.loss.item() == pytest.approx(expected["loss"], abs=1e-9)
    for key, value in expected.items():
        assert not output.metrics[key].requires_grad
        assert output.metrics[key].item() == pytest.approx(value, abs=1e-9), key


@pytest.mark.parametrize("seed", SEEDS)
def test_var_tb_reports_groups_and_log_z(seed: int) -> None:
    rollouts = support.without_pb(support.random_rollouts(seed, count=12, instances=6))
    metrics = var_tb(**support.pad_rollouts(rollouts)).metrics
    groups: dict[int, list[float]] = {}
    for r in rollouts:
        if r.stopped:
            groups.setdefault(r.instance, []).append(r.zeta())
    used = [zeta for group in groups.values() if len(group) > 1 for zeta in group]
    assert metrics["groups"] == sum(len(group) > 1 for group in groups.values())
    assert metrics["groups_of_one"] == sum(len(group) == 1 for group in groups.values())
    assert metrics["log_z"].item() == pytest.approx(-sum(used) / len(used), abs=1e-9)


def test_tb_reports_mean_log_z_of_complete_trajectories() -> None:
    rollouts = support.random_rollouts(1)
    complete = [r.log_z for r in rollouts if r.stopped]
    metrics = tb(**support.pad_rollouts(rollouts), log_z=support.log_z_of(rollouts)).metrics
    assert metrics["log_z"].item() == pytest.approx(sum(complete) / len(complete))


@pytest.mark.parametrize("subtb_lambda", [1e-3, 0.5, 1.0, 1.7, 40.0])
def test_subtb_equals_the_loops_for_every_lambda(subtb_lambda: float) -> None:
    rollouts = support.random_rollouts(11, longest=9)
    output = subtb(**support.pad_rollouts(rollouts, with_pb=True), subtb_lambda=subtb_lambda)
    weighted = support.reference_subtb(rollouts, subtb_lambda)
    assert output.loss.item() == pytest.approx(support.reference_mean(weighted, lambda r: r**2), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subtb_tends_to_db_for_small_lambda(dtype: torch.dtype) -> None:
    batch = support.pad_rollouts(support.random_rollouts(3, longest=64), dtype=dtype, with_pb=True)
    assert subtb(**batch, subtb_lambda=1e-300).loss.item() == pytest.approx(db(**batch).loss.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subtb_tends_to_tb_for_large_lambda(dtype: torch.dtype) -> None:
    """The one sub-trajectory left is the whole: TB with log Z = log R_0 − log P(⊤ | 0)."""
    rollouts = [r for r in support.random_rollouts(4, longest=64) if r.n > 0 and r.stopped]
    batch = support.pad_rollouts(rollouts, dtype=dtype, with_pb=True)
    log_z = batch["log_reward"][:, 0] - batch["log_p_stop"][:, 0]
    expected = tb(**batch, log_z=log_z).loss.item()
    assert subtb(**batch, subtb_lambda=1e300).loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("forward_looking", [False, True])
@pytest.mark.parametrize("subtb_lambda", [1e-3, 0.5, 1.0, 1.7, 40.0])
def test_subtb_with_a_learned_flow_equals_the_loops_for_every_lambda(
    subtb_lambda: float, forward_looking: bool
) -> None:
    rollouts = support.random_rollouts(12, longest=9)
    name = "fl_subtb" if forward_looking else "flow_subtb"
    batch = support.pad_rollouts(rollouts, with_pb=True)
    output = LOSSES[name](**batch, **support.extras(name, rollouts, batch), subtb_lambda=subtb_lambda)
    weighted = support.reference_flow_subtb(rollouts, subtb_lambda, forward_looking)
    assert output.loss.item() == pytest.approx(support.reference_mean(weighted, lambda r: r**2), rel=1e-9)


@pytest.mark.parametrize("kind", ["flow", "fl"])
def test_subtb_with_a_learned_flow_tends_to_its_detailed_balance_for_small_lambda(kind: str) -> None:
    rollouts = support.random_rollouts(13, longest=64)
    batch = support.pad_rollouts(rollouts, with_pb=True)
    batch |= support.extras(f"{kind}_db", rollouts, batch)
    expected = LOSSES[f"{kind}_db"](**batch).loss.item()
    assert LOSSES[f"{kind}_subtb"](**batch, subtb_lambda=1e-300).loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["flow", "fl"])
def test_subtb_with_a_learned_flow_tends_to_tb_for_large_lambda(kind: str) -> None:
    """The one sub-trajectory left leads from the first state to the terminal one: TB with log Z = log F_0."""
    rollouts = [r for r in support.random_rollouts(14, longest=64) if r.stopped]
    batch = support.pad_rollouts(rollouts, with_pb=True)
    log_z = torch.tensor([r.log_flow[0] for r in rollouts], dtype=torch.float64)
    batch_of_flows = batch | support.extras(f"{kind}_subtb", rollouts, batch)
    output = LOSSES[f"{kind}_subtb"](**batch_of_flows, subtb_lambda=1e300)
    assert output.loss.item() == pytest.approx(tb(**batch, log_z=log_z).loss.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["db", "subtb"])
def test_forward_looking_is_the_same_loss_in_other_variables(kind: str) -> None:
    """log F = log F̃ + log R: only what is learned differs."""
    rollouts = support.random_rollouts(15)
    batch = support.pad_rollouts(rollouts)
    plain, ahead = f"flow_{kind}", f"fl_{kind}"
    expected = LOSSES[plain](**batch, **support.extras(plain, rollouts, batch)).loss.item()
    assert LOSSES[ahead](**batch, **support.extras(ahead, rollouts, batch)).loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["db", "subtb"])
def test_a_flow_of_reward_over_stop_probability_gives_the_loss_without_a_learned_flow(kind: str) -> None:
    """With log F_t = log R_t − log P(⊤ | t) the transition to the terminal state is balanced by itself."""
    rollouts = [r for r in support.random_rollouts(16) if not r.stopped]
    for r in rollouts:
        r.log_flow = [reward - stop for reward, stop in zip(r.log_reward, r.log_p_stop, strict=True)]
    batch = support.pad_rollouts(rollouts)
    learned = LOSSES[f"flow_{kind}"](**batch, **support.extras(f"flow_{kind}", rollouts, batch))
    assert learned.loss.item() == pytest.approx(LOSSES[kind](**batch).loss.item(), abs=1e-9)


def test_trajectories_of_one_transition_make_subtb_db() -> None:
    rollouts = support.random_rollouts(5, longest=1)
    batch = support.pad_rollouts(rollouts)
    assert subtb(**batch).loss.item() == pytest.approx(db(**batch).loss.item(), abs=1e-12)


def test_var_tb_is_tb_at_the_best_constant_log_z_per_instance() -> None:
    rollouts = [r for r in support.random_rollouts(6, instances=3) if r.stopped]
    batch = support.pad_rollouts(rollouts)
    log_z = torch.zeros(len(rollouts), dtype=torch.float64)
    for g in range(3):
        group = [-r.zeta() for r in support.without_pb(rollouts) if r.instance == g]
        assert len(group) > 1
        log_z[batch["instance"] == g] = sum(group) / len(group)
    assert var_tb(**batch).loss.item() == pytest.approx(tb(**batch, log_z=log_z).loss.item(), abs=1e-9)


@pytest.mark.parametrize("clip", [None, 1.5])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_equal_finite_differences(name: str, clip: float | None) -> None:
    rollouts = support.random_rollouts(7, count=7, longest=3, instances=2)
    batch = support.pad_rollouts(rollouts, padding=0.0, with_pb=True)
    batch |= support.extras(name, rollouts, batch, padding=0.0)
    learned = [key for key, value in batch.items() if value.is_floating_point()]

    def loss_of(*values: Tensor) -> Tensor:
        return LOSSES[name](**{**batch, **dict(zip(learned, values, strict=True))}, residual_clip=clip).loss

    inputs = [batch[key].clone().requires_grad_() for key in learned]
    assert torch.autograd.gradcheck(loss_of, inputs, atol=1e-7)


def test_clip_bounds_the_slope_without_killing_it() -> None:
    log_z = torch.tensor([1.0, 50.0], dtype=torch.float64, requires_grad=True)
    tb(
        log_pf=torch.zeros(2, 0, dtype=torch.float64),
        log_p_stop=torch.zeros(2, 1, dtype=torch.float64),
        log_reward=torch.zeros(2, 1, dtype=torch.float64),
        length=torch.tensor([0, 0]),
        stopped=torch.tensor([True, True]),
        instance=torch.tensor([0, 1]),
        log_z=log_z,
        residual_clip=10.0,
    ).loss.backward()
    assert log_z.grad is not None
    assert log_z.grad.tolist() == [2 * 1.0 / 2, 2 * 10.0 / 2]
