import resource

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from learner.learner import Learner
from learner.model import adapter_parameters
from shared.errors import UserError

FILES = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "optimizer.safetensors", "state.json"]


@pytest.fixture
def batches(make_trajectory):
    return [make_trajectory.batch() for _ in range(4)]


@pytest.fixture
def learner(tiny_model, make_config):
    return Learner(make_config(), tiny_model)


def parameters(learner):
    return torch.cat([parameter.detach().flatten() for _, parameter in adapter_parameters(learner.policy)])


def test_a_resumed_learner_goes_on_as_if_it_had_never_stopped(learner, tiny_model, make_config, batches, tmp_path):
    for batch in batches[:2]:
        learner.step(batch)
    learner.save(tmp_path / "step-2")
    expected = [learner.step(batch) for batch in batches[2:]]

    resumed = Learner(make_config(), tiny_model)
    resumed.load(tmp_path / "step-2")
    assert resumed.steps_taken == 2
    found = [resumed.step(batch) for batch in batches[2:]]
    for a, b in zip(found, expected, strict=True):
        assert {k: v for k, v in a.items() if "seconds" not in k} == {k: v for k, v in b.items() if "seconds" not in k}
    assert torch.equal(parameters(resumed), parameters(learner))


def test_a_checkpoint_before_the_first_step_can_be_loaded(learner, tiny_model, make_config, tmp_path):
    learner.save(tmp_path / "step-0")
    resumed = Learner(make_config(seed=9), tiny_model)
    resumed.load(tmp_path / "step-0")
    assert torch.equal(parameters(resumed), parameters(learner))


def test_saving_twice_under_one_name_keeps_the_second(learner, batches, tmp_path):
    learner.save(tmp_path / "last")
    learner.step(batches[0])
    learner.save(tmp_path / "last")
    after = parameters(learner)
    learner.step(batches[1])
    learner.load(tmp_path / "last")
    assert torch.equal(parameters(learner), after)
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_the_adapter_is_one_that_peft_loads(learner, tiny_model, tiny_inputs, batches, tmp_path):
    learner.step(batches[0])
    learner.save_adapter(tmp_path / "v1")
    assert sorted(p.name for p in (tmp_path / "v1").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    base = AutoModelForImageTextToText.from_pretrained(tiny_model).eval()
    loaded = PeftModel.from_pretrained(base, tmp_path / "v1")
    trajectory = batches[0][0]
    inputs = tiny_inputs.encode([trajectory.steps[0].prompt], [trajectory.images[0]])
    with torch.no_grad():
        found, expected = loaded(**inputs).logits, learner.policy(**inputs).logits
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(**inputs).logits, expected)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_checkpoint_is_named_and_leaves_the_learner_as_it_was(learner, batches, tmp_path, name, damage):
    learner.step(batches[0])
    learner.save(tmp_path / "c")
    learner.step(batches[1])
    before = parameters(learner)
    path = tmp_path / "c" / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[-3 if name == "state.json" else len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        learner.load(tmp_path / "c")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert torch.equal(parameters(learner), before)


def test_a_checkpoint_of_another_adapter_is_refused(learner, tiny_model, make_config, tmp_path):
    learner.save(tmp_path / "c")
    with pytest.raises(UserError, match=r"policy\.lora_"):
        Learner(make_config(policy={"lora_rank": 4}), tiny_model).load(tmp_path / "c")


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(learner, batches, tmp_path):
    learner.step(batches[0])
    learner.save(tmp_path / "good")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Files may not grow beyond 50 kB: writing the second one fails as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        for name in ("good", "new"):
            with pytest.raises(UserError, match=f"{name}: cannot be written") as caught:
                learner.save(tmp_path / name)
            assert "\n" not in str(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
    learner.load(tmp_path / "good")
