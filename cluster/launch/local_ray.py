"""Starting a Ray on this machine: what it needs is looked at first, and why it cannot start is one line."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from gflowvlm.cluster.launch.ray_folder import check_ray_folder, ray_folder
from gflowvlm.run.interruption import hangup_ignored
from gflowvlm.shared.errors import UserError

_REASON_CHARACTERS = 300
_NO_SERVERS_PORT = 9


def start_local_ray(environment: Mapping[str, str], **options: Any) -> ray.runtime_context.RuntimeContext:
    """Starts a Ray of this process's own and connects to it; its processes do not take the SIGHUP of a closed terminal.

    Args:
        environment: Environment variables of its workers.
        options: Those of `ray.init`, except where and how much it logs.

    Raises:
        UserError: It cannot start; the message says what is wrong, where, and what to do.
    """
    check_ray_folder()
    if not options.get("include_dashboard", True):
        # Ray records the address even so, and asks whoever listens there, such as another cluster's dashboard.
        options["dashboard_port"] = _NO_SERVERS_PORT
    options["runtime_env"] = {
        "env_vars": dict(environment),
        "worker_process_setup_hook": f"{__name__}.{name_own_cluster.__name__}",
    }
    try:
        with hangup_ignored(), working_folder(ray_folder()):
            # At first without Ray's own words, which are part of the error that it raises.
            context = ray.init(address="local", logging_level=logging.CRITICAL, log_to_driver=False, **options)
    except Exception as error:  # noqa: BLE001 - Ray raises bare exceptions for what does not start
        ray.shutdown()
        raise UserError(_explanation(error)) from None
    logging.getLogger("ray").setLevel(logging.ERROR)
    return context


def name_own_cluster() -> None:
    """Has a worker look its own cluster up, where Ray would take the newest on the machine, or the shell's.

    Ray Train's guard would end the learner of a run whose controller that other cluster does not know.
    """
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    os.environ.pop("RAY_API_SERVER_ADDRESS", None)


@contextmanager
def working_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Has Ray see another working directory while it is initialised.

    It puts the driver's before everything that its workers import from, so that modules there would replace ours and
    the standard library's. The processes of a local Ray stay in it.
    """
    before = os.open(os.curdir, os.O_RDONLY)
    try:
        os.chdir(folder)
        yield
    finally:
        os.fchdir(before)
        os.close(before)


def _explanation(error: Exception) -> str:
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Where a log is quoted, its last line is the error.
    reason = (lines[-1] if lines else type(error).__name__)[:_REASON_CHARACTERS]
    without = "cluster.dashboard=false runs without it; " if "dashboard" in text else ""
    return (
        f"Ray cannot start on this machine: {reason}; {without}its logs are in {ray_folder()}/session_latest/logs, and "
        "`gflowvlm doctor --ray` tries it alone"
    )
