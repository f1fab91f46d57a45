"""How long it takes until all replicas have a new adapter."""

import asyncio
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray

from gflowvlm.actors.adapter_store import staging_folder, start_adapter_store
from gflowvlm.actors.event_loop import EventLoopThread
from gflowvlm.actors.policy_client import PolicyClient
from gflowvlm.actors.policy_server import deploy_policy_server, shutdown_policy_server
from gflowvlm.cluster.launch.ray_runtime import ray_cluster
from gflowvlm.shared.config import RunConfig
from gflowvlm.studies.benchmarks.own_process import in_own_process
from gflowvlm.studies.benchmarks.scale_learner import write_simulated_adapter
from gflowvlm.studies.benchmarks.scale_sampler import SimulatedEngine

PAUSE_S = 1.0
"""Before the replicas are asked: questions while they load would slow them down."""

ANSWER_TIMEOUT_S = 120.0
LOADED_TIMEOUT_S = 60.0


def publish_times(
    config: RunConfig, model_path: str, engine: SimulatedEngine, adapter_kib: int, publishes: int, folder: Path
) -> list[float]:
    """Publishes adapters to replicas with simulated engines, in a process and on a Ray of its own.

    Args:
        config: Says how many replicas there are.
        model_path: Model directory or hub name.
        engine: What the replicas hold.
        adapter_kib: Size of the adapters.
        publishes: How many are published, one after another.
        folder: Folder of the adapter store.

    Returns:
        For each the time from the call of `publish` to the replica that was last to have it as its newest, seconds.
    """
    return in_own_process(_publish_times, config, model_path, engine, adapter_kib, publishes, folder)


def _publish_times(
    config: RunConfig, model_path: str, engine: SimulatedEngine, adapter_kib: int, publishes: int, folder: Path
) -> list[float]:
    name = f"simulated-{uuid.uuid4().hex[:8]}"
    with ray_cluster(config):
        store = start_adapter_store(f"{name}-store", folder)
        loop = EventLoopThread("policy client")
        try:
            handle = deploy_policy_server(config, model_path, f"{name}-store", name, start_sampler=engine)
            client = PolicyClient.from_config(handle, config)
            return [
                _publish_time(store, client, loop, config.sampler.replicas, folder, weights)
                for weights in (np.full((16, adapter_kib * 16), n, dtype=np.float32) for n in range(publishes))
            ]
        finally:
            with suppress(TimeoutError):
                shutdown_policy_server(name)
            loop.close()


def _publish_time(
    store: Any, client: PolicyClient, loop: EventLoopThread, replicas: int, folder: Path, weights: np.ndarray
) -> float:
    staging = staging_folder(folder)
    write_simulated_adapter(staging, weights)
    started = time.time()
    version = ray.get(store.publish.remote(str(staging)), timeout=ANSWER_TIMEOUT_S)
    return loop.run(_all_loaded(client, version, replicas)) - started


async def _all_loaded(client: PolicyClient, version: int, replicas: int) -> float:
    """Returns when the last of the replicas had a version as its newest by its own note, seconds since the epoch."""
    deadline = time.monotonic() + LOADED_TIMEOUT_S
    while True:
        await asyncio.sleep(PAUSE_S)
        found = [status["newest_since"].get(version) for status in await client.status(ANSWER_TIMEOUT_S)]
        times = [float(moment) for moment in found if moment is not None]
        if len(times) == replicas:
            return max(times)
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"waited {LOADED_TIMEOUT_S:.0f} s for adapter version {version} on {replicas} replicas: "
                f"{len(times)} have it"
            )
