import json
import resource

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from gflowvlm.learner.learner import Learner
from gflowvlm.learner.model import adapter_parameters
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import EndReason

LOSSES_BY_HEAD = ["var_tb", "tb", "flow_subtb", "fl_db"]
FILES = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "optimizer.safetensors", "state.json"]


@pytest.fixture
def batches(make_trajectory):
    return [make_trajectory.batch() for _ in range(4)]


@pytest.fixture
def learner(tiny_model, make_config):
    return Learner(make_config(), tiny_model)


@pytest.fixture
def with_head(tiny_model, make_config):
    return Learner(make_config(objective={"loss": "flow_db"}), tiny_model)


def parameters(learner):
    """Of the adapter, and of the head and its constant where the loss has one."""
    tensors = [parameter.detach().flatten() for _, parameter in adapter_parameters(learner.policy)]
    if learner._head is not None:
        tensors += [tensor.flatten() for tensor in learner._head.state_dict().values()]
    return torch.cat(tensors)


@pytest.mark.parametrize("loss", LOSSES_BY_HEAD)
def test_a_resumed_learner_goes_on_as_if_it_had_never_stopped(tiny_model, make_config, batches, tmp_path, loss):
    config = make_config(objective={"loss": loss})
    learner = Learner(config, tiny_model)
    for batch in batches[:2]:
        learner.step(batch)
    learner.save(tmp_path / "step-2")
    expected = [learner.step(batch) for batch in batches[2:]]

    resumed = Learner(config, tiny_model)
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


def test_the_count_of_batches_without_signal_is_resumed_and_may_be_missing(
    tiny_model, make_config, make_trajectory, batches, tmp_path
):
    alone = [make_trajectory(["+"], EndReason.STEP_LIMIT, instance=i) for i in range(2)]
    learner = Learner(make_config(), tiny_model)
    learner.step(batches[0])
    learner.step(alone)
    learner.save(tmp_path / "c")
    expected = learner.step(batches[1])
    resumed = Learner(make_config(), tiny_model)
    resumed.load(tmp_path / "c")
    found = resumed.step(batches[1])
    assert (found["steps_without_signal"], found["lr"]) == (1.0, expected["lr"])
    # A checkpoint of an earlier release counts none.
    state = json.loads((tmp_path / "c" / "state.json").read_text())
    del state["without_signal"]
    (tmp_path / "c" / "state.json").write_text(json.dumps(state))
    resumed.load(tmp_path / "c")
    assert resumed.step(alone)["steps_without_signal"] == 1.0


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


@pytest.mark.parametrize("name", [*FILES, "head.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_checkpoint_is_named_and_leaves_the_learner_as_it_was(with_head, batches, tmp_path, name, damage):
    learner = with_head
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


@pytest.mark.parametrize("made_with", LOSSES_BY_HEAD)
@pytest.mark.parametrize("loaded_with", LOSSES_BY_HEAD)
def test_a_checkpoint_of_a_loss_with_another_head_is_refused(tiny_model, make_config, tmp_path, made_with, loaded_with):
    Learner(make_config(objective={"loss": made_with}), tiny_model).save(tmp_path / "c")
    learner = Learner(make_config(objective={"loss": loaded_with}), tiny_model)
    if made_with == loaded_with:
        learner.load(tmp_path / "c")
        return
    before = parameters(learner)
    with pytest.raises(UserError, match=r"c: made with an objective\.loss that learns") as caught:
        learner.load(tmp_path / "c")
    assert "\n" not in str(caught.value)
    assert torch.equal(parameters(learner), before)


def test_losses_without_a_head_read_each_others_checkpoints(learner, tiny_model, make_config, batches, tmp_path):
    learner.step(batches[0])
    learner.save(tmp_path / "c")
    state = json.loads((tmp_path / "c" / "state.json").read_text())
    assert state.pop("head") is None
    # As written before there were heads.
    (tmp_path / "c" / "state.json").write_text(json.dumps(state))
    other = Learner(make_config(objective={"loss": "subtb"}), tiny_model)
    other.load(tmp_path / "c")
    assert torch.equal(parameters(other), parameters(learner))


def test_the_head_is_in_the_checkpoint_and_never_in_the_adapter(with_head, batches, tmp_path):
    with_head.step(batches[0])
    with_head.save(tmp_path / "c")
    with_head.save_adapter(tmp_path / "v1")
    assert (tmp_path / "c" / "head.safetensors").exists()
    for folder in (tmp_path / "c" / "adapter", tmp_path / "v1"):
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        names = load_file(folder / "adapter_model.safetensors").keys()
        assert all("lora_" in name for name in names)


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
