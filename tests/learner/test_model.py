import pytest
import torch

from gflowvlm.learner.model import adapter_parameters, load_policy, reference_policy
from gflowvlm.learner.tiny_policy import build_tiny_policy
from gflowvlm.shared.config import PolicySettings
from gflowvlm.shared.errors import UserError

CPU = torch.device("cpu")


def load(model, seed=0, **settings):
    return load_policy(PolicySettings(**settings), model, seed=seed, device=CPU)


def test_only_the_language_model_gets_an_adapter_though_the_vision_tower_has_layers_of_the_same_name(tiny_model):
    names = [name for name, _ in adapter_parameters(load(tiny_model))]
    assert len(names) == 3 * 7 * 2  # layers, linears, A and B
    assert all(".text_model.layers." in name and "lora_" in name for name in names)


def test_adapter_depends_on_the_seed_alone_and_starts_as_the_base_model(tiny_model):
    before = torch.get_rng_state()
    first, again, other = load(tiny_model, 3), load(tiny_model, 3), load(tiny_model, 4)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, a), (_, b), (_, c) in zip(
        adapter_parameters(first), adapter_parameters(again), adapter_parameters(other), strict=True
    ):
        assert torch.equal(a, b)
        assert bool((a == 0).all()) if "lora_B" in name else not torch.equal(a, c)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("fc1", "outside the language model"),
        ("vision_model.encoder.layers.0.self_attn.q_proj", "outside the language model"),
        ("modality_projection.proj", "outside the language model"),
        ("lm_head", "outside the language model"),
        ("qproj", "names no linear layer"),
    ],
)
def test_targets_outside_the_language_model_are_refused(tiny_model, target, reason):
    with pytest.raises(UserError, match=f"(?s){reason}.*q_proj") as caught:
        load(tiny_model, lora_targets=["q_proj", target])
    assert target in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_directory_and_damaged_weights_are_one_line_errors(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        load(str(tmp_path / "nowhere"))
    folder = build_tiny_policy(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="weights cannot be loaded") as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


def test_bfloat16_model_keeps_a_float32_adapter(tiny_model):
    policy = load(tiny_model, dtype="bfloat16")
    assert all(parameter.dtype == torch.float32 for _, parameter in adapter_parameters(policy))
    assert policy.get_base_model().lm_head.weight.dtype == torch.bfloat16


def test_reference_policy_is_the_model_without_its_adapter_and_records_no_gradients(tiny_model):
    policy = load(tiny_model)
    ids = torch.tensor([[7, 8, 9]])
    base = policy(input_ids=ids).logits
    with torch.no_grad():
        for _, parameter in adapter_parameters(policy):
            parameter.add_(0.1)
    assert not torch.allclose(policy(input_ids=ids).logits, base, atol=1e-3)
    with reference_policy(policy) as reference:
        logits = reference(input_ids=ids).logits
    assert torch.equal(logits, base)
    assert not logits.requires_grad
    assert policy(input_ids=ids).logits.requires_grad
