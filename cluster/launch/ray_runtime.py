"""Starting and stopping Ray for a run."""

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from gflowvlm.cluster.launch.local_capacity import LocalCapacity
from gflowvlm.cluster.launch.local_ray import start_local_ray, working_folder
from gflowvlm.cluster.launch.placement import Node, ResourcePlan, amounts, lacking, largest, resource_plan, selectors
from gflowvlm.cluster.launch.process_environment import PROCESS_ENVIRONMENT, package_path
from gflowvlm.cluster.launch.ray_folder import check_ray_folder, is_free, ray_folder
from gflowvlm.run.interruption import termination_as_interrupt
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.user_code import code_environment

# Ray's job supervisor puts the job's own runtime environment here.
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# Room that is there is given at once; only longer waits are worth a line.
_QUIET_WAIT_S = 2.0
_POLL_S = 1.0


@contextmanager
def ray_cluster(config: RunConfig) -> Iterator[str]:
    """Connects to the configured cluster, or starts a local one; yields the dashboard's address.

    Inside, SIGTERM and SIGHUP raise `KeyboardInterrupt`.

    Raises:
        UserError: The cluster cannot be reached, a port is taken, a local one cannot start or cannot have what is
            asked for, or Ray failed inside.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    address = config.cluster.address
    context = _start_local(config) if address is None else _connect(address)
    try:
        # Ray's own handler, set at its start, ends the process with a stack trace a few seconds after SIGTERM.
        with termination_as_interrupt():
            yield str(context.dashboard_url)
    except RayTaskError:
        # An error of our own code on a worker.
        raise
    except RayError as error:
        logs = "" if address is not None else f"; its logs are in {ray_folder()}/session_latest/logs"
        raise UserError(f"Ray has failed ({type(error).__name__}: {one_line(error)}){logs}") from None
    finally:
        ray.shutdown()


def dashboard_line(address: str) -> str:
    """Returns what tells a user where the dashboard is, and how to get in where Ray asks for its token."""
    asks = os.environ.get("RAY_AUTH_MODE") != "disabled"
    return f"Ray dashboard: http://{address}" + (" (the token it asks for: ray get-auth-token)" if asks else "")


def _connect(address: str) -> ray.runtime_context.RuntimeContext:
    try:
        with tempfile.TemporaryDirectory(prefix="gflowvlm-") as empty, working_folder(empty):
            return ray.init(
                address=address,
                logging_level=logging.ERROR,
                log_to_driver=False,
                runtime_env={"env_vars": connection_environment()},
            )
    except (RayError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cluster.address = {address!r}: cannot connect ({one_line(error)})") from None


def _start_local(config: RunConfig) -> ray.runtime_context.RuntimeContext:
    check_local_ray(config)
    cluster, plan = config.cluster, resource_plan(config)
    # Slots, not processors: the operating system shares the two cores of a laptop between the parts.
    context = start_local_ray(
        worker_environment(),
        # They cannot become more later, so there are as many as scaling by load may come to want.
        num_cpus=max(os.cpu_count() or 1, math.ceil(resource_plan(largest(config)).cpus)),
        object_store_memory=cluster.object_store_mib * 2**20,
        include_dashboard=cluster.dashboard,
        # Where none is given Ray takes the first that is free from 8265 on.
        dashboard_port=cluster.dashboard_port,
        _metrics_export_port=cluster.metrics_port,
    )
    available = ray.cluster_resources().get("GPU", 0.0)
    if plan.gpus > available:
        ray.shutdown()
        raise UserError(
            f"the run asks for {plan.gpus:g} GPUs and this machine has {available:g}; "
            "set cluster.address to a cluster that has them, or use --preset numberline-tiny"
        )
    return context


def check_local_ray(config: RunConfig) -> str | None:
    """Looks whether a Ray on this machine could start, and could have what a run asks for besides GPUs and slots.

    Returns:
        What to expect of more rollout workers than this machine keeps busy; None where there are not too many.

    Raises:
        UserError: It could not; nothing was started.
    """
    for part in resource_plan(config).parts:
        if part.resources or part.labels:
            raise UserError(
                f"the {part.name} asks for {amounts(part.resources) or selectors(part.labels)}, which a local cluster "
                "does not have; set cluster.address, or leave custom resources and node labels out"
            )
    for key in ("dashboard_port", "metrics_port"):
        port = getattr(config.cluster, key)
        if port is not None and not is_free(port):
            raise UserError(f"cluster.{key} = {port}: the port is in use; choose another or leave it null")
    check_ray_folder()
    return LocalCapacity.now().check_workers(config.rollout.workers)


def cluster_nodes() -> list[Node]:
    """Returns the nodes of the connected cluster, dead ones included."""
    return [Node.from_ray(entry) for entry in ray.nodes()]


def wait_for_resources(config: RunConfig, say: Callable[[str], None]) -> None:
    """Waits until the connected cluster can hold all that the run cannot start without, at the same time.

    A placement group asks for it, so that an autoscaler sees what is wanted, and what others use counts. It is given
    back before the parts are started.

    Args:
        config: The run's configuration.
        say: Called with a line when the room is not there at once.

    Raises:
        UserError: There was no room within ``cluster.wait_for_resources_s``; the message names what is lacking.
    """
    plan, limit = resource_plan(config, ray.get_runtime_context().get_node_id()), config.cluster.wait_for_resources_s
    asking = [part for part in plan.parts for _ in range(part.needed) if part.bundle]
    if not asking:
        return
    group = placement_group([p.bundle for p in asking], bundle_label_selector=[dict(p.labels) for p in asking])
    try:
        if _is_placed(group, _QUIET_WAIT_S):
            return
        say(f"waiting for room on the cluster, at most {limit:g} s (cluster.wait_for_resources_s): {_lacks(plan)}")
        if not _is_placed(group, limit - _QUIET_WAIT_S):
            raise UserError(
                f"no room on the cluster within {limit:g} s (cluster.wait_for_resources_s): {_lacks(plan)}; "
                "add nodes, ask for less, or wait longer"
            )
    finally:
        remove_placement_group(group)


def _is_placed(group: PlacementGroup, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    # Short looks, because signals are only handled between them.
    while not group.wait(_POLL_S):
        if time.monotonic() > deadline:
            return False
    return True


def _lacks(plan: ResourcePlan) -> str:
    found = "; ".join(lack.describe() for lack in lacking(plan, cluster_nodes()) if lack.stops)
    return found or "the nodes are large enough, but other jobs use them"


def worker_environment() -> dict[str, str]:
    """Returns the environment variables that processes which Ray starts need to find and run our code."""
    return {"PYTHONPATH": package_path(), **_process_environment()}


def _process_environment() -> dict[str, str]:
    return {name: os.environ.get(name, value) for name, value in PROCESS_ENVIRONMENT.items()} | code_environment()


def connection_environment() -> dict[str, str]:
    """Returns what processes on a running cluster need in their environment.

    What the environment of a Ray job sets already is left out: Ray refuses to be given a variable twice.
    """
    job = json.loads(os.environ.get(_JOB_CONFIG, "{}"))
    given = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in _process_environment().items() if name not in given}
