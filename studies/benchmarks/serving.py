"""How fast the policy answers: the bare engine, the same through Ray Serve, and after a new adapter."""

import asyncio
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import ray
import torch

from gflowvlm.actors.adapter_store import staging_folder, start_adapter_store
from gflowvlm.actors.episode import ResponseSource
from gflowvlm.actors.event_loop import EventLoopThread
from gflowvlm.actors.policy_client import PolicyClient
from gflowvlm.actors.policy_server import deploy_policy_server, shutdown_policy_server
from gflowvlm.actors.sampling import PolicySampler, SampleRequest
from gflowvlm.learner.checkpoint import save_adapter
from gflowvlm.learner.model import load_policy
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.studies.benchmarks.measurement import Measurement, Say, Scale
from gflowvlm.studies.benchmarks.workload import made_requests

SAMPLER, SERVE, ADAPTER = "sampler", "serve", "adapter"
CLIENTS = 2
SERVE_RATIO_BAR = 0.9
ROUND_TIMEOUT_S = 600.0
PAUSE_BETWEEN_PUBLISHES_S = 0.2


def bench_serving(config: RunConfig, model_path: str, parts: set[str], scale: Scale, say: Say) -> list[Measurement]:
    """Measures the parts among `SAMPLER`, `SERVE` and `ADAPTER`; the last two need a connected Ray.

    With both engines, rounds alternate between them: the same requests, new ones every round, so that
    neither is measured in quieter minutes or with warmer caches than the other.
    """
    say("making the requests and an adapter")
    inputs = PolicyInputs.load(model_path, config.task.answer_format, config.policy)
    measurements: list[Measurement] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gflowvlm-bench-")))
        adapter = _made_adapter(config, model_path, folder / "adapter")
        bare: BareEngine | None = None
        served: ServedPolicy | None = None
        if SAMPLER in parts:
            say("starting the bare engine")
            bare = stack.enter_context(bare_engine(config, model_path, adapter))
            measurements.append(
                Measurement(SAMPLER, "sampler_start_s", bare.start_s, "s", "until the bare engine has an adapter")
            )
        if parts & {SERVE, ADAPTER}:
            say("starting the policy server")
            served = stack.enter_context(served_policy(config, model_path, adapter, folder / "run"))
            measurements.append(
                Measurement(SERVE, "serve_start_s", served.start_s, "s", "until the policy server answers")
            )
        measurements += _throughput(config, inputs, bare, served if SERVE in parts else None, scale, say)
        if served is not None and ADAPTER in parts:
            measurements += _measure_adapter_swap(config, inputs, served, adapter, scale, say)
        say("stopping the engines")
    return measurements


class BareEngine:
    """The configured engine in this process, without Ray."""

    def __init__(self, config: RunConfig, model_path: str, adapter: Path) -> None:
        """Starts the engine and loads an adapter."""
        started = time.perf_counter()
        self._runner = asyncio.Runner()
        self._sampler = _engine(config, model_path)
        self._runner.run(self._sampler.load(1, adapter))
        self.start_s = time.perf_counter() - started

    def round(self, requests: Sequence[SampleRequest], in_flight: int) -> float:
        """Returns the response tokens per second of a round."""
        started = time.perf_counter()
        tokens = self._runner.run(sample_all(self._sampler, requests, in_flight))
        return tokens / (time.perf_counter() - started)

    def close(self) -> None:
        """Ends the engine."""
        self._sampler.shutdown()
        self._runner.close()


class ServedPolicy:
    """The policy server as a run has it, with its adapter store and client actors."""

    def __init__(self, config: RunConfig, model_path: str, adapter: Path, run_folder: Path) -> None:
        """Starts everything, publishes an adapter and waits until it answers."""
        started = time.perf_counter()
        self.name = f"bench-{uuid.uuid4().hex[:8]}"
        self.store = start_adapter_store(f"{self.name}-store", run_folder)
        self.run_folder = run_folder
        ray.get(self.store.publish.remote(str(self.staged(adapter))), timeout=ROUND_TIMEOUT_S)
        handle = deploy_policy_server(config, model_path, f"{self.name}-store", self.name)
        self.client = PolicyClient.from_config(handle, config)
        self.loop = EventLoopThread("policy client")
        kind = ray.remote(num_cpus=0)(LoadClient)
        self.actors = [kind.remote(handle, config) for _ in range(CLIENTS)]
        self.start_s = time.perf_counter() - started

    def staged(self, adapter: Path) -> Path:
        """Returns a copy of an adapter that can be published."""
        return shutil.copytree(adapter, staging_folder(self.run_folder))

    def round(self, requests: Sequence[SampleRequest], in_flight: int) -> float:
        """Returns the response tokens per second of a round, its requests shared by the clients."""
        shares = [list(requests[i::CLIENTS]) for i in range(CLIENTS)]
        started = time.perf_counter()
        running = [a.sample_all.remote(s, in_flight // CLIENTS) for a, s in zip(self.actors, shares, strict=True)]
        tokens = sum(ray.get(running, timeout=ROUND_TIMEOUT_S))
        return float(tokens / (time.perf_counter() - started))

    def close(self) -> None:
        """Ends everything."""
        self.loop.close()
        # What is too slow to stop, or was interrupted itself, ends with Ray.
        with suppress(TimeoutError):
            shutdown_policy_server(self.name)
        for actor in [*self.actors, self.store]:
            ray.kill(actor)


class LoadClient:
    """A client of the policy server in a process of its own. A Ray actor."""

    def __init__(self, handle: Any, config: RunConfig) -> None:
        """Remembers whom to ask."""
        self._client = PolicyClient.from_config(handle, config)
        self._load: asyncio.Task[int] | None = None

    async def sample_all(self, requests: list[SampleRequest], in_flight: int) -> int:
        """Returns the response tokens of all requests."""
        return await sample_all(self._client, requests, in_flight)

    async def start_load(self, requests: list[SampleRequest], in_flight: int) -> None:
        """Keeps so many requests in flight until `stop_load`."""
        self._load = asyncio.create_task(sample_all(self._client, cycle(requests), in_flight))

    async def stop_load(self) -> None:
        """Ends the load."""
        if self._load is not None:
            self._load.cancel()
            await asyncio.wait([self._load])


async def sample_all(source: ResponseSource, requests: Iterator[SampleRequest] | Sequence[Any], in_flight: int) -> int:
    """Samples all requests, so many in flight at a time; returns the number of response tokens."""
    waiting = iter(requests)

    async def slot() -> int:
        tokens = 0
        for request in waiting:
            tokens += len((await source.sample(request)).token_ids)
        return tokens

    return sum(await asyncio.gather(*(slot() for _ in range(in_flight))))


@contextmanager
def bare_engine(config: RunConfig, model_path: str, adapter: Path) -> Iterator[BareEngine]:
    """Yields a started `BareEngine` and ends it."""
    engine = BareEngine(config, model_path, adapter)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def served_policy(config: RunConfig, model_path: str, adapter: Path, run_folder: Path) -> Iterator[ServedPolicy]:
    """Yields a started `ServedPolicy` and ends it."""
    served = ServedPolicy(config, model_path, adapter, run_folder)
    try:
        yield served
    finally:
        served.close()


def _throughput(
    config: RunConfig,
    inputs: PolicyInputs,
    bare: BareEngine | None,
    served: ServedPolicy | None,
    scale: Scale,
    say: Say,
) -> list[Measurement]:
    engines: dict[str, BareEngine | ServedPolicy] = {}
    if bare is not None:
        engines[SAMPLER] = bare
    if served is not None:
        engines[SERVE] = served
    in_flight = config.rollout.rollouts_at_once
    count = in_flight * scale.requests_per_slot
    rates: dict[str, list[float]] = {name: [] for name in engines}
    # Round 0 warms up and is not counted.
    for number in range(scale.rounds + 1) if engines else ():
        requests = made_requests(config, inputs, count if number > 0 else in_flight, first=1000 * number)
        for name, engine in engines.items():
            rate = engine.round(requests, in_flight)
            if number > 0:
                rates[name].append(rate)
        shown = ", ".join(f"{name} {values[-1]:.0f} tokens/s" for name, values in rates.items() if values)
        say(f"round {number} of {scale.rounds}: {shown or 'warm'}")
    how = f"response tokens, LoRA on, {in_flight} requests in flight, median of {scale.rounds} rounds of {count}"
    titles = {SAMPLER: f"bare {config.sampler.engine} engine", SERVE: f"through Ray Serve, {CLIENTS} clients"}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    measurements = [
        Measurement(name, f"{name}_tokens_per_s", value, "tokens/s", f"{titles[name]}: {how}")
        for name, value in medians.items()
    ]
    if len(medians) == 2:
        ratio = medians[SERVE] / medians[SAMPLER]
        what = "tokens/s through Ray Serve / bare engine, the same requests, alternating"
        measurements.append(Measurement(SERVE, "serve_ratio", ratio, "ratio", what, at_least=SERVE_RATIO_BAR))
    return measurements


def _measure_adapter_swap(
    config: RunConfig, inputs: PolicyInputs, served: ServedPolicy, adapter: Path, scale: Scale, say: Say
) -> list[Measurement]:
    requests = made_requests(config, inputs, 256, first=10**6)
    say(f"publishing {scale.publishes} adapters, no other requests")
    idle = served.loop.run(_adapter_swap_times(config, served, adapter, requests[0], scale.publishes))
    in_flight = min(config.sampler.max_num_seqs, config.rollout.rollouts_at_once)
    say(f"publishing {scale.publishes} adapters, {in_flight} sequences in flight")
    starting = [
        actor.start_load.remote(requests[i::CLIENTS], max(1, in_flight // CLIENTS))
        for i, actor in enumerate(served.actors)
    ]
    ray.get(starting, timeout=ROUND_TIMEOUT_S)
    try:
        busy = served.loop.run(_adapter_swap_times(config, served, adapter, requests[0], scale.publishes))
    finally:
        ray.get([actor.stop_load.remote() for actor in served.actors], timeout=ROUND_TIMEOUT_S)
    measurements = []
    for name, seconds, load in (("idle", idle, "no"), ("busy", busy, str(in_flight))):
        what = f"publish called -> first token of the new version, {load} other sequences in flight"
        percentiles = statistics.quantiles(seconds, n=20, method="inclusive")
        for percent, value in ((50, percentiles[9]), (95, percentiles[18])):
            what_exactly = f"p{percent} of {len(seconds)}: {what}"
            measurements.append(Measurement(ADAPTER, f"adapter_{name}_p{percent}_s", value, "s", what_exactly))
    return measurements


async def _adapter_swap_times(
    config: RunConfig, served: ServedPolicy, adapter: Path, request: SampleRequest, publishes: int
) -> list[float]:
    """Publishes adapters and asks for one token at a time until the new version answers; returns the times."""
    one_token = replace(request, max_tokens=1)
    limit = config.sampler.request_timeout_s
    seconds = []
    for _ in range(publishes):
        await asyncio.sleep(PAUSE_BETWEEN_PUBLISHES_S)
        fresh = served.staged(adapter)
        started = time.perf_counter()
        version = await served.store.publish.remote(str(fresh))
        try:
            async with asyncio.timeout(limit):
                while (await served.client.sample(one_token)).version < version:
                    pass
        except TimeoutError:
            raise TimeoutError(f"waited {limit:.0f} s for a response of adapter version {version}") from None
        seconds.append(time.perf_counter() - started)
    return seconds


def _made_adapter(config: RunConfig, model_path: str, directory: Path) -> Path:
    policy = load_policy(config.policy, model_path, seed=config.seed, device=torch.device("cpu"))
    save_adapter(policy, directory)
    return directory


def _engine(config: RunConfig, model_path: str) -> PolicySampler:
    # Each engine brings libraries that the other can do without.
    if config.sampler.engine == "vllm":
        from gflowvlm.actors.vllm_sampler import VllmSampler

        return VllmSampler(config, model_path)
    from gflowvlm.actors.transformers_sampler import TransformersSampler

    return TransformersSampler(config, model_path)
