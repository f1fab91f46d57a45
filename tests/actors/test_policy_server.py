"""The policy server on a real Ray Serve: replicas that follow the store, die and come back."""

import asyncio
import gc
import os
import shutil
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import serve

from gflowvlm.actors.adapter_store import staging_folder, start_adapter_store
from gflowvlm.actors.policy_client import PolicyClient, PolicyServerError
from gflowvlm.actors.policy_server import deploy_policy_server, scale_policy_server, shutdown_policy_server
from gflowvlm.actors.sampling import SampleResponse, UnknownVersionError
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from tests.actors.local_ray import local_ray
from tests.actors.tiny_adapters import config, request, write_policy

pytestmark = pytest.mark.slow

RESTART_S = 300.0
"""Longest wait for a replica: an engine start takes minutes where others keep the cores busy."""


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with local_ray(num_cpus=8):
        yield
        serve.shutdown()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy"), adapters=3)


class Served:
    """A deployed policy server, its store and a client."""

    def __init__(self, name: str, policy: Path, run: Path, settings: RunConfig) -> None:
        self.folder = run
        self.store = start_adapter_store(f"{name}-store", run)
        self.name = name
        self.handle = deploy_policy_server(settings, str(policy / "model"), f"{name}-store", name)
        self.client = PolicyClient(self.handle, request_timeout_s=60.0, deadline_s=RESTART_S)

    async def publish(self, adapter: Path) -> int:
        staging = shutil.copytree(adapter, staging_folder(self.folder))
        return int(await self.store.publish.remote(str(staging)))

    def run(self, body: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        return asyncio.run(asyncio.wait_for(body(), RESTART_S + 30))

    async def sample_all(self, count: int, **changes: Any) -> list[SampleResponse]:
        return await asyncio.gather(*(self.client.sample(request(i, **changes)) for i in range(count)))

    async def until_all_replicas(self, count: int, holds: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        deadline = time.monotonic() + RESTART_S
        while time.monotonic() < deadline:
            statuses = await self.client.status()
            if len(statuses) == count and all(holds(status) for status in statuses):
                return statuses
            await asyncio.sleep(0.2)
        raise AssertionError(f"replicas never got there: {await self.client.status()}")


@pytest.fixture(scope="module")
def served(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two transformers replicas."""
    settings = config(replicas=2, start_timeout_s=RESTART_S)
    made = Served("small", policy, tmp_path_factory.mktemp("run"), settings)
    yield made
    shutdown_policy_server("small")


def test_every_replica_pulls_a_published_version_and_pinned_ones_are_fetched(served: Served, policy: Path) -> None:
    async def body() -> None:
        assert {r.version for r in await served.sample_all(8)} == {0}
        assert await served.publish(policy / "adapter-1") == 1
        assert await served.publish(policy / "adapter-2") == 2
        await served.until_all_replicas(2, lambda status: status["newest_version"] == 2)
        assert {r.version for r in await served.sample_all(8)} == {2}
        greedy = [await served.client.sample(request(temperature=0.0, version=v)) for v in (0, 1, 2)]
        assert [r.version for r in greedy] == [0, 1, 2]
        assert len({tuple(r.token_ids) for r in greedy}) == 3

    served.run(body)


def test_errors_of_a_request_arrive_as_what_they_are_without_a_retry(served: Served) -> None:
    async def body() -> None:
        before = served.client.retries
        with pytest.raises(UnknownVersionError, match="99"):
            await served.client.sample(request(version=99))
        with pytest.raises(UserError, match="max_model_len"):
            await served.client.sample(type(request())("Target: 5 " * 400, request().image, 8, 1.0))
        assert served.client.retries == before

    served.run(body)


def test_requests_that_nobody_waits_for_any_more_leave_the_replicas(served: Served) -> None:
    async def body() -> None:
        asked = asyncio.create_task(served.sample_all(16, max_tokens=400))
        deadline = time.monotonic() + 30.0
        while all(status["in_flight"] == 0 for status in await served.client.status()):
            assert time.monotonic() < deadline, "the requests never came"
        answered = sum(status["responses"] for status in await served.client.status())
        asked.cancel()
        statuses = await served.until_all_replicas(2, lambda status: status["in_flight"] == 0)
        assert sum(status["responses"] for status in statuses) - answered < 16

    served.run(body)


def test_requests_survive_kill_9_of_a_replica_and_its_successor_starts_at_the_newest_version(
    served: Served, policy: Path
) -> None:
    async def body() -> None:
        newest = await served.publish(policy / "adapter-3")
        statuses = await served.until_all_replicas(2, lambda status: status["newest_version"] == newest)
        victim = statuses[0]
        asked = asyncio.create_task(served.sample_all(64, max_tokens=200))
        await asyncio.sleep(0.2)
        os.kill(victim["pid"], signal.SIGKILL)
        responses = await asked
        assert len(responses) == 64
        assert {r.version for r in responses} == {newest}
        after = await served.until_all_replicas(2, lambda status: status["newest_version"] == newest)
        assert victim["replica"] not in {status["replica"] for status in after}
        assert {r.version for r in await served.sample_all(32)} == {newest}

    served.run(body)


def test_replicas_join_and_leave_while_requests_are_answered_and_the_others_stay(served: Served) -> None:
    async def body() -> None:
        before = {status["replica"] for status in await served.until_all_replicas(2, lambda status: True)}
        newest = (await served.store.newest.remote())[0]
        await asyncio.to_thread(scale_policy_server, served.name, 3)
        joined = await served.until_all_replicas(3, lambda status: status["newest_version"] == newest)
        assert before < {status["replica"] for status in joined}
        asked = asyncio.create_task(served.sample_all(96, max_tokens=200))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(scale_policy_server, served.name, 2)
        left = await served.until_all_replicas(2, lambda status: True)
        assert {status["replica"] for status in left} < {status["replica"] for status in joined}
        assert {r.version for r in await asked} == {newest}

    served.run(body)
    with pytest.raises(UserError, match="cannot change its replicas now"):
        scale_policy_server("nobody", 2)


def test_replicas_go_on_following_a_store_that_was_killed(served: Served, policy: Path) -> None:
    async def body() -> None:
        pid = await served.store.__ray_call__.remote(lambda actor: os.getpid())
        os.kill(pid, signal.SIGKILL)
        version = await served.publish(policy / "adapter-1")
        await served.until_all_replicas(2, lambda status: status["newest_version"] == version)
        assert {r.version for r in await served.sample_all(4)} == {version}

    served.run(body)


def test_a_server_whose_run_is_gone_ends_itself_and_its_processes(policy: Path, tmp_path: Path) -> None:
    orphaned = Served("orphaned", policy, tmp_path, config(start_timeout_s=RESTART_S, orphan_timeout_s=2.0))

    async def body() -> None:
        (status,) = await orphaned.until_all_replicas(1, lambda status: status["adapter_error"] is None)
        ray.kill(orphaned.store, no_restart=True)
        deadline = time.monotonic() + 60.0
        while "orphaned" in serve.status().applications or psutil.pid_exists(status["pid"]):
            assert time.monotonic() < deadline, serve.status().applications
            await asyncio.sleep(0.2)

    orphaned.run(body)


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    start_adapter_store("missing-store", tmp_path)
    with pytest.raises(UserError, match="no such directory") as raised:
        deploy_policy_server(config(), str(tmp_path / "no-model"), "missing-store", "missing")
    assert "\n" not in str(raised.value)
    assert "missing" not in serve.status().applications


def test_replicas_that_do_not_answer_in_time_are_nobody_and_leave_nothing_behind(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        assert await served.client.status(timeout_s=1e-6) == []
        # Some of these end while the replicas are being waited for.
        for milliseconds in range(1, 6):
            await served.client.status(timeout_s=milliseconds / 1000)
        gc.collect()

    served.run(body)
    assert "never retrieved" not in caplog.text


def test_a_server_that_never_starts_is_given_up_by_name(policy: Path, tmp_path: Path) -> None:
    start_adapter_store("starved-store", tmp_path)
    settings = config(cpus_per_replica=64.0, start_timeout_s=3.0)
    with pytest.raises(UserError, match=r"sampler\.start_timeout_s.*'starved'"):
        deploy_policy_server(settings, str(policy / "model"), "starved-store", "starved")


@pytest.mark.timeout(1200)
def test_vllm_behind_serve_heals_after_kill_9_of_its_engine_and_leaves_no_process(policy: Path, tmp_path: Path) -> None:
    settings = config("vllm", start_timeout_s=RESTART_S)
    served = Served("real", policy, tmp_path, settings)
    processes: list[psutil.Process] = []

    async def body() -> None:
        assert await served.publish(policy / "adapter-1") == 1
        await served.until_all_replicas(1, lambda status: status["newest_version"] == 1)
        greedy = await served.client.sample(request(temperature=0.0))
        assert greedy.version == 1
        (status,) = await served.client.status()
        (engine,) = status["engine_pids"]
        os.kill(engine, signal.SIGKILL)
        responses = await served.sample_all(16)
        assert {r.version for r in responses} == {1}
        assert (await served.client.sample(request(temperature=0.0))).token_ids == greedy.token_ids
        (after,) = await served.client.status()
        assert after["engine_pids"] != [engine]
        processes.extend(psutil.Process(pid) for pid in after["engine_pids"])

    served.run(body)
    assert len(processes) == 1
    shutdown_policy_server("real")
    assert psutil.wait_procs(processes, timeout=30)[1] == [], "engine processes outlived the server"

    async def unanswered() -> None:
        client = PolicyClient(served.handle, request_timeout_s=1.0, deadline_s=2.0)
        with pytest.raises(PolicyServerError, match=r"PolicyServer in application 'real'.*sampler\.start_timeout_s"):
            await client.sample(request())

    served.run(unanswered)
