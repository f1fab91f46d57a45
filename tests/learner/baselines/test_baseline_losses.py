"""PPO's and GRPO's formulas against plain loops."""

import math

import pytest
import torch

from gflowvlm.learner.baselines import clipped_policy_loss, generalised_advantages, group_advantages, value_loss


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padded(values, length):
    values = values.clone()
    for k, n in enumerate(length.tolist()):
        values[k, n:] = math.nan
    return values


LENGTH = torch.tensor([4, 1, 0, 3])


@pytest.mark.parametrize(("discount", "gae_lambda"), [(0.9, 0.95), (1.0, 1.0), (0.5, 0.0)])
def test_advantages_are_the_discounted_sums_of_the_residuals(discount, gae_lambda):
    reward, value = padded(random(4, 4, seed=1), LENGTH), padded(random(4, 4, seed=2), LENGTH)
    last = torch.tensor([0.0, 2.0, 5.0, 0.0], dtype=torch.float64)
    advantage = generalised_advantages(
        reward=reward, value=value, length=LENGTH, last_value=last, discount=discount, gae_lambda=gae_lambda
    )
    for k, n in enumerate(LENGTH.tolist()):
        values = [*value[k, :n].tolist(), last[k].item()]
        deltas = [reward[k, t].item() + discount * values[t + 1] - values[t] for t in range(n)]
        for t in range(4):
            expected = sum((discount * gae_lambda) ** (s - t) * deltas[s] for s in range(t, n)) if t < n else 0.0
            assert advantage[k, t].item() == pytest.approx(expected, abs=1e-12)


def test_without_discount_and_with_lambda_one_the_advantage_is_return_minus_value():
    reward, value, length = random(1, 3, seed=3), random(1, 3, seed=4), torch.tensor([3])
    advantage = generalised_advantages(
        reward=reward,
        value=value,
        length=length,
        last_value=torch.zeros(1, dtype=torch.float64),
        discount=1.0,
        gae_lambda=1.0,
    )
    torch.testing.assert_close(advantage + value, reward.flip(1).cumsum(1).flip(1))


def test_advantages_carry_no_gradient():
    value = random(2, 3).requires_grad_()
    advantage = generalised_advantages(
        reward=random(2, 3),
        value=value,
        length=torch.tensor([3, 2]),
        last_value=value[:, 0],
        discount=0.9,
        gae_lambda=0.9,
    )
    assert not advantage.requires_grad


def test_group_advantages_are_standard_scores_within_an_instance():
    total, instance = torch.tensor([1.0, 3.0, 10.0, 10.0, 7.0], dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2])
    torch.testing.assert_close(
        group_advantages(total, instance),
        torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64),
        rtol=1e-5,
        atol=1e-9,
    )


def test_the_surrogate_is_the_mean_of_the_clipped_gains():
    is_step = torch.arange(4) < LENGTH[:, None]
    old, advantage = padded(random(4, 4, seed=5), LENGTH), padded(random(4, 4, seed=6), LENGTH)
    new = padded(old + 0.3 * random(4, 4, seed=7), LENGTH).requires_grad_()
    output = clipped_policy_loss(log_prob=new, old_log_prob=old, advantage=advantage, is_step=is_step, clip=0.2)
    gains, clipped = [], 0
    for k, n in enumerate(LENGTH.tolist()):
        for t in range(n):
            ratio, a = math.exp(new[k, t].item() - old[k, t].item()), advantage[k, t].item()
            gains.append(min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
            clipped += abs(ratio - 1) > 0.2
    assert output.loss.item() == pytest.approx(-sum(gains) / len(gains))
    assert output.metrics["ratio_clipped_share"].item() == pytest.approx(clipped / len(gains))
    output.loss.backward()
    assert new.grad.isfinite().all()
    assert new.grad[~is_step].count_nonzero() == 0


def test_at_the_old_policy_the_gradient_is_the_policy_gradient():
    old, advantage = random(2, 3, seed=8), random(2, 3, seed=9)
    new = old.clone().requires_grad_()
    is_step = torch.ones(2, 3, dtype=torch.bool)
    output = clipped_policy_loss(log_prob=new, old_log_prob=old, advantage=advantage, is_step=is_step, clip=0.1)
    output.loss.backward()
    torch.testing.assert_close(new.grad, -advantage / 6)
    assert output.metrics["approximate_kl"].item() == 0.0


def test_the_value_is_fitted_to_the_returns():
    is_step = torch.arange(4) < LENGTH[:, None]
    returns = padded(random(4, 4, seed=10), LENGTH)
    value = padded(random(4, 4, seed=11), LENGTH).requires_grad_()
    output = value_loss(value=value, returns=returns, is_step=is_step)
    errors = [(value[k, t] - returns[k, t]).item() ** 2 for k, n in enumerate(LENGTH.tolist()) for t in range(n)]
    assert output.loss.item() == pytest.approx(0.5 * sum(errors) / len(errors))
    output.loss.backward()
    assert value.grad.isfinite().all()
    assert value_loss(value=returns, returns=returns, is_step=is_step).loss.item() == 0.0
    means = {"value_mean": value[is_step].mean().item(), "return_mean": returns[is_step].mean().item()}
    assert {name: output.metrics[name].item() for name in means} == pytest.approx(means)


@pytest.mark.parametrize("clip", [0.0, math.nan])
def test_a_clip_that_is_not_positive_is_refused(clip):
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="clip must be positive"):
        clipped_policy_loss(log_prob=x, old_log_prob=x, advantage=x, is_step=x == 0, clip=clip)


def test_an_empty_batch_gives_a_differentiable_zero():
    x = torch.zeros(2, 0, dtype=torch.float64, requires_grad=True)
    is_step = torch.zeros(2, 0, dtype=torch.bool)
    for output in (
        clipped_policy_loss(log_prob=x, old_log_prob=x, advantage=x, is_step=is_step, clip=0.1),
        value_loss(value=x, returns=x, is_step=is_step),
    ):
        assert output.loss.item() == 0.0
        output.loss.backward()
        assert all(metric.isfinite() for metric in output.metrics.values())
