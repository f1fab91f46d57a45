"""How many rollout workers there is room for on this machine, where they take no slots of a Ray of its own."""

from dataclasses import dataclass

import psutil

from gflowvlm.cluster.launch.machine import GIB, machine, memory_limit
from gflowvlm.shared.errors import UserError

WORKER_GIB = 0.5
"""Memory of a rollout worker: 0.45 GiB of its own, as measured with numberline-tiny."""

WORKER_START_S = 8.0
"""Processor time of a rollout worker's start: its imports."""

WORKERS_PER_CORE = 8
"""Up to here workers that wait for answers share a core; beyond, their starts and environments hold up the rest."""


@dataclass(frozen=True)
class LocalCapacity:
    """What a machine has left.

    Attributes:
        cores: Processors that this process may use.
        free_gib: Memory that is available now.
    """

    cores: int
    free_gib: float

    @classmethod
    def now(cls) -> "LocalCapacity":
        """Measures this machine."""
        free = min(psutil.virtual_memory().available, memory_limit())
        return cls(int(machine()["cores"] or 1), free / GIB)

    def check_workers(self, wanted: int, running: int = 0) -> str | None:
        """Judges a number of rollout workers.

        Args:
            wanted: How many there shall be in all.
            running: How many there are already.

        Returns:
            What to expect where they fit and are more than the cores keep busy; None where all is well.

        Raises:
            UserError: There is no memory for them.
        """
        if wanted <= running:
            return None
        fitting = running + int(self.free_gib / WORKER_GIB)
        if wanted > fitting:
            raise UserError(
                f"rollout.workers={wanted}: this machine has room for {fitting} ({self.free_gib:.1f} GiB of memory are "
                f"free, a worker takes {WORKER_GIB:g}); ask for less, or run on a cluster (cluster.address)"
            )
        most = WORKERS_PER_CORE * self.cores
        if wanted <= most:
            return None
        minutes = (wanted - running) * WORKER_START_S / self.cores / 60
        return (
            f"rollout.workers={wanted} is more than {most}, what {self.cores} cores keep busy ({WORKERS_PER_CORE} each)"
            f"; their start takes about {minutes:.0f} minutes"
        )
