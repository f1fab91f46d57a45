"""Redis, which keeps a head's state so that another head can take over; needs `redis-server` and a network."""

import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from chaos.network import VirtualLink
from gflowvlm.shared.errors import UserError

_PORT = 6379
_START_S, _END_S, _LOOK_S = 30.0, 10.0, 0.1


@dataclass(frozen=True)
class StateStore:
    """A running Redis.

    Attributes:
        address: Host and port.
        password: What it asks for.
    """

    address: str
    password: str


@contextmanager
def state_store(link: VirtualLink, log: Path) -> Iterator[StateStore]:
    """Runs Redis for a head to keep its state in.

    Args:
        link: Its place in the network.
        log: What it says.

    Raises:
        UserError: It is not installed, or does not start.
    """
    program = shutil.which("redis-server")
    if program is None:
        raise UserError("no redis-server on the path, which keeps the head's state (Debian: redis-server)")
    password = secrets.token_hex(16)
    # On its standard input, where `ps` does not show the password. Nothing goes to disk: it outlives the head, no more.
    settings = f"bind {link.address}\nport {_PORT}\nrequirepass {password}\nappendonly no\nsave ''\n"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*link.prefix, program, "-"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        assert process.stdin is not None
        with process.stdin:
            process.stdin.write(settings.encode())
        _wait_until_ready(process, log)
        yield StateStore(f"{link.address}:{_PORT}", password)
    finally:
        process.terminate()
        try:
            process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=_END_S)


def _wait_until_ready(process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while "Ready to accept connections" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise UserError(f"redis-server does not start; see {log}")
        time.sleep(_LOOK_S)
