"""Serves the policy: a Ray Serve deployment whose replicas each hold a sampler and follow the adapter store."""

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, LoggingConfig

from gflowvlm.actors.adapter_store import find_adapter_store
from gflowvlm.actors.samplers import SamplerFactory, make_sampler
from gflowvlm.actors.sampling import (
    SamplerAsleepError,
    SampleRequest,
    SampleResponse,
    SamplerUnavailableError,
    UnknownVersionError,
)
from gflowvlm.actors.sleeping import SamplerSleep
from gflowvlm.shared.config import RunConfig, SamplerSettings
from gflowvlm.shared.errors import UserError

log = logging.getLogger(__name__)

Answer = SampleResponse | UserError | UnknownVersionError | SamplerUnavailableError
"""What becomes of a request: a response, or the reason why there is none."""

DEPLOYMENT = "PolicyServer"

WAIT_FOR_ADAPTER_S = 30.0
"""Longest single wait on the adapter store; then the replica asks again."""

STORE_ANSWER_S = 30.0
"""How long a lookup in the adapter store may take, its restart included."""

HOLD_S = 20.0
"""How long one request waits for a sampler that sleeps; then its client asks again."""

RETRY_S = 1.0
"""Pause after a failed lookup or load."""

POLL_S = 0.2
"""Pause between looks at a starting deployment."""

HEALTH_CHECK_PERIOD_S = 1.0
"""Three failed checks and Serve replaces the replica."""

HEALTH_CHECK_TIMEOUT_S = 60.0
"""Generous: on few cores a busy replica answers late, and replacing it costs an engine start."""

GRACEFUL_SHUTDOWN_S = 20.0

CONTROLLER_ANSWER_S = 30.0
"""How long Serve's controller may take to answer, its restart included."""

START_TRIES = 2
"""Constructions of a replica before the deployment is given up."""


class PolicyServer:
    """One replica: a sampler, and a task that waits for newer adapters."""

    def __init__(
        self, config: RunConfig, model_path: str, store_name: str, start_sampler: SamplerFactory = make_sampler
    ) -> None:
        """Starts the sampler. Serve calls this on the event loop that later answers the requests."""
        self._store_name = store_name
        context = serve.get_replica_context()
        self._replica, self._application = context.replica_id.unique_id, context.app_name
        self._node = ray.get_runtime_context().get_node_id()
        self._adapter_error: str | None = None
        self._sampler = start_sampler(config, model_path, config.sampler.engine, self._path_of)
        settings = config.sampler
        hold_s = min(HOLD_S, settings.request_timeout_s / 2)
        self._sleep = SamplerSleep(self._sampler, settings.sleep_level, hold_s, settings.request_timeout_s)
        self._orphan_timeout_s, self._store_answered = config.sampler.orphan_timeout_s, time.monotonic()
        self._caught_up = asyncio.Event()
        self._following = asyncio.get_running_loop().create_task(self._follow_store())

    async def sample(self, request: SampleRequest) -> SampleResponse:
        """Samples one response; see `PolicySampler.sample`."""
        if not self._caught_up.is_set():
            # A replica that starts late must not answer with an old version first.
            await self._catch_up()
        async with self._sleep.awake():
            return await self._sampler.sample(request)

    async def sample_together(self, requests: Sequence[SampleRequest]) -> AsyncIterator[list[tuple[int, Answer]]]:
        """Samples several responses in one call; yields them as they are finished, those of one moment together.

        Yields:
            Place of the request among `requests`, and its response, or why it has none: see `PolicySampler.sample`.
        """
        pending = {asyncio.create_task(self._answer(one)): place for place, one in enumerate(requests)}
        try:
            while pending:
                await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                # The engine hands out all responses that end with the same token at once.
                await asyncio.sleep(0)
                done = [task for task in pending if task.done()]
                yield [(pending.pop(task), task.result()) for task in done]
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def _answer(self, request: SampleRequest) -> Answer:
        try:
            return await self.sample(request)
        except (UserError, UnknownVersionError, SamplerUnavailableError) as error:
            return error

    async def sleep(self) -> UserError | SamplerUnavailableError | None:
        """Puts the sampler to sleep at ``sampler.sleep_level`` when what it samples is finished.

        Requests wait until it is woken up. Nothing happens where it sleeps already.

        Returns:
            Why it does not sleep now, or None.
        """
        try:
            await self._sleep.sleep()
        except (UserError, SamplerUnavailableError) as error:
            return error
        return None

    async def wake_up(self) -> UserError | SamplerUnavailableError | None:
        """Wakes the sampler up; nothing happens where it is awake.

        Returns:
            Why it does not answer requests now, or None.
        """
        try:
            await self._sleep.wake_up()
        except (UserError, SamplerUnavailableError) as error:
            return error
        return None

    async def status(self) -> dict[str, Any]:
        """Returns the sampler's stats, ``replica``, ``pid``, ``node``, ``asleep``, and ``adapter_error``: why the
        newest adapter is not in use, or None."""
        return {
            **self._sampler.stats(),
            "replica": self._replica,
            "pid": os.getpid(),
            "node": self._node,
            "asleep": self._sleep.asleep,
            "adapter_error": self._adapter_error,
        }

    async def check_health(self) -> None:
        """Raises when the sampler cannot answer, or new adapters are no longer followed."""
        await self._sampler.check_health()
        if self._following.done():
            raise SamplerUnavailableError("the task that follows the adapter store ended")

    def __del__(self) -> None:
        """Ends the sampler and its processes; Serve calls this once, before the replica goes."""
        following, sampler = getattr(self, "_following", None), getattr(self, "_sampler", None)
        if following is not None:
            following.cancel()
        if sampler is not None:
            sampler.shutdown()

    async def _follow_store(self) -> None:
        while True:
            try:
                if self._caught_up.is_set():
                    loaded = self._sampler.stats()["loaded_versions"]
                    newer = await self._ask_store(
                        "wait_newer", self._sampler.newest, WAIT_FOR_ADAPTER_S, self._replica, loaded
                    )
                else:
                    newer = await self._ask_store("newest", self._replica)
                async with self._sleep.awake():
                    if newer is not None and newer[1] is not None:
                        await self._sampler.load(*newer)
                    self._caught_up.set()
                    # Also without news: requests that kept an old adapter may have ended meanwhile.
                    await self._sampler.retire()
                self._adapter_error = None
            except SamplerAsleepError:
                log.debug("replica %s: asleep; the newest adapter is loaded when it is woken up", self._replica)
            except (UserError, UnknownVersionError, SamplerUnavailableError) as error:
                self._adapter_error = str(error)
                log.warning("replica %s: %s", self._replica, error)
                if time.monotonic() - self._store_answered > self._orphan_timeout_s:
                    await self._end_application()
                await asyncio.sleep(RETRY_S)

    async def _end_application(self) -> None:
        """Ends all replicas: the store goes with the run's driver, which cannot end them once it was killed."""
        log.error("replica %s: its run is gone (sampler.orphan_timeout_s); ends %s", self._replica, self._application)
        try:
            # Returns only after this replica was asked to end; meanwhile requests must go on.
            await asyncio.to_thread(serve.delete, self._application)
        except RayError as error:
            log.warning("replica %s: Ray Serve does not take it: %s", self._replica, error)

    async def _catch_up(self) -> None:
        try:
            await asyncio.wait_for(self._caught_up.wait(), STORE_ANSWER_S)
        except TimeoutError:
            reason = self._adapter_error or "no answer"
            raise SamplerUnavailableError(
                f"waited {STORE_ANSWER_S:.0f} s for the adapter store {self._store_name!r}: {reason}"
            ) from None

    async def _path_of(self, version: int) -> Path:
        path: Path = await self._ask_store("path", version, self._replica)
        return path

    async def _ask_store(self, method: str, *arguments: Any) -> Any:
        # Looked up by name each time: after a crash of the driver the store is another actor.
        try:
            store = find_adapter_store(self._store_name)
            answer = getattr(store, method).remote(*arguments)
            found = await asyncio.wait_for(answer, WAIT_FOR_ADAPTER_S + STORE_ANSWER_S)
            self._store_answered = time.monotonic()
            return found
        except UnknownVersionError as error:
            # Ray's own class for it names this process; the plain one travels.
            raise UnknownVersionError(str(error.args[0]).strip().splitlines()[-1]) from None
        except (ValueError, TimeoutError, RayError) as error:
            raise SamplerUnavailableError(
                f"the adapter store {self._store_name!r} does not answer ({type(error).__name__})"
            ) from None


def deploy_policy_server(
    config: RunConfig, model_path: str, store_name: str, name: str, start_sampler: SamplerFactory = make_sampler
) -> DeploymentHandle:
    """Deploys the policy server on the connected Ray cluster and waits until every replica is ready.

    Args:
        config: The run's configuration.
        model_path: Model directory or hub name, the same on every node.
        store_name: Name of the run's adapter store (`start_adapter_store`).
        name: Name of the Serve application.
        start_sampler: Starts the sampler of each replica.

    Returns:
        The handle for `PolicyClient`.

    Raises:
        UserError: A replica cannot start, or not within ``sampler.start_timeout_s``.
    """
    sampler = config.sampler
    # Requests come over handles only: no proxy, no port.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled", logging_config=quiet_logging())
    deployment = serve.deployment(PolicyServer, name=DEPLOYMENT, **replica_options(sampler))
    application = deployment.bind(config, model_path, store_name, start_sampler)
    target = serve.RunTarget(target=application, name=name, route_prefix=None, external_scaler_enabled=True)
    (handle,) = serve.run_many([target], wait_for_applications_running=False)
    try:
        wait_until_running(name, DEPLOYMENT, sampler.start_timeout_s)
    except UserError:
        shutdown_policy_server(name)
        raise
    return handle


def replica_options(sampler: SamplerSettings) -> dict[str, Any]:
    """Returns the options of a Serve deployment whose replicas each hold an engine."""
    return {
        "num_replicas": sampler.replicas,
        # No runtime environment here: Serve then gives replicas the job's, its variables included.
        "ray_actor_options": {
            "num_cpus": sampler.cpus_per_replica,
            "num_gpus": sampler.gpus_per_replica,
            "resources": dict(sampler.resources_per_replica),
            "label_selector": dict(sampler.node_labels),
        },
        # More than run at once, so that the engine always has the next ones waiting.
        "max_ongoing_requests": 2 * sampler.max_num_seqs + 16,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        "graceful_shutdown_timeout_s": GRACEFUL_SHUTDOWN_S,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_constructor_retry_count": START_TRIES,
        "logging_config": quiet_logging(),
    }


def scale_policy_server(name: str, replicas: int) -> None:
    """Sets the number of replicas of a policy server that runs, without a restart of any; does not wait for them.

    A replica that goes answers the requests that it has for at most `GRACEFUL_SHUTDOWN_S`; what is left then is asked
    of another by `PolicyClient`.

    Raises:
        UserError: Serve does not take it.
    """
    try:
        # What the dashboard's REST call for external scalers does; a run may have no dashboard.
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        answer = controller.update_deployment_replicas.remote(DeploymentID(DEPLOYMENT, app_name=name), replicas)
        ray.get(answer, timeout=CONTROLLER_ANSWER_S)
    except (ValueError, RayError) as error:
        raise UserError(
            f"policy server {name!r}: Ray Serve cannot change its replicas now ({type(error).__name__}); try again"
        ) from None


def shutdown_policy_server(name: str) -> None:
    """Ends a policy server and its processes; nothing happens when there is none of this name."""
    if name in serve.status().applications:
        serve.delete(name)


def wait_until_running(name: str, deployment_name: str, timeout_s: float) -> None:
    """Returns when every replica of a Serve application's one deployment is ready.

    Raises:
        UserError: A replica cannot start, or not within `timeout_s` seconds (``sampler.start_timeout_s``).
    """
    deadline = time.monotonic() + timeout_s
    while True:
        application = serve.status().applications.get(name)
        deployment = None if application is None else application.deployments.get(deployment_name)
        message = "" if deployment is None else deployment.message
        if application is not None and application.status == ApplicationStatus.RUNNING:
            return
        if application is not None and application.status == ApplicationStatus.DEPLOY_FAILED:
            raise UserError(f"the policy server cannot start: {_reason(message)}")
        if time.monotonic() > deadline:
            raise UserError(
                f"waited {timeout_s:.0f} s (sampler.start_timeout_s) for the policy server {name!r} to start: "
                f"{_reason(message) or 'no message'}"
            )
        time.sleep(POLL_S)


def _reason(message: str) -> str:
    """Returns the line of Serve's message that says what is wrong: the last error of the traceback in it."""
    errors = re.findall(r"^(?:[\w.]+\.)?UserError: (.+)$", message, flags=re.MULTILINE)
    if errors:
        return str(errors[-1])
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def quiet_logging() -> LoggingConfig:
    """Returns Serve's logging without a line for every request."""
    return LoggingConfig(log_level="WARNING", enable_access_log=False)
