"""Whoever asked for no GPU uses none, whatever torch sees."""

import pytest
import torch

from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.device import compute_device, on_this_machine
from gflowvlm.shared.errors import UserError


def gpu_seen(monkeypatch: pytest.MonkeyPatch, seen: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)


@pytest.mark.parametrize("seen", [True, False])
def test_without_gpus_asked_for_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch, seen: bool) -> None:
    gpu_seen(monkeypatch, seen)
    assert compute_device(0.0, "learner.gpus_per_worker") == torch.device("cpu")


def test_with_gpus_asked_for_it_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_seen(monkeypatch, True)
    assert compute_device(0.5, "learner.gpus_per_worker") == torch.device("cuda", 3)


def test_a_gpu_that_is_asked_for_and_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_seen(monkeypatch, False)
    with pytest.raises(UserError, match=r"^learner\.gpus_per_worker = 1, but torch .* sees no GPU here"):
        compute_device(1.0, "learner.gpus_per_worker")


@pytest.mark.parametrize(("asked", "seen", "used"), [(0.0, True, 0.0), (1.0, True, 1.0), (1.0, False, 0.0)])
def test_a_run_is_evaluated_on_a_gpu_where_its_samplers_had_one_and_the_machine_has_one(
    monkeypatch: pytest.MonkeyPatch, asked: float, seen: bool, used: float
) -> None:
    gpu_seen(monkeypatch, seen)
    config = RunConfig.model_validate({"sampler": {"gpus_per_replica": asked}})
    assert on_this_machine(config).sampler.gpus_per_replica == used
