"""Calls of actors that may be restarting."""

import time
from collections.abc import Callable
from typing import Any

import ray

ACTOR_TIMEOUT_S = 120.0
"""Longest wait for an actor of the run to answer; covers its restart."""

PAUSE_S = 0.5


def answer_of(call: Callable[[], ray.ObjectRef], what: str) -> Any:
    """Returns the answer of an actor that may be restarting, asking again until `ACTOR_TIMEOUT_S`.

    Args:
        call: Makes the call; made again after each loss, so the actor must take it twice without harm.
        what: What is waited for, for the error.

    Raises:
        TimeoutError: The actor did not answer in time. What the method itself raises passes through.
    """
    deadline = time.monotonic() + ACTOR_TIMEOUT_S
    while True:
        try:
            return ray.get(call(), timeout=max(1.0, deadline - time.monotonic()))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {ACTOR_TIMEOUT_S:.0f} s for {what}") from error
            time.sleep(PAUSE_S)
