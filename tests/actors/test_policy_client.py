"""The client's requests against a server whose answers and failures a test decides."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from ray.exceptions import ActorUnavailableError, ObjectLostError, RaySystemError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from gflowvlm.actors import policy_client
from gflowvlm.actors.policy_client import TOGETHER, PolicyClient, PolicyServerError
from gflowvlm.actors.policy_server import Answer
from gflowvlm.actors.sampling import (
    SamplerAsleepError,
    SampleRequest,
    SampleResponse,
    SamplerUnavailableError,
    UnknownVersionError,
)
from gflowvlm.shared.errors import UserError

Part = list[tuple[int, Answer]]
Behaviour = Callable[[Sequence[SampleRequest]], AsyncIterator[Part]]


def asked(number: int = 0) -> SampleRequest:
    return SampleRequest(f"prompt {number}", b"", max_tokens=8, temperature=1.0)


def answered(request: SampleRequest, version: int = 0) -> SampleResponse:
    return SampleResponse([1], [-0.5], request.prompt, version)


async def answer_all(requests: Sequence[SampleRequest]) -> AsyncIterator[Part]:
    yield [(place, answered(request)) for place, request in enumerate(requests)]


@dataclass
class Server:
    """Stands where Serve's handle stands: one behaviour for each call, the last one for ever."""

    behaviours: list[Behaviour]
    calls: list[list[SampleRequest]] = field(default_factory=list)
    cancelled: int = 0
    deployment_name: str = "PolicyServer"
    app_name: str = "test"

    def options(self, stream: bool) -> "Server":
        assert stream
        return self

    @property
    def sample_together(self) -> "Server":
        return self

    def remote(self, requests: Sequence[SampleRequest]) -> "_Stream":
        self.calls.append(list(requests))
        behaviour = self.behaviours[min(len(self.calls), len(self.behaviours)) - 1]
        return _Stream(self, behaviour(requests))


@dataclass
class _Stream:
    server: Server
    parts: AsyncIterator[Part]

    def __aiter__(self) -> AsyncIterator[Part]:
        return self.parts

    def cancel(self) -> None:
        self.server.cancelled += 1


def client_of(server: Server, request_timeout_s: float = 5.0, deadline_s: float = 10.0) -> PolicyClient:
    return PolicyClient(cast(DeploymentHandle, server), request_timeout_s, deadline_s)


def run(body: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(body, 30.0))


def test_requests_of_one_moment_share_calls_and_each_gets_its_own_response() -> None:
    async def body() -> None:
        server = Server([answer_all])
        client = client_of(server)
        count = 2 * TOGETHER + 3
        responses = await asyncio.gather(*(client.sample(asked(number)) for number in range(count)))
        assert [response.text for response in responses] == [f"prompt {number}" for number in range(count)]
        assert [len(call) for call in server.calls] == [TOGETHER, TOGETHER, 3]
        assert (await client.sample(asked(77))).text == "prompt 77"
        assert [request.prompt for request in server.calls[-1]] == ["prompt 77"]
        assert client.retries == 0
        assert server.cancelled == 0

    run(body())


def test_a_response_is_handed_over_before_the_others_of_its_call_are_finished() -> None:
    async def body() -> None:
        long_one = asyncio.Event()

        async def second_first(requests: Sequence[SampleRequest]) -> AsyncIterator[Part]:
            yield [(1, answered(requests[1]))]
            await long_one.wait()
            yield [(0, answered(requests[0]))]

        client = client_of(Server([second_first]))
        first, second = (asyncio.ensure_future(client.sample(asked(number))) for number in range(2))
        assert (await second).text == "prompt 1"
        assert not first.done()
        long_one.set()
        assert (await first).text == "prompt 0"

    run(body())


def test_a_refused_request_does_not_touch_the_others_of_its_call() -> None:
    async def refuse_some(requests: Sequence[SampleRequest]) -> AsyncIterator[Part]:
        yield [(0, UserError("prompt beyond the longest")), (1, UnknownVersionError("policy version 9"))]
        yield [(2, answered(requests[2]))]

    async def body() -> None:
        server = Server([refuse_some])
        client = client_of(server)
        answers = await asyncio.gather(*(client.sample(asked(n)) for n in range(3)), return_exceptions=True)
        assert [type(answer) for answer in answers] == [UserError, UnknownVersionError, SampleResponse]
        assert len(server.calls) == 1
        assert client.retries == 0

    run(body())


@pytest.mark.parametrize(
    "failure", [ActorUnavailableError("replica gone", None), SamplerUnavailableError("engine gone")], ids=type
)
def test_only_unanswered_requests_of_a_failed_call_are_asked_again(failure: Exception) -> None:
    async def one_then_fail(requests: Sequence[SampleRequest]) -> AsyncIterator[Part]:
        yield [(1, answered(requests[1], version=1))]
        raise failure

    async def body() -> None:
        server = Server([one_then_fail, answer_all])
        client = client_of(server)
        responses = await asyncio.gather(*(client.sample(asked(number)) for number in range(3)))
        assert [response.text for response in responses] == ["prompt 0", "prompt 1", "prompt 2"]
        assert responses[1].version == 1
        again = sorted(request.prompt for call in server.calls[1:] for request in call)
        assert again == ["prompt 0", "prompt 2"]
        assert client.retries == 2

    run(body())


def test_a_request_whose_engine_failed_is_asked_again_alone() -> None:
    async def engine_failed(requests: Sequence[SampleRequest]) -> AsyncIterator[Part]:
        yield [(0, SamplerUnavailableError("engine died")), (1, answered(requests[1]))]

    async def body() -> None:
        server = Server([engine_failed, answer_all])
        client = client_of(server)
        await asyncio.gather(client.sample(asked(0)), client.sample(asked(1)))
        assert [[request.prompt for request in call] for call in server.calls] == [
            ["prompt 0", "prompt 1"],
            ["prompt 0"],
        ]
        assert client.retries == 1

    run(body())


def test_other_failures_of_the_cluster_reach_whoever_asked() -> None:
    async def broken(requests: Sequence[SampleRequest]) -> AsyncIterator[Part]:
        raise RaySystemError("store broken")
        yield []

    async def body() -> None:
        with pytest.raises(RaySystemError, match="store broken"):
            await client_of(Server([broken])).sample(asked())

    run(body())


class _Refuses(Server):
    """Serve's handle when it cannot even take the call: an error at once, as often as there are some."""

    def __init__(self, errors: list[Exception]) -> None:
        super().__init__([answer_all])
        self.errors = errors

    def remote(self, requests: Sequence[SampleRequest]) -> "_Stream":
        if self.errors:
            raise self.errors.pop(0)
        return super().remote(requests)


@pytest.mark.parametrize(
    "error", [RayServeException("router closed"), ActorUnavailableError("controller gone", None)], ids=type
)
def test_a_call_that_serve_does_not_take_is_made_again_at_once(error: Exception) -> None:
    async def body() -> None:
        client = client_of(_Refuses([error]), request_timeout_s=3600.0, deadline_s=7200.0)
        responses = await asyncio.gather(*(client.sample(asked(number)) for number in range(3)))
        assert [response.text for response in responses] == ["prompt 0", "prompt 1", "prompt 2"]
        assert client.retries == 3

    run(body())


def test_a_call_that_cannot_be_made_at_all_fails_everybody_at_once() -> None:
    async def body() -> None:
        client = client_of(_Refuses([TypeError("cannot be pickled")]), request_timeout_s=3600.0)
        answers = await asyncio.gather(*(client.sample(asked(n)) for n in range(3)), return_exceptions=True)
        assert [str(answer) for answer in answers] == ["cannot be pickled"] * 3

    run(body())


def test_a_request_that_a_call_ends_without_answering_is_asked_again_at_once() -> None:
    async def leave_out(requests: Sequence[SampleRequest]) -> AsyncIterator[Part]:
        yield [(1, answered(requests[1]))]

    async def body() -> None:
        client = client_of(Server([leave_out, answer_all]), request_timeout_s=3600.0, deadline_s=7200.0)
        responses = await asyncio.gather(*(client.sample(asked(number)) for number in range(2)))
        assert [response.text for response in responses] == ["prompt 0", "prompt 1"]
        assert client.retries == 1

    run(body())


def test_a_server_that_never_answers_is_given_up_by_name() -> None:
    async def gone(requests: Sequence[SampleRequest]) -> AsyncIterator[Part]:
        raise ObjectLostError("ab", "", "")
        yield []

    async def body() -> None:
        with pytest.raises(PolicyServerError, match=r"PolicyServer in application 'test'.*ObjectLostError"):
            await client_of(Server([gone]), deadline_s=0.05).sample(asked())

    run(body())


def test_a_call_that_hangs_is_ended_on_the_server_and_asked_again() -> None:
    async def hang(requests: Sequence[SampleRequest]) -> AsyncIterator[Part]:
        await asyncio.sleep(3600)
        yield []

    async def body() -> None:
        server = Server([hang, answer_all])
        client = client_of(server, request_timeout_s=0.05)
        assert (await client.sample(asked(3))).text == "prompt 3"
        assert server.cancelled == 1
        assert client.retries == 1

    run(body())


def test_a_call_ends_when_the_last_who_waited_gives_up_and_not_before() -> None:
    async def body() -> None:
        going_on = asyncio.Event()

        async def slow(requests: Sequence[SampleRequest]) -> AsyncIterator[Part]:
            await going_on.wait()
            yield [(place, answered(request)) for place, request in enumerate(requests)]

        server = Server([slow])
        client = client_of(server)
        tasks_before = asyncio.all_tasks()
        tasks = [asyncio.ensure_future(client.sample(asked(number))) for number in range(3)]
        await asyncio.sleep(0.01)
        for task in tasks[:2]:
            task.cancel()
        await asyncio.sleep(0.01)
        assert server.cancelled == 0
        tasks[2].cancel()
        await asyncio.sleep(0.01)
        assert server.cancelled == 1
        assert asyncio.all_tasks() == tasks_before, "a call outlived everybody who waited for it"

    run(body())


def test_requests_given_up_at_once_are_never_sent() -> None:
    async def body() -> None:
        server = Server([answer_all])
        client = client_of(server)
        task = asyncio.ensure_future(client.sample(asked()))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0.01)
        assert server.calls == []

    run(body())


def asleep_for(seconds: float) -> Behaviour:
    async def behaviour(requests: Sequence[SampleRequest]) -> AsyncIterator[Part]:
        await asyncio.sleep(seconds)
        yield [(place, SamplerAsleepError("asleep")) for place in range(len(requests))]

    return behaviour


def test_a_sampler_that_sleeps_is_waited_for_beyond_the_deadline_of_a_failing_one() -> None:
    server = Server([asleep_for(0.1)] * 4 + [answer_all])
    client = client_of(server, deadline_s=0.15)
    response = asyncio.run(client.sample(asked()))
    assert response.version == 0
    assert (len(server.calls), client.retries) == (5, 0)


def test_a_sampler_that_is_never_woken_up_is_waited_for_as_long_as_the_settings_say() -> None:
    client = client_of(Server([asleep_for(0.05)]))
    client.sleep_timeout_s = 0.1
    with pytest.raises(PolicyServerError, match=r"sampler\.sleep_timeout_s"):
        asyncio.run(client.sample(asked()))


class Replicas:
    """A handle whose replicas answer a broadcast in turns."""

    deployment_name, app_name = "PolicyServer", "test"

    def __init__(self, *answers: list[Any]) -> None:
        self.answers, self.told = list(answers), list[str]()

    def broadcast(self, method: str) -> "Replicas":
        self.told.append(method)
        return self

    async def results_async(self, timeout_s: float, return_exceptions: bool) -> list[Any]:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def told(replicas: Replicas, deadline_s: float = 10.0) -> PolicyClient:
    return PolicyClient(cast(DeploymentHandle, replicas), 5.0, deadline_s)


def test_replicas_are_told_to_sleep_until_one_is_there_and_all_of_them_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_client, "LONGEST_PAUSE_S", 0.0)
    replicas = Replicas([], [ActorUnavailableError("restarts", None)], [SamplerUnavailableError("busy"), None], [None])
    asyncio.run(told(replicas).sleep())
    assert replicas.told == ["sleep"] * 4


def test_a_sampler_that_answers_otherwise_after_it_woke_up_is_an_error_at_once() -> None:
    replicas = Replicas([UserError("other log-probabilities")])
    with pytest.raises(UserError, match="other log-probabilities"):
        asyncio.run(told(replicas).wake_up())
    assert replicas.told == ["wake_up"]


def test_replicas_that_never_come_end_the_wait_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_client, "LONGEST_PAUSE_S", 0.0)
    with pytest.raises(PolicyServerError, match="policy server to wake up: no replica runs"):
        asyncio.run(told(Replicas([]), deadline_s=0.05).wake_up())
