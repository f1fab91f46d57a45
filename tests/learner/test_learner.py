import dataclasses
import math

import pytest
import torch

from gflowvlm.learner.learner import Learner
from gflowvlm.learner.losses import LOSSES
from gflowvlm.learner.mismatch import compare
from gflowvlm.learner.model import adapter_parameters
from gflowvlm.learner.optimization import MAX_SKIPPED_IN_A_ROW, learning_rate
from gflowvlm.learner.packing import steps_of
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.learner_settings import LearnerSettings
from gflowvlm.shared.metrics import STEP_METRICS
from gflowvlm.shared.trajectory import EndReason


def gradients(learner):
    """Of the adapter, and of the head after it where the loss has one."""
    return torch.cat([parameter.grad.flatten() for parameter in learner._optimization.parameters])


def parameters(learner):
    return torch.cat([parameter.detach().flatten() for _, parameter in adapter_parameters(learner.policy)])


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_do_not_depend_on_the_token_budget(tiny_model, make_config, make_trajectory, loss):
    batch = make_trajectory.batch()
    results, metrics = [], []
    for budget in (100_000, 150):
        objective = {"loss": loss, "residual_clip": None}
        config = make_config(objective=objective, learner={"token_budget": budget, "grad_clip": 1e6})
        learner = Learner(config, tiny_model)
        learner.step(batch)
        metrics.append(learner.step(batch))  # from here on a head says more than a constant
        results.append(gradients(learner))
    assert metrics[0]["micro_batches"] == 1
    assert metrics[1]["micro_batches"] > 4
    assert float(results[0].abs().max()) > 0
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5 * float(results[0].abs().max()))
    assert metrics[1]["loss"] == pytest.approx(metrics[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_repeated_steps_on_a_batch_lower_its_loss(tiny_model, make_config, make_trajectory, loss):
    config = make_config(objective={"loss": loss}, learner={"learning_rate": 5e-3, "final_learning_rate": 5e-3})
    learner = Learner(config, tiny_model)
    batch = make_trajectory.batch()
    losses = [learner.step(batch)["loss"] for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


def test_reports_what_it_did(tiny_model, make_config, make_trajectory):
    learner = Learner(make_config(), tiny_model)
    batch = make_trajectory.batch()
    metrics = learner.step(batch)
    assert metrics["trajectories"] == metrics["trajectories_used"] == len(batch)
    assert metrics["responses"] == sum(len(t.steps) for t in batch)
    assert metrics["response_tokens"] == sum(t.response_tokens for t in batch)
    assert metrics["updated"] == 1.0
    assert metrics["lr"] == learner.config.learner.learning_rate
    assert metrics["log_pf_mean"] < 0
    assert metrics["groups"] == 2
    assert metrics["mismatch_share"] == 0.0
    assert all(math.isfinite(value) for value in metrics.values())
    assert learner.steps_taken == 1


@pytest.mark.parametrize("objective", [*LOSSES, "sft", "ppo", "grpo"])
def test_every_figure_of_a_step_has_a_name_in_the_runs_metrics(tiny_model, make_config, make_trajectory, objective):
    expert = dataclasses.replace(make_trajectory(["+", "[DONE]"], EndReason.DONE), expert=True)
    learner = Learner(make_config(objective={"loss": objective}), tiny_model)
    reported = set(learner.step([*make_trajectory.batch(), expert])) - {"response_tokens"}  # _scored in the log
    assert reported - {spec.name for spec in STEP_METRICS} == set()


def test_its_own_log_probabilities_are_no_mismatch(tiny_model, make_config, make_trajectory):
    learner = Learner(make_config(), tiny_model)
    batch = make_trajectory.batch()
    scores = learner.score(batch)
    sampled = [
        dataclasses.replace(
            t,
            steps=[dataclasses.replace(s, sampler_log_probs=p) for s, p in zip(t.steps, values, strict=True)],
        )
        for t, values in zip(batch, scores, strict=True)
    ]
    metrics = learner.step(sampled)
    assert metrics["mismatch_share"] == 1.0
    assert metrics["mismatch_max"] < 1e-5
    assert compare(sampled, learner.score(sampled)).max > 1e-5  # the step moved the policy


@pytest.mark.parametrize("loss", ["var_tb", "subtb", "tb", "flow_subtb", "fl_db"])
def test_a_policy_that_is_the_reference_feels_nothing_of_its_chains_of_thought(
    tiny_model, make_config, make_trajectory, loss
):
    """With reference_weight = cot_weight; the fresh adapter is the reference."""
    batch = make_trajectory.batch()
    losses = {}
    for gamma, alpha in ((0.4, 0.4), (0.0, 0.0), (0.4, 0.0)):
        config = make_config(policy={"cot_weight": gamma}, target={"reference_weight": alpha}, objective={"loss": loss})
        losses[gamma, alpha] = Learner(config, tiny_model).step(batch)["loss"]
    assert losses[0.4, 0.4] == pytest.approx(losses[0.0, 0.0], rel=1e-6)
    assert losses[0.4, 0.0] != pytest.approx(losses[0.0, 0.0], rel=1e-2)


def test_the_reference_stays_where_training_began(tiny_model, make_config, make_trajectory):
    batch = make_trajectory.batch()
    config = make_config(learner={"learning_rate": 5e-2})
    moved, fresh = Learner(config, tiny_model), Learner(config, tiny_model)
    moved.step(make_trajectory.batch())
    scores = [ln._reference.log_cot(batch, ln._scorer.pack(steps_of(batch))) for ln in (moved, fresh)]
    torch.testing.assert_close(scores[0], scores[1])
    assert compare_first_token(moved, fresh, batch) > 1e-3


def compare_first_token(first, second, batch):
    return abs(first.score(batch)[0][0][0] - second.score(batch)[0][0][0])


def test_remembered_reference_scores_change_nothing(tiny_model, make_config, make_trajectory):
    batch = make_trajectory.batch(instances=3)
    half = len(batch) // 2
    fresh, warm = (Learner(make_config(learner={"learning_rate": 1e-12}), tiny_model) for _ in range(2))
    warm.step(batch[:half])
    assert warm.step(batch)["loss"] == pytest.approx(fresh.step(batch)["loss"], rel=1e-6)


def settings_state(learner):
    """Parameters and AdamW's moments."""
    return [parameters(learner), *(tensor.clone() for tensor in learner._optimization.tensors().values())]


@pytest.mark.parametrize("objective", ["var_tb", "grpo", "sft"])
def test_batches_without_signal_move_neither_adapter_nor_momentum_nor_schedule(
    tiny_model, make_config, make_trajectory, objective
):
    config = make_config(objective={"loss": objective}, learner={"weight_decay": 0.1})
    learner, undisturbed = Learner(config, tiny_model), Learner(config, tiny_model)
    batch = [
        dataclasses.replace(t, original_rewards=[float(place)] * len(t.steps), expert=objective == "sft")
        for place, t in enumerate(make_trajectory.batch())
    ]
    # One of an instance is no group; rewards that differ by rounding only are equal; nobody is an expert.
    alone = [make_trajectory(["+"], EndReason.STEP_LIMIT, instance=i) for i in range(2)]
    equal = [
        dataclasses.replace(make_trajectory(actions, EndReason.STEP_LIMIT), original_rewards=rewards)
        for actions, rewards in ((["+"], [0.3]), (["-", "+"], [0.1, 0.2]), (["-"], [0.3]))
    ]
    nothing = {"var_tb": alone, "grpo": equal, "sft": alone}[objective]
    learner.step(batch)
    before = settings_state(learner)
    for count in (1, 2, 3):
        metrics = learner.step(nothing)
        assert (metrics["updated"], metrics["grad_norm"], metrics["steps_without_signal"]) == (0.0, 0.0, count)
    assert all(torch.equal(now, then) for now, then in zip(settings_state(learner), before, strict=True))
    undisturbed.step(batch)
    assert learner.step(batch)["lr"] == undisturbed.step(batch)["lr"]
    assert torch.equal(parameters(learner), parameters(undisturbed))
    assert (learner.steps_taken, undisturbed.steps_taken) == (5, 2)


def test_a_learner_that_asked_for_no_gpu_uses_none_where_torch_sees_one(tiny_model, make_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    learner = Learner(make_config(), tiny_model)
    assert learner.device == torch.device("cpu")
    assert {parameter.device.type for parameter in learner.policy.parameters()} == {"cpu"}


def test_gradients_that_are_not_finite_are_skipped_and_then_end_the_run(tiny_model, make_config, make_trajectory):
    learner = Learner(make_config(), tiny_model)
    batch = make_trajectory.batch(instances=1)
    learner.step(batch)
    _, poisoned = adapter_parameters(learner.policy)[-1]
    with torch.no_grad():
        poisoned[0, 0] = math.inf
    before = parameters(learner)
    for skipped in range(1, MAX_SKIPPED_IN_A_ROW):
        assert learner.step(batch)["skipped_updates"] == skipped
    torch.testing.assert_close(parameters(learner), before, rtol=0, atol=0)
    with pytest.raises(UserError, match="not finite 5 times in a row"):
        learner.step(batch)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model, make_config, make_trajectory):
    batch = make_trajectory.batch(instances=1)
    results = []
    for checkpointing in (False, True):
        learner = Learner(make_config(policy={"gradient_checkpointing": checkpointing}), tiny_model)
        recomputed = []
        hook = (
            learner.policy.get_base_model()
            .get_decoder()
            .layers[0]
            .mlp.register_forward_pre_hook(lambda *_, calls=recomputed: calls.append(1))
        )
        learner.step(batch)
        hook.remove()
        results.append((gradients(learner), len(recomputed)))
    torch.testing.assert_close(results[1][0], results[0][0])
    # Reference and policy, states and responses apart. With checkpointing together, once more for the gradient.
    assert [passes for _, passes in results] == [4, 3]


@pytest.mark.parametrize("loss", ["subtb", "fl_subtb"])
def test_bfloat16_with_checkpointing_and_a_small_budget_learns(tiny_model, make_config, make_trajectory, loss):
    config = make_config(
        policy={"dtype": "bfloat16", "gradient_checkpointing": True},
        objective={"loss": loss},
        learner={"token_budget": 512},
    )
    metrics = Learner(config, tiny_model).step(make_trajectory.batch())
    assert math.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 0


def test_learning_rate_rises_then_falls_to_the_final_rate():
    settings = LearnerSettings(steps=11, warmup_steps=4, learning_rate=1.0, final_learning_rate=0.1)
    rates = [learning_rate(settings, step) for step in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:11] == sorted(rates[4:11], reverse=True)
    assert rates[10] == rates[11] == pytest.approx(0.1)
    assert rates[7] == pytest.approx(0.55)


SHARED_GPU = {"sampler": {"sleep_level": 1, "engine": "transformers"}, "learner": {"offload": True}}


def test_a_learner_that_leaves_its_device_between_steps_learns_the_same(tiny_model, make_config, make_trajectory):
    batch = make_trajectory.batch()
    staying, leaving = Learner(make_config(), tiny_model), Learner(make_config(**SHARED_GPU), tiny_model)
    for _ in range(3):
        staying.step(batch)
        leaving.enter_device()
        leaving.step(batch)
        leaving.leave_device()
        assert all(parameter.grad is None for parameter in leaving.policy.parameters())
    assert torch.equal(parameters(leaving), parameters(staying))


def test_all_that_a_learner_computes_with_comes_to_its_device(tiny_model, make_config, make_trajectory):
    learner = Learner(make_config(objective={"loss": "tb"}, **SHARED_GPU), tiny_model)
    learner.step(make_trajectory.batch())
    learner.device = torch.device("meta")
    learner.enter_device()
    assert {p.device.type for p in (*learner.policy.parameters(), *learner._head.parameters())} == {"meta"}
    moments = learner._optimization._adamw.state.values()
    assert len(moments) == len(learner._optimization.parameters)
    for entries in moments:
        # AdamW counts its steps on the CPU.
        assert {name: value.device.type for name, value in entries.items()} == {
            "step": "cpu",
            "exp_avg": "meta",
            "exp_avg_sq": "meta",
        }


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_a_learner_of_a_model_in_fewer_bits_learns(tiny_model, make_config, make_trajectory, load_in):
    pytest.importorskip("bitsandbytes")
    rate = {"learning_rate": 5e-3, "final_learning_rate": 5e-3}
    learner = Learner(make_config(policy={"load_in": load_in, "dtype": "bfloat16"}, learner=rate), tiny_model)
    batch = make_trajectory.batch()
    losses = [learner.step(batch)["loss"] for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
