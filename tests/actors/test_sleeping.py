"""A sampler that sleeps: nobody is answered meanwhile, nobody is lost, and it must wake up as it was."""

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest

from gflowvlm.actors.sampling import (
    SamplerAsleepError,
    SampleRequest,
    SampleResponse,
    SamplerUnavailableError,
)
from gflowvlm.actors.sleeping import SamplerSleep, SleepCheck, largest_difference
from gflowvlm.shared.errors import UserError

REQUEST = SampleRequest("prompt", b"", max_tokens=8, temperature=1.0)


class Sampler:
    """A sampler whose memory can be taken away; answers after a pause, and never without its memory."""

    newest = 0

    def __init__(self, pause_s: float = 0.01, wakes_with: Exception | None = None) -> None:
        self.pause_s, self.wakes_with = pause_s, wakes_with
        self.asleep, self.answered = False, 0
        self.levels: list[int] = []

    async def sample(self, request: SampleRequest) -> SampleResponse:
        for _ in range(2):
            assert not self.asleep, "computes without its memory"
            await asyncio.sleep(self.pause_s / 2)
        self.answered += 1
        return SampleResponse([1], [-0.5], "text", 0)

    async def sleep(self, level: int) -> None:
        self.levels.append(level)
        self.asleep = True

    async def wake_up(self) -> None:
        if self.wakes_with is not None:
            raise self.wakes_with
        self.asleep = False

    async def load(self, version: int, path: Path) -> None: ...

    async def retire(self) -> None: ...

    async def check_health(self) -> None: ...

    def stats(self) -> dict[str, Any]:
        return {}

    def shutdown(self) -> None: ...


def sleep_of(sampler: Sampler, patience_s: float = 5.0, drain_s: float = 5.0) -> SamplerSleep:
    return SamplerSleep(sampler, 1, patience_s, drain_s)


async def ask(sleep: SamplerSleep, sampler: Sampler) -> SampleResponse:
    async with sleep.awake():
        return await sampler.sample(REQUEST)


def test_what_is_under_way_is_finished_and_the_rest_waits_until_the_sampler_is_woken_up() -> None:
    async def body() -> None:
        sampler = Sampler()
        sleep = sleep_of(sampler)
        early = [asyncio.create_task(ask(sleep, sampler)) for _ in range(3)]
        await asyncio.sleep(0)
        asleep = asyncio.create_task(sleep.sleep())
        await asyncio.sleep(0)
        late = [asyncio.create_task(ask(sleep, sampler)) for _ in range(3)]
        await asleep
        assert sleep.asleep
        assert all(task.done() for task in early)
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in late)
        await sleep.wake_up()
        await asyncio.gather(*late)
        assert (sampler.answered, sampler.levels) == (6, [1])

    asyncio.run(body())


def test_who_waits_too_long_is_told_that_the_sampler_sleeps() -> None:
    async def body() -> None:
        sampler = Sampler()
        sleep = sleep_of(sampler, patience_s=0.02)
        await sleep.sleep()
        with pytest.raises(SamplerAsleepError):
            await ask(sleep, sampler)
        await sleep.wake_up()
        await ask(sleep, sampler)

    asyncio.run(body())


def test_a_response_that_does_not_end_keeps_the_sampler_awake() -> None:
    async def body() -> None:
        sampler = Sampler(pause_s=0.3)
        sleep = sleep_of(sampler, drain_s=0.02)
        under_way = asyncio.create_task(ask(sleep, sampler))
        await asyncio.sleep(0)
        with pytest.raises(SamplerUnavailableError, match=r"sampler\.request_timeout_s"):
            await sleep.sleep()
        assert not sleep.asleep
        await asyncio.gather(under_way, ask(sleep, sampler))

    asyncio.run(body())


def test_both_are_done_once_however_often_they_are_asked_for() -> None:
    async def body() -> None:
        sampler = Sampler()
        sleep = sleep_of(sampler)
        await sleep.wake_up()
        await asyncio.gather(sleep.sleep(), sleep.sleep())
        await asyncio.gather(sleep.wake_up(), sleep.wake_up())
        assert sampler.levels == [1]
        await ask(sleep, sampler)

    asyncio.run(body())


def test_nobody_is_let_in_to_a_sampler_that_does_not_wake_up_as_it_was() -> None:
    async def body() -> None:
        sampler = Sampler(wakes_with=UserError("other log-probabilities"))
        sleep = sleep_of(sampler, patience_s=0.02)
        await sleep.sleep()
        with pytest.raises(UserError, match="other log-probabilities"):
            await sleep.wake_up()
        with pytest.raises(SamplerAsleepError):
            await ask(sleep, sampler)

    asyncio.run(body())


PROBE = [{4: -0.1, 7: -2.5, 9: -4.0}, {2: -0.7, 3: -0.75}]


def test_answers_are_compared_token_by_token_until_they_differ() -> None:
    assert largest_difference(PROBE, PROBE) == 0.0
    assert largest_difference(PROBE, [{4: -0.1, 7: -2.4, 8: -4.1}, PROBE[1]]) == pytest.approx(0.1)
    # Another choice between two nearly equal ones: what follows answers something else.
    swapped = [PROBE[0], {3: -0.7, 2: -0.71}, {1: -9.0}]
    assert largest_difference([*PROBE, {1: -0.1}], swapped) == pytest.approx(0.05)
    assert largest_difference(PROBE, [{5: -0.1}]) == math.inf


@pytest.mark.parametrize(("level", "advice"), [(1, "sampler.sleep_level=0"), (2, "sampler.sleep_level=1, or 0")])
def test_another_answer_after_a_sleep_is_one_line_with_what_to_do(level: int, advice: str) -> None:
    check = SleepCheck(level, 3, PROBE)
    check.require_same([{4: -0.10001}, PROBE[1]], 1e-4)
    with pytest.raises(UserError) as caught:
        check.require_same([{4: -0.3}, PROBE[1]], 1e-4)
    assert "adapter version 3" in str(caught.value)
    assert str(caught.value).endswith(advice)
