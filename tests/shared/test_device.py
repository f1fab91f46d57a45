"""Whoever asked for no GPU uses none, whatever torch sees."""

import pytest

from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.device import device_name, on_this_machine
from gflowvlm.shared.errors import UserError


@pytest.mark.parametrize(
    ("gpus", "seen", "name"), [(0.0, True, "cpu"), (0.0, False, "cpu"), (0.5, True, "cuda"), (1.0, True, "cuda")]
)
def test_only_gpus_that_were_asked_for_are_used(gpus: float, seen: bool, name: str) -> None:
    assert device_name(gpus, "learner.gpus_per_worker", seen) == name


def test_a_gpu_that_is_asked_for_and_not_there_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^learner\.gpus_per_worker = 1, but torch sees no GPU here; [^\n]*$"):
        device_name(1.0, "learner.gpus_per_worker", gpu_seen=False)


@pytest.mark.parametrize(("asked", "seen", "used"), [(0.0, True, 0.0), (1.0, True, 1.0), (1.0, False, 0.0)])
def test_a_run_is_evaluated_on_a_gpu_where_its_samplers_had_one_and_the_machine_has_one(
    asked: float, seen: bool, used: float
) -> None:
    config = RunConfig.model_validate({"sampler": {"gpus_per_replica": asked}})
    assert on_this_machine(config, seen).sampler.gpus_per_replica == used


@pytest.mark.parametrize("seen", [True, False])
def test_a_sampler_without_a_learner_beside_it_never_sleeps(seen: bool) -> None:
    config = RunConfig.model_validate({"sampler": {"gpus_per_replica": 0.5, "sleep_level": 2}})
    assert on_this_machine(config, seen).sampler.sleep_level == 0
