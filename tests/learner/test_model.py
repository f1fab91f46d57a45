import pytest
import torch

from gflowvlm.learner import model
from gflowvlm.learner.model import adapter_parameters, load_policy, reference_policy
from gflowvlm.learner.tiny_policy import build_tiny_policy
from gflowvlm.shared.config import PolicySettings
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.precision import QUANTIZED_LIMITS

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_computes_in_the_models_precision_from_float32_weights(tiny_model, dtype):
    policy = load(tiny_model, dtype=dtype)
    layer = policy.get_decoder().layers[0].self_attn.q_proj
    precision = getattr(torch, dtype)
    seen = []
    layer.lora_A["default"].register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(0.0, 0.1)
    hidden = torch.randn(5, layer.in_features, dtype=precision)
    output = layer(hidden)
    assert seen == [precision]
    a, b = (part["default"].weight.detach().to(precision) for part in (layer.lora_A, layer.lora_B))
    expected = layer.base_layer(hidden) + hidden @ a.T @ b.T * layer.scaling["default"]
    torch.testing.assert_close(output, expected, rtol=1.6e-2 if dtype == "bfloat16" else 1e-5, atol=1e-2)
    output.sum().backward()
    for name, parameter in adapter_parameters(policy):
        assert parameter.dtype == torch.float32
        if ".layers.0.self_attn.q_proj." in name:
            assert parameter.grad.dtype == torch.float32
            # Below what bfloat16 could hold beside the weight.
            before = parameter.detach().clone()
            with torch.no_grad():
                parameter.mul_(1.0 + 1e-5)
            assert not torch.equal(parameter, before)


def test_fewer_bits_without_bitsandbytes_are_one_line(tiny_model, monkeypatch):
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^policy\.load_in = 4bit: needs bitsandbytes[^\n]*$"):
        load(tiny_model, load_in="4bit")


@pytest.mark.parametrize(("load_in", "kind"), [("8bit", torch.int8), ("4bit", torch.uint8)])
def test_a_model_in_fewer_bits_keeps_adapter_and_head_and_scores_nearly_the_same(tiny_model, load_in, kind):
    pytest.importorskip("bitsandbytes")
    whole, rounded = load(tiny_model), load(tiny_model, load_in=load_in)
    layer = rounded.get_decoder().layers[0].self_attn.q_proj
    assert layer.base_layer.weight.dtype == kind
    assert rounded.get_base_model().lm_head.weight.dtype == torch.float32
    for (name, one), (other_name, other) in zip(adapter_parameters(whole), adapter_parameters(rounded), strict=True):
        assert name == other_name
        assert torch.equal(one, other)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        exact, found = (policy(input_ids=ids).logits.log_softmax(-1) for policy in (whole, rounded))
    difference = float((exact - found).abs().mean())
    assert 0.0 < difference < QUANTIZED_LIMITS[load_in].mean
