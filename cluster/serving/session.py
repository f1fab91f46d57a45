"""Serving a policy from the command line: a Ray of its own, an address, and an orderly end."""

import importlib.util
import ipaddress
import json
import logging
import socket
import time
from dataclasses import dataclass, replace

from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import ApplicationStatus
from rich.console import Console

from gflowvlm.actors.policy_server import quiet_logging, shutdown_policy_server, wait_until_running
from gflowvlm.cluster.launch.ray_runtime import dashboard_line, ray_cluster
from gflowvlm.cluster.serving.application import DEPLOYMENT, application
from gflowvlm.cluster.serving.served_policy import API_KEY_VARIABLE, ServedPolicy
from gflowvlm.shared.config import RolloutSettings, RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.learner_settings import LearnerSettings

APPLICATION = "policy"

WATCH_S = 2.0
"""Pause between looks at the application."""

REQUEST_MARGIN_S = 30.0
"""What a request may take beyond ``sampler.request_timeout_s``: waiting for a place in the batch."""


@dataclass(frozen=True)
class Address:
    """Where the API listens.

    Attributes:
        host: Name or address.
        port: Port.
    """

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def url(self) -> str:
        """The address for a client on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def check(self) -> None:
        """Raises `UserError` where nothing can listen."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
        except socket.gaierror:
            raise UserError(f"--host {self.host!r}: no such address; use 127.0.0.1, or one of this machine") from None
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                raise UserError(
                    f"--host {self.host} --port {self.port}: cannot listen there ({error.strerror}); choose another"
                ) from None


def serve_until_stopped(policy: ServedPolicy, address: Address, console: Console) -> None:
    """Serves a policy until Ctrl-C, SIGTERM or SIGHUP; nothing is left running afterwards.

    Args:
        policy: What to serve.
        address: Where.
        console: Where to tell about it.

    Raises:
        UserError: vLLM is not installed, a replica cannot start, or Ray ended by itself.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("serving needs vLLM, which is not installed; install the extra `cpu` or `gpu` (make setup)")
    policy = replace(policy, config=_own_cluster(policy.config))
    _print_policy(policy, console)
    try:
        with ray_cluster(policy.config) as dashboard:
            try:
                _start(policy, address)
                if policy.config.cluster.dashboard:
                    console.print(dashboard_line(dashboard))
                _print_address(policy, address, console)
                _watch(console)
            finally:
                shutdown_policy_server(APPLICATION)
    except KeyboardInterrupt:
        console.print("stopped")


def _own_cluster(config: RunConfig) -> RunConfig:
    """Returns the configuration for a Ray of its own: where Serve listens is settled for a whole cluster, once."""
    # One machine has no custom resources and no labels, and only the replicas are started on it.
    return config.model_copy(
        update={
            "cluster": config.cluster.model_copy(
                update={"address": None, "control_resources": {}, "control_node_labels": {}}
            ),
            "sampler": config.sampler.model_copy(update={"resources_per_replica": {}, "node_labels": {}}),
            "rollout": RolloutSettings(),
            "learner": LearnerSettings(),
        }
    )


def _start(policy: ServedPolicy, address: Address) -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="HeadOnly",
        http_options={
            "host": address.host,
            "port": address.port,
            "request_timeout_s": policy.config.sampler.request_timeout_s + REQUEST_MARGIN_S,
        },
        logging_config=quiet_logging(),
    )
    target = serve.RunTarget(target=application(policy), name=APPLICATION, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)
    wait_until_running(APPLICATION, DEPLOYMENT, policy.config.sampler.start_timeout_s)


def _watch(console: Console) -> None:
    """Returns never; says when replicas are lost and when they are back."""
    known = ApplicationStatus.RUNNING
    while True:
        time.sleep(WATCH_S)
        try:
            status = serve.status().applications[APPLICATION].status
        except (RayError, KeyError) as error:
            raise UserError(f"Ray Serve ended by itself ({type(error).__name__}); start it again") from None
        if status != known:
            known = status
            console.print(f"{time.strftime('%H:%M:%S')} the policy is {status.value}")


def _print_policy(policy: ServedPolicy, console: Console) -> None:
    if policy.adapter is None:
        what = f"{policy.model} without an adapter"
    elif policy.version is None:
        what = f"adapter {policy.adapter} on {policy.model}"
    else:
        what = f"adapter version {policy.version} on {policy.model}"
    replicas = policy.config.sampler.replicas
    engines = "one vLLM engine" if replicas == 1 else f"{replicas} vLLM engines"
    console.print(f"starting {engines}: {what}", soft_wrap=True)


def _print_address(policy: ServedPolicy, address: Address, console: Console) -> None:
    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    say(f"listening on {address.host}, port {address.port}")
    if not address.loopback:
        who = "with the key" if policy.require_api_key else f"without any key ({API_KEY_VARIABLE} is not set)"
        say(f"WARNING: other machines can reach this address, and use the policy {who}; nothing is encrypted")
    say(f"OpenAI-compatible API: {address.url}/v1")
    say(f"models: {', '.join(policy.model_names)}")
    say(f"health: {address.url}/health")
    say("example:")
    say(curl_example(policy, address))
    say("Ctrl-C ends it")


def curl_example(policy: ServedPolicy, address: Address) -> str:
    """Returns a shell command that sends ``picture.png`` and a prompt to the policy."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,'$(base64 -w0 picture.png)'"}}
    message = {"role": "user", "content": [picture, {"type": "text", "text": "PROMPT"}]}
    body = json.dumps({"model": policy.model_names[0], "messages": [message]})
    key = f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if policy.require_api_key else ""
    return f"  curl {address.url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n    -d '{body}'"
