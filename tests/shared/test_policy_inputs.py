"""What a model needs to be read is one line where it is missing."""

import pytest
from transformers import AutoProcessor

from gflowvlm.run.models import resolve_model
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs


def test_a_package_that_a_models_processor_needs_is_named_in_one_line(monkeypatch):
    def from_pretrained(path):
        raise ImportError("\nPackage `num2words` is required to run SmolVLM processor.\nInstall it with pip.\n")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", from_pretrained)
    with pytest.raises(UserError, match=r"cannot be loaded \(Package `num2words` is required .* pip\.\)"):
        PolicyInputs.load(resolve_model("numberline-tiny"))


def test_a_torchvision_that_does_not_fit_is_named_in_one_line(monkeypatch):
    def from_pretrained(path):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", from_pretrained)
    with pytest.raises(UserError, match=r"cannot be loaded \(operator torchvision::nms does not exist\)"):
        PolicyInputs.load(resolve_model("numberline-tiny"))


def test_the_folder_of_a_stopped_warm_start_says_how_to_go_on(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(UserError, match=r"no config\.json.*gflowvlm sft.*--resume"):
        PolicyInputs.load(str(tmp_path))
