"""Memory of a pass from its shapes alone, against what is really allocated."""

import pytest
import torch
from torch import nn

from gflowvlm.learner import memory_trace
from gflowvlm.learner.memory_trace import PassShape, pass_bytes, peak_bytes
from gflowvlm.learner.model import empty_policy, load_policy
from gflowvlm.learner.tiny_policy import TinyShape, build_tiny_policy
from gflowvlm.shared.config import PolicySettings

WHOLE = PassShape(states=6, prompt=40, responses=6, response=12, shared=False)
SHARED = PassShape(states=2, prompt=40, responses=6, response=12, shared=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    shape = TinyShape(text_hidden=64, text_mlp=192, text_layers=7)
    return str(build_tiny_policy(tmp_path_factory.mktemp("deep"), shape=shape))


def settings(model, **changes):
    return PolicySettings(model=model, **changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "checkpointing"), [(WHOLE, False), (WHOLE, True), (SHARED, False)])
def test_a_pass_is_said_to_take_what_it_allocates(model, shape, checkpointing, dtype):
    chosen = settings(model, gradient_checkpointing=checkpointing, dtype=dtype)
    policy = load_policy(chosen, model, seed=0, device=torch.device("cpu"))
    allocated = pass_bytes(policy.get_base_model().get_decoder(), shape)
    assert peak_bytes(empty_policy(chosen, model), shape) == pytest.approx(allocated, rel=0.02)


def test_deep_models_are_told_from_a_few_of_their_layers(model, monkeypatch):
    policy = empty_policy(settings(model), model)
    told = peak_bytes(policy, WHOLE)
    monkeypatch.setattr(memory_trace, "TRACED_LAYERS", (2, 7))
    assert peak_bytes(policy, WHOLE) == pytest.approx(told, rel=0.01)
    assert len(policy.get_base_model().get_decoder().layers) == 7


def test_gradient_checkpointing_takes_a_fraction_and_longer_responses_take_more(model):
    kept = peak_bytes(empty_policy(settings(model), model), WHOLE)
    again = peak_bytes(empty_policy(settings(model, gradient_checkpointing=True), model), WHOLE)
    assert again < 0.5 * kept
    longer = PassShape(states=6, prompt=40, responses=6, response=24, shared=False)
    assert peak_bytes(empty_policy(settings(model), model), longer) > 1.15 * kept


def test_the_policy_is_left_as_it_was(model):
    policy = empty_policy(settings(model), model)
    before = dict(policy.named_parameters())
    peak_bytes(policy, WHOLE)
    assert all(before[name] is parameter for name, parameter in policy.named_parameters())
    assert {parameter.device.type for parameter in policy.parameters()} == {"meta"}


def test_a_language_model_of_another_kind_is_no_plan(model, monkeypatch):
    policy = empty_policy(settings(model), model)
    monkeypatch.setattr(type(policy.get_base_model()), "get_decoder", lambda self: nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="Linear cannot be traced"):
        peak_bytes(policy, WHOLE)
