"""A Ray cluster on this machine: a head and worker nodes, each a process tree with a folder of its own."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from chaos.network import Network, VirtualLink
from chaos.state_store import StateStore
from gflowvlm.shared.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MARK = "GFLOWVLM_CHAOS"
"""Environment variable that all processes of a cluster and its job carry, with the cluster's folder."""

HOST = "127.0.0.1"
START_S = 180.0
END_S = 30.0
CUT_OFF_S = 90.0
"""How long a node is cut off: longer than Ray waits before it gives a node up."""

HEAD_AWAY_S = 600
"""How long nodes wait for another head, as KubeRay has it."""

_STORE_MIB = 128
_LEAVE_S = 10.0
_REJOIN_S = 60.0
_LOOK_S = 0.2


@dataclass
class Node:
    """A running node.

    Attributes:
        name: Its name among the cluster's.
        process: `ray start --block`, the root of its processes.
        log: What it says.
        link: Its connection, where it has a network address of its own.
    """

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    link: VirtualLink | None = None

    @property
    def address(self) -> str:
        """Its network address."""
        return HOST if self.link is None else self.link.address

    def processes(self, title: str) -> list[psutil.Process]:
        """Returns its processes whose title begins so, oldest first."""
        found = [process for process in self.family() if _title(process).startswith(title)]
        return sorted(found, key=lambda process: process.pid)

    def family(self) -> list[psutil.Process]:
        """Returns all its processes."""
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def raylet(self) -> psutil.Process | None:
        """Returns Ray's process that makes it a node; None while there is none."""
        for process in self.family():
            with suppress(psutil.Error):
                if process.name() == "raylet":
                    return process
        return None


class LocalCluster:
    """A head, which runs no part but those without CPUs, and worker nodes that each hold all others. A context manager.

    Token authentication is on. Where the head's state is kept outside of it, drivers run on a node of their own, which
    has no CPUs either: they do not outlive the node that they are on.

    Args:
        logs: Folder for what the nodes say.
        name: How the names of the logs begin.
        workers: Number of worker nodes.
        cpus: CPU slots of a worker node.
        network: What gives every node an address of its own; without it all have this machine's.
        state_store: Where the head's state is kept outside of it; this wants a network.

    Attributes:
        folder: Ray's files; removed at the end.
        environment: What processes need to find cluster and code.
        head: The head.
        drivers_node: The node that drivers run on.
        workers: The worker nodes.
    """

    def __init__(
        self,
        logs: Path,
        name: str,
        workers: int,
        cpus: int,
        network: Network | None = None,
        state_store: StateStore | None = None,
    ) -> None:
        self._logs, self._name, self._count, self._cpus, self._network = logs, name, workers, cpus, network
        self._state_store = state_store
        # A short path: sockets below it may not be longer than 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="gfchaos", dir="/tmp"))
        self._started = 0
        self.workers: list[Node] = []
        self._port, self._client_port = free_ports(2)
        self.environment = node_environment(os.environ, self.folder)
        if state_store is not None:
            self.environment |= {"RAY_gcs_rpc_server_reconnect_timeout_s": str(HEAD_AWAY_S)}

    def __enter__(self) -> "LocalCluster":
        try:
            self.drivers_node = self.head = self._start_head(self._new_link())
            if self._state_store is not None:
                self.drivers_node = self._start(self._new_link(), f"--address={self.address}", "--num-cpus=0")
            for _ in range(self._count):
                self.add_worker()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def address(self) -> str:
        """Where drivers connect, from their node's place in the network."""
        return f"{self.head.address}:{self._port}"

    @property
    def driver_prefix(self) -> list[str]:
        """How a driver's command begins."""
        return [] if self.drivers_node.link is None else self.drivers_node.link.prefix

    @property
    def nodes(self) -> list[Node]:
        """All nodes, the head first."""
        own = [] if self.drivers_node is self.head else [self.drivers_node]
        return [self.head, *own, *self.workers]

    def processes(self, title: str) -> list[psutil.Process]:
        """Returns the processes of all nodes whose title begins so."""
        return [process for node in self.nodes for process in node.processes(title)]

    def add_worker(self) -> None:
        """Starts a worker node and waits until it has joined.

        Raises:
            UserError: It did not join in time.
        """
        self.workers.append(self._start(self._new_link(), f"--address={self.address}", f"--num-cpus={self._cpus}"))

    def kill_worker(self, node: Node) -> int:
        """Kills a worker node's raylet, and what is still there some time later, as on a machine that is gone.

        Returns:
            The raylet's process id.

        Raises:
            UserError: It has none.
        """
        raylet, family = self._given_up(node)
        raylet.kill()
        end_processes(family, END_S)
        node.process.wait(timeout=END_S)
        return int(raylet.pid)

    def cut_off(self, node: Node) -> int:
        """Cuts a worker node off from the others, and connects it again once they have given it up.

        Ray ends a node that comes back from the dead.

        Returns:
            The raylet's process id.

        Raises:
            UserError: It has none, no address of its own, or goes on although it was given up.
        """
        if node.link is None:
            raise UserError(f"node {node.name}: has no link of its own to cut")
        raylet, family = self._given_up(node)
        node.link.disconnect()
        time.sleep(CUT_OFF_S)
        node.link.reconnect()
        _, left = psutil.wait_procs([raylet], timeout=_REJOIN_S)
        end_processes(family, _LEAVE_S)
        node.process.wait(timeout=END_S)
        if left:
            raise UserError(f"node {node.name}: goes on {_REJOIN_S:g} s after it was back; see {node.log}")
        return int(raylet.pid)

    def lose_head(self) -> int:
        """Kills all of the head at once, and starts another at the same address.

        Returns:
            The process id of the head's root.

        Raises:
            UserError: The head's state is gone with it.
        """
        if self._state_store is None:
            raise UserError("the head's state is kept nowhere else: the cluster would end with it")
        lost = self.head
        family = lost.family()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        end_processes(family, END_S)
        lost.process.wait(timeout=END_S)
        self.head = self._start_head(lost.link)
        return lost.process.pid

    def _given_up(self, node: Node) -> tuple[psutil.Process, list[psutil.Process]]:
        """Takes a node off the list of workers; returns its raylet and all its processes."""
        raylet, family = node.raylet(), node.family()
        if raylet is None:
            raise UserError(f"node {node.name}: no raylet to kill; see {node.log}")
        self.workers.remove(node)
        return raylet, family

    def _new_link(self) -> VirtualLink | None:
        return None if self._network is None else self._network.connect()

    def _start_head(self, link: VirtualLink | None) -> Node:
        kept = self._state_store
        return self._start(
            link,
            "--head",
            f"--port={self._port}",
            f"--ray-client-server-port={self._client_port}",
            "--include-dashboard=false",
            "--num-cpus=0",
            *([] if kept is None else [f"--redis-password={kept.password}"]),
            extra={} if kept is None else {"RAY_REDIS_ADDRESS": kept.address},
        )

    def _start(self, link: VirtualLink | None, *arguments: str, extra: Mapping[str, str] | None = None) -> Node:
        """Starts a node, once more each time that Ray gives one up: on a busy machine it has no time to spare."""
        deadline = time.monotonic() + START_S
        while True:
            node = self._spawn(link, arguments, extra or {})
            while node.process.poll() is None:
                if "Ray runtime started" in node.log.read_text(errors="replace"):
                    return node
                if time.monotonic() > deadline:
                    end_processes(node.family(), _LOOK_S)
                    node.process.wait(timeout=END_S)
                    break
                time.sleep(_LOOK_S)
            if time.monotonic() > deadline:
                raise UserError(f"waited {START_S:g} s for {node.name} of the local cluster to start; see {node.log}")

    def _spawn(self, link: VirtualLink | None, arguments: Sequence[str], extra: Mapping[str, str]) -> Node:
        name = f"node-{self._started}"
        self._started += 1
        log = self._logs / f"{self._name}.{name}.log"
        (agent,) = free_ports(1)
        command = [
            *([] if link is None else link.prefix),
            str(Path(sys.executable).parent / "ray"),
            "start",
            "--block",
            "--disable-usage-stats",
            f"--node-ip-address={HOST if link is None else link.address}",
            f"--dashboard-agent-listen-port={agent}",
            f"--object-store-memory={_STORE_MIB * 2**20}",
            f"--temp-dir={self.folder / name}",
            *arguments,
        ]
        with log.open("wb") as output:
            # In a session of its own, so that Ctrl-C ends the job before the nodes it runs on.
            process = subprocess.Popen(
                command,
                env={**self.environment, **extra},
                cwd=self.folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Node(name, process, log, link)

    def _end(self) -> None:
        started = self.nodes if hasattr(self, "head") else []
        for node in reversed(started):
            node.process.send_signal(signal.SIGTERM)
        # No longer: Ray would wait for actors that go with the head anyway.
        psutil.wait_procs([p for node in started for p in node.family()], timeout=_LEAVE_S)
        end_processes(marked(self.folder), _LOOK_S)
        for node in started:
            node.process.wait(timeout=END_S)
        shutil.rmtree(self.folder, ignore_errors=True)


def node_environment(base: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Returns the environment of a cluster's processes and of those that connect to it."""
    kept = {name: value for name, value in base.items() if not name.startswith("RAY_")}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{base.get('PATH', os.defpath)}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        MARK: str(folder),
    }


def marked(folder: Path) -> list[psutil.Process]:
    """Returns the processes that carry a cluster's mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_processes(processes: list[psutil.Process], wait_s: float) -> None:
    """Waits until processes have ended, and kills those that have not in time."""
    _, left = psutil.wait_procs(processes, timeout=wait_s)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=END_S)


def free_ports(count: int) -> list[int]:
    """Returns ports of the loopback address that nobody uses."""
    held = [socket.socket() for _ in range(count)]
    try:
        for probe in held:
            probe.bind((HOST, 0))
        return [int(probe.getsockname()[1]) for probe in held]
    finally:
        for probe in held:
            probe.close()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
