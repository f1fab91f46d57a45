"""The trained policy behind vLLM's OpenAI-compatible API: a Ray Serve application.

`app` is what a Serve configuration imports (``gflowvlm.cluster.serving.application:app``), on KubeRay as on any
cluster; `gflowvlm serve` runs the same application on a Ray of its own.
"""

import os
from typing import Any

from ray import serve
from ray.serve import Application

from gflowvlm.actors.policy_server import replica_options
from gflowvlm.cluster.serving.served_policy import API_KEY_VARIABLE, ServeArguments, ServedPolicy, served_policy
from gflowvlm.shared.errors import UserError

DEPLOYMENT = "PolicyAPI"


def app(arguments: ServeArguments) -> Application:
    """Builds the application; Ray Serve calls this with the ``args`` of its configuration.

    Raises:
        UserError: As `served_policy`.
    """
    return application(served_policy(arguments))


def application(policy: ServedPolicy) -> Application:
    """Returns the Serve application of a policy."""
    deployment = serve.deployment(PolicyAPI, name=DEPLOYMENT, **replica_options(policy.config.sampler))
    bound: Application = deployment.bind(policy)
    return bound


@serve.ingress()
class PolicyAPI:
    """One replica: an engine with the adapter, and vLLM's API around it."""

    def __init__(self, policy: ServedPolicy) -> None:
        """Starts the engine.

        Raises:
            UserError: vLLM cannot serve the model, or there is no API key where one must be.
        """
        api_key = api_key_for(policy)
        # vLLM is imported where an engine runs, and nowhere else.
        from gflowvlm.cluster.serving.openai_server import OpenAIServer

        self._server = OpenAIServer(policy, api_key)

    async def __serve_build_asgi_app__(self) -> Any:
        """Returns the replica's ASGI application; Serve calls this once, after the constructor.

        Raises:
            UserError: vLLM cannot apply the adapter.
        """
        return await self._server.build_app()

    async def check_health(self) -> None:
        """Raises when the engine is gone; Serve then starts another replica."""
        self._server.check_health()

    def __del__(self) -> None:
        """Ends the engine and its processes; Serve calls this once, before the replica goes."""
        server = getattr(self, "_server", None)
        if server is not None:
            server.shutdown()


def api_key_for(policy: ServedPolicy) -> str | None:
    """Returns the key of this process's environment, None where there is none and none is needed.

    Raises:
        UserError: There is none, and the policy must not be served without.
    """
    key = os.environ.get(API_KEY_VARIABLE) or None
    if policy.require_api_key and key is None:
        raise UserError(f"{API_KEY_VARIABLE} is not set where the replica runs; set it, or require_api_key: false")
    return key
