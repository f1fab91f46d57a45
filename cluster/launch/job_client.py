"""Talking to a cluster's dashboard about jobs: its address, a client that never waits for ever, errors in one line."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from gflowvlm.shared.errors import UserError, one_line

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 10.0, 120.0

_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_NO_AGENT = "No available agent"
_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"


class JobClient(JobSubmissionClient):
    """Ray's client with a limit to every request; Ray's own waits for ever on an address that swallows packets."""

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> Any:
        kwargs.setdefault("timeout", (CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S))
        return super()._do_request(method, endpoint, **kwargs)


def connect(address: str) -> JobClient:
    """Returns a client of a dashboard's URL (`job_address`).

    Raises:
        UserError: It cannot be reached, is no Ray dashboard, or refuses the token.
    """
    # Ray lets this variable override the argument.
    os.environ[_ADDRESS_VARIABLE] = address
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    with explained(address):
        return JobClient(address)


def job_address(address: str | None) -> str:
    """Returns the dashboard's URL that an option or the environment names.

    Raises:
        UserError: It is no URL of the kind.
    """
    if address is None:
        ray_address = os.environ.get("RAY_ADDRESS", "")
        address = os.environ.get(_ADDRESS_VARIABLE) or (ray_address if ray_address.startswith("http") else "")
    address = (address or DEFAULT_ADDRESS).rstrip("/")
    if "://" not in address:
        address = f"http://{address}"
    if re.fullmatch(r"https?://(\[[0-9a-fA-F:]+\]|[^/\s:]+)(:\d+)?(/\S*)?", address) is None:
        raise UserError(f"--address {address!r}: give the URL of the cluster's dashboard, such as {DEFAULT_ADDRESS}")
    return address


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Turns what Ray's client raises into one line.

    Args:
        address: The dashboard's URL, which the line begins with.

    Raises:
        UserError: In place of what the client raised.
    """
    try:
        yield
    except AuthenticationError as error:
        what = "refuses this token" if "invalid" in str(error) else "wants Ray's token"
        raise UserError(
            f"{address}: the cluster {what}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the cluster's"
        ) from None
    except OSError as error:
        raise UserError(
            f"{address}: no Ray cluster answers ({type(error).__name__}); give the dashboard's URL with "
            "--address, and see that its port can be reached"
        ) from None
    except (RuntimeError, ValueError) as error:
        reason = one_line(error, 300)
        if _NO_AGENT in reason:
            raise UserError(
                f"{address}: the head's agent, which starts jobs, does not answer; try again once the head is "
                "up, and where another Ray runs on its machine, start the head with "
                "--dashboard-agent-listen-port=PORT, a free one"
            ) from None
        raise UserError(f"{address}: the cluster refuses ({reason})") from None
