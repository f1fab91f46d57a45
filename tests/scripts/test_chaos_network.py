"""Nodes with network addresses of their own, and what a pulled cable does; needs root and network namespaces."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from chaos.__main__ import parse
from chaos.network import Cable, Network, own_network
from chaos.schedule import NETWORK, PARTS

from shared.errors import UserError

PORT, PATIENCE_S = 7001, 20.0
LISTEN = f"""
import socket
server = socket.create_server(("", {PORT}))
print("listening", flush=True)
while True:
    server.accept()[0].close()
"""
REACH = "import socket, sys; socket.create_connection((sys.argv[1], {port}), timeout=1.0).close()"


@pytest.fixture
def network() -> Iterator[Network]:
    with ExitStack() as opened:
        try:
            made = opened.enter_context(own_network())
        except UserError as reason:
            pytest.skip(str(reason))
        yield made


@pytest.fixture
def listener(network: Network) -> Iterator[Cable]:
    """A node that takes connections."""
    cable = network.connect()
    command = [*cable.prefix, sys.executable, "-c", LISTEN]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        yield cable
        process.kill()


def reaches(node: Cable, other: Cable) -> bool:
    command = [*node.prefix, sys.executable, "-c", REACH.format(port=PORT), other.address]
    return subprocess.run(command, check=False, capture_output=True, timeout=PATIENCE_S).returncode == 0


def listed(what: str) -> str:
    return subprocess.run(["ip", what, "list"], check=True, capture_output=True, text=True).stdout


def test_a_node_is_reached_at_its_own_address_until_its_cable_is_pulled_and_again_once_it_is_plugged(
    network: Network, listener: Cable
) -> None:
    other = network.connect()
    assert other.address != listener.address
    assert reaches(other, listener)
    listener.pull()
    assert not reaches(other, listener)
    listener.plug()
    assert reaches(other, listener)


def test_nothing_is_left_of_a_network(network: Network) -> None:
    namespace = network.connect().namespace
    assert namespace in listed("netns")
    assert namespace in listed("link")
    network.end()
    assert namespace not in listed("netns")
    assert namespace not in listed("link")


def test_nodes_are_cut_off_only_where_they_have_addresses_of_their_own() -> None:
    assert not parse([]).network
    assert parse(["--network"]).network
    assert NETWORK not in PARTS
