"""Sampler and learner on one GPU: the sampler sleeps exactly as long as the learner computes, whatever happens."""

import pytest

from gflowvlm.cluster.driver.gpu_turns import GpuTurns


class Gpu:
    """Policy server and learner at once; notes who is on the GPU when."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def sleep(self) -> None:
        self.seen.append("sampler sleeps")

    async def wake_up(self) -> None:
        self.seen.append("sampler wakes up")

    def enter_device(self) -> None:
        self.seen.append("learner enters")

    def leave_device(self) -> None:
        self.seen.append("learner leaves")


@pytest.fixture
def gpu():
    return Gpu()


@pytest.fixture
def turns(gpu):
    made = GpuTurns(gpu)
    yield made
    made.close()


def test_the_learner_enters_when_the_sampler_sleeps_and_leaves_before_it_wakes_up(gpu, turns):
    with turns.turn(gpu):
        gpu.seen.append("step")
    assert gpu.seen == ["sampler sleeps", "learner enters", "step", "learner leaves", "sampler wakes up"]
    assert turns.take_seconds() > 0.0
    assert turns.take_seconds() == 0.0


def test_the_sampler_is_woken_up_after_a_step_that_failed(gpu, turns):
    with pytest.raises(RuntimeError, match="out of memory"), turns.turn(gpu):
        raise RuntimeError("out of memory")
    assert gpu.seen[-1] == "sampler wakes up"


def test_a_learner_is_made_in_a_turn_of_its_own(gpu, turns):
    with turns.turn():
        gpu.leave_device()
    assert gpu.seen == ["sampler sleeps", "learner leaves", "sampler wakes up"]


def test_without_a_shared_gpu_nobody_is_told_anything(gpu):
    turns = GpuTurns(None)
    with turns.turn(gpu):
        pass
    assert gpu.seen == []
    assert turns.take_seconds() == 0.0
