"""Network addresses of their own for the nodes of a cluster on one machine: a bridge and a namespace for each node.

Needs Linux, root, and `ip` (iproute2). A node's link can be cut, which is how a network partition looks from both
of its sides: nothing is refused, nothing answers.
"""

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Network

from gflowvlm.shared.errors import UserError

_COMMAND_S = 20.0


class VirtualLink:
    """A node's connection to the others.

    Attributes:
        namespace: The node's network namespace.
        address: The node's address in it.
    """

    def __init__(self, namespace: str, address: str) -> None:
        self.namespace, self.address = namespace, address

    @property
    def prefix(self) -> list[str]:
        """How a command begins that runs in the namespace."""
        return ["ip", "netns", "exec", self.namespace]

    def disconnect(self) -> None:
        """Cuts the node off."""
        _ip("link", "set", self.namespace, "down")

    def reconnect(self) -> None:
        """Connects it again."""
        _ip("link", "set", self.namespace, "up")


@contextmanager
def own_network() -> Iterator["Network"]:
    """Yields a network for the nodes of a cluster; nothing is left of it afterwards.

    Raises:
        UserError: This machine does not allow it.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise UserError("network namespaces need root and `ip` (Debian: iproute2)")
    network = Network()
    try:
        network.begin()
        yield network
    finally:
        network.end()


class Network:
    """A bridge that nodes are connected to; see `own_network`."""

    def __init__(self) -> None:
        # Names of network devices have at most 15 characters.
        self._name = f"gf{secrets.token_hex(3)}"
        self._addresses = IPv4Network(f"10.{secrets.randbelow(200) + 20}.{secrets.randbelow(256)}.0/24").hosts()
        self._namespaces: list[str] = []

    def begin(self) -> None:
        """Makes the bridge."""
        _ip("link", "add", self._name, "type", "bridge")
        _ip("link", "set", self._name, "up")

    def connect(self) -> VirtualLink:
        """Returns the connection of another node."""
        link = VirtualLink(f"{self._name}n{len(self._namespaces)}", str(next(self._addresses)))
        _ip("netns", "add", link.namespace)
        self._namespaces.append(link.namespace)
        inside = ["-n", link.namespace]
        _ip("link", "add", link.namespace, "type", "veth", "peer", "name", "eth0", "netns", link.namespace)
        _ip("link", "set", link.namespace, "master", self._name)
        _ip("link", "set", link.namespace, "up")
        _ip(*inside, "address", "add", f"{link.address}/24", "dev", "eth0")
        _ip(*inside, "link", "set", "eth0", "up")
        _ip(*inside, "link", "set", "lo", "up")
        # Ray looks for its own address on the way to the internet.
        _ip(*inside, "route", "add", "default", "dev", "eth0")
        return link

    def end(self) -> None:
        """Takes everything down that is there."""
        for namespace in self._namespaces:
            # Linux takes the devices of a deleted namespace down some time later, this one at once.
            with suppress(UserError):
                _ip("link", "delete", namespace)
            with suppress(UserError):
                _ip("netns", "delete", namespace)
        with suppress(UserError):
            _ip("link", "delete", self._name)


def _ip(*arguments: str) -> None:
    """Runs `ip`.

    Raises:
        UserError: It failed.
    """
    command = ["ip", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_COMMAND_S)
    if done.returncode != 0:
        raise UserError(
            f"{' '.join(command)}: {done.stderr.strip() or done.returncode}; --network needs to be allowed it"
        )
