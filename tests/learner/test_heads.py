import dataclasses
import math

import pytest
import torch

from gflowvlm.learner.heads import HEAD_OF_LOSS, HeadKind, StateHead
from gflowvlm.learner.learner import Learner
from gflowvlm.learner.losses import LOSSES
from gflowvlm.learner.model import adapter_parameters
from gflowvlm.learner.packing import steps_of
from gflowvlm.shared.trajectory import EndReason

WITH_HEAD = sorted(HEAD_OF_LOSS)


@pytest.fixture
def make_learner(tiny_model, make_config):
    def make(loss, **learner):
        return Learner(make_config(objective={"loss": loss, "residual_clip": None}, learner=learner), tiny_model)

    return make


def adapter_gradient(learner):
    return torch.cat([parameter.grad.flatten() for _, parameter in adapter_parameters(learner.policy)])


def test_a_head_is_the_same_for_the_same_seed_and_begins_as_a_constant():
    first, again, other = (StateHead(HeadKind.LOG_Z, 8, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.inner.weight, other.inner.weight)
    first.centre_on(torch.tensor([3.0, math.nan, -1000.0, 4.0, math.inf]))
    hidden = torch.randn(5, 8, dtype=torch.bfloat16)
    assert torch.equal(first(hidden), torch.full((5,), 3.0))
    first.centre_on(torch.tensor([math.nan]))
    assert float(first.centre) == 3.0
    assert next(name for name, _ in first.named_trainable()) == "log_z.norm.weight"


@pytest.mark.parametrize("loss", LOSSES)
def test_which_losses_have_a_head(make_learner, loss):
    assert (make_learner(loss)._head is None) == (loss in ("var_tb", "db", "subtb"))


@pytest.mark.parametrize("loss", WITH_HEAD)
def test_the_first_batch_centres_the_head(make_learner, make_trajectory, loss):
    """The level is right at once: the head's constant is the median of what the batch says."""
    learner = make_learner(loss, head_learning_rate=1e-12, learning_rate=1e-12, final_learning_rate=0.0)
    batch = make_trajectory.batch()
    first = learner.step(batch)
    centre = float(learner._head.centre)
    assert centre != 0.0
    # The first step is taken with it already.
    assert learner.step(batch)["loss"] == pytest.approx(first["loss"], rel=1e-5)
    learner._head.centre += 300.0
    assert learner.step(batch)["loss"] > first["loss"] + 100
    # Later batches leave it alone.
    assert float(learner._head.centre) == pytest.approx(centre + 300.0)


def test_what_the_head_learns_reaches_the_adapter(make_learner, make_trajectory):
    """Once its last layer is not zero, the gradient goes on into the features of the prompt."""
    learner = make_learner("tb", grad_clip=1e6)
    batch = make_trajectory.batch()
    learner.step(batch)
    learner._optimization.zero_grad()
    (micro_batch,) = learner._scorer.pack(steps_of(batch)[:1])
    learner._scored(micro_batch)[1][:, -1].sum().backward()
    assert any(float(p.grad.abs().max()) > 0 for _, p in adapter_parameters(learner.policy) if p.grad is not None)


def test_adapter_and_head_are_clipped_apart(make_learner, make_trajectory):
    batch = make_trajectory.batch()
    norms = {}
    for clip in (1e6, 0.5):
        learner = make_learner("tb", grad_clip=clip)
        metrics = learner.step(batch)
        norms[clip] = metrics["grad_norm"], metrics["head_grad_norm"]
        head = torch.cat([p.grad.flatten() for p in learner._head.parameters()])
        assert float(head.norm()) == pytest.approx(min(clip, metrics["head_grad_norm"]), rel=1e-4)
        assert float(adapter_gradient(learner).norm()) == pytest.approx(min(clip, metrics["grad_norm"]), rel=1e-4)
    assert norms[0.5] == pytest.approx(norms[1e6])
    assert min(norms[0.5]) > 0.5


def test_the_head_has_its_own_learning_rate(make_learner, make_trajectory):
    learner = make_learner("tb", head_learning_rate=0.02, learning_rate=1e-3, final_learning_rate=1e-3)
    learner.step(make_trajectory.batch())
    # AdamW's first step is the learning rate itself.
    assert float(learner._head.outer.bias.detach().abs()) == pytest.approx(0.02, rel=1e-3)


def test_losses_with_a_head_report_log_z(make_learner, make_trajectory):
    """At first: the head's constant, and with forward-looking what has been earned at the first states."""
    batch = make_trajectory.batch()
    for loss in WITH_HEAD:
        learner = make_learner(loss)
        found, centre = learner.step(batch)["log_z"], float(learner._head.centre)
        earned = learner.config.target.reward_exponent * sum(t.log_rewards[0] for t in batch) / len(batch)
        assert found == pytest.approx(centre + earned if loss.startswith("fl_") else centre, rel=1e-5)
    metrics = make_learner("subtb").step(batch)
    assert "log_z" not in metrics
    assert "head_grad_norm" not in metrics


def test_a_head_that_is_a_number_of_the_prompt_does_not_see_the_response(make_learner, make_trajectory):
    learner = make_learner("flow_db")
    with torch.no_grad():
        learner._head.outer.weight.fill_(1.0)
    first, second = (make_trajectory([action], EndReason.INVALID) for action in ("jump", None))
    pair = [first, dataclasses.replace(second, images=first.images)]
    (micro_batch,) = learner._scorer.pack(steps_of(pair))
    with torch.no_grad():
        values = learner._scored(micro_batch)[1][:, -1]
    torch.testing.assert_close(values[0], values[1])
    assert len(pair[0].steps[0].response_ids) != len(pair[1].steps[0].response_ids)
