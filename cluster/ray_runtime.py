"""Starting and stopping Ray for a run."""

import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from cluster.interruption import sigterm_as_interrupt
from cluster.process_environment import PROCESS_ENVIRONMENT
from shared.config import RunConfig
from shared.errors import UserError

FIRST_DASHBOARD_PORT = 8265
# Small control actors of ours and Ray's that take a slot each.
_CONTROL_CPUS = 0.5


@dataclass(frozen=True)
class ResourcePlan:
    """What a run asks of the cluster.

    Attributes:
        rows: (part, processes, CPUs each, GPUs each).
    """

    rows: tuple[tuple[str, int, float, float], ...]

    @property
    def cpus(self) -> float:
        """CPUs in total."""
        return sum(count * cpus for _, count, cpus, _ in self.rows) + _CONTROL_CPUS

    @property
    def gpus(self) -> float:
        """GPUs in total."""
        return sum(count * gpus for _, count, _, gpus in self.rows)


def resource_plan(config: RunConfig) -> ResourcePlan:
    """Returns what the run's parts ask of the cluster."""
    sampler, rollout, learner = config.sampler, config.rollout, config.learner
    return ResourcePlan(
        (
            ("policy server replica", sampler.replicas, sampler.cpus_per_replica, sampler.gpus_per_replica),
            ("rollout worker", rollout.workers, rollout.cpus_per_worker, 0.0),
            ("learner", learner.workers, learner.cpus_per_worker, learner.gpus_per_worker),
        )
    )


@contextmanager
def ray_cluster(config: RunConfig) -> Iterator[str]:
    """Connects to the configured cluster, or starts a local one; yields the dashboard's address.

    Inside, SIGTERM raises `KeyboardInterrupt`.

    Raises:
        UserError: The cluster cannot be reached, a port is taken, or GPUs that are asked for are missing.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    address = config.cluster.address
    context = _start_local(config) if address is None else _connect(address)
    try:
        # Ray's own handler, set at its start, ends the process with a stack trace a few seconds after SIGTERM.
        with sigterm_as_interrupt():
            yield str(context.dashboard_url)
    finally:
        ray.shutdown()


def _connect(address: str) -> ray.runtime_context.RuntimeContext:
    try:
        return ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cluster.address = {address!r}: cannot connect ({reason})") from None


def _start_local(config: RunConfig) -> ray.runtime_context.RuntimeContext:
    cluster, plan = config.cluster, resource_plan(config)
    for key in ("dashboard_port", "metrics_port"):
        port = getattr(cluster, key)
        if port is not None and not _is_free(port):
            raise UserError(f"cluster.{key} = {port}: the port is in use; choose another or leave it null")
    # Slots, not processors: the operating system shares the two cores of a laptop between the parts.
    context = ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, math.ceil(plan.cpus)),
        object_store_memory=cluster.object_store_mib * 2**20,
        include_dashboard=cluster.dashboard,
        dashboard_port=cluster.dashboard_port or _first_free(FIRST_DASHBOARD_PORT),
        _metrics_export_port=cluster.metrics_port,
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env={"env_vars": worker_environment()},
    )
    available = ray.cluster_resources().get("GPU", 0.0)
    if plan.gpus > available:
        ray.shutdown()
        raise UserError(
            f"the run asks for {plan.gpus:g} GPUs and this machine has {available:g}; "
            "set cluster.address to a cluster that has them, or use --preset numberline-tiny"
        )
    return context


def worker_environment() -> dict[str, str]:
    """Returns the environment variables that processes which Ray starts need to find and run our code."""
    root = str(Path(__file__).parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    ours = {name: os.environ.get(name, value) for name, value in PROCESS_ENVIRONMENT.items()}
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), **ours}


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _first_free(port: int, tries: int = 100) -> int:
    for candidate in range(port, port + tries):
        if _is_free(candidate):
            return candidate
    raise UserError(f"no free port from {port} to {port + tries} for the dashboard; set cluster.dashboard=false")
