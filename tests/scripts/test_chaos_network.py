"""Nodes with network addresses of their own, and what a cut link does; needs root and network namespaces."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from chaos.__main__ import parse
from chaos.network import Network, VirtualLink, own_network
from chaos.nodes import LocalCluster, marked
from chaos.schedule import HEAD, NETWORK, PARTS
from chaos.state_store import state_store

from gflowvlm.shared.errors import UserError

PORT, PATIENCE_S = 7001, 20.0
LISTEN = f"""
import socket
server = socket.create_server(("", {PORT}))
print("listening", flush=True)
while True:
    server.accept()[0].close()
"""
COUNTING = """
import sys
import ray

class Counter:
    def __init__(self):
        self.count = 0

    def add(self):
        self.count += 1
        return self.count

ray.init(address=sys.argv[1], _node_ip_address=sys.argv[2], log_to_driver=False)
counter = ray.remote(Counter).options(num_cpus=1).remote()
for line in sys.stdin:
    late = ray.remote(Counter).options(num_cpus=0.1).remote()
    print(ray.get(counter.add.remote(), timeout=90), ray.get(late.add.remote(), timeout=90), flush=True)
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
def listener(network: Network) -> Iterator[VirtualLink]:
    """A node that takes connections."""
    link = network.connect()
    command = [*link.prefix, sys.executable, "-c", LISTEN]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        yield link
        process.kill()


def reaches(node: VirtualLink, other: VirtualLink) -> bool:
    command = [*node.prefix, sys.executable, "-c", REACH.format(port=PORT), other.address]
    return subprocess.run(command, check=False, capture_output=True, timeout=PATIENCE_S).returncode == 0


def listed(what: str) -> str:
    return subprocess.run(["ip", what, "list"], check=True, capture_output=True, text=True).stdout


def test_a_node_is_reached_at_its_own_address_until_its_link_is_cut_and_again_once_it_is_restored(
    network: Network, listener: VirtualLink
) -> None:
    other = network.connect()
    assert other.address != listener.address
    assert reaches(other, listener)
    listener.disconnect()
    assert not reaches(other, listener)
    listener.reconnect()
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
    assert not parse([]).head
    assert HEAD not in PARTS


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_driver_and_actors_outlive_the_head_and_new_actors_start_once_another_has_taken_over(
    network: Network, tmp_path: Path
) -> None:
    with (
        state_store(network.connect(), tmp_path / "redis.log") as kept,
        LocalCluster(tmp_path, "run", workers=1, cpus=2, network=network, state_store=kept) as cluster,
    ):
        address, lost = cluster.address, cluster.head
        command = [*cluster.driver_prefix, sys.executable, "-c", COUNTING, address, cluster.drivers_node.address]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        with subprocess.Popen(command, env=cluster.environment, **pipes) as driver:
            driver.stdin.write("\n")
            assert driver.stdout.readline() == "1 1\n"
            assert cluster.lose_head() == lost.process.pid
            assert lost.family() == []
            assert (cluster.head is not lost, cluster.address) == (True, address)
            driver.stdin.write("\n")
            assert driver.stdout.readline() == "2 1\n", "the actor began anew, or none can be started"
            driver.stdin.close()
            assert driver.wait(timeout=60) == 0
        folder = cluster.folder
    assert marked(folder) == []
    assert "Ready to accept connections" in (tmp_path / "redis.log").read_text()
    assert not [process for process in psutil.process_iter(["name"]) if process.info["name"] == "redis-server"]


def test_a_head_whose_state_is_kept_nowhere_else_is_not_killed(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path, "run", workers=1, cpus=1)
    try:
        with pytest.raises(UserError, match="kept nowhere else"):
            cluster.lose_head()
    finally:
        cluster.folder.rmdir()
