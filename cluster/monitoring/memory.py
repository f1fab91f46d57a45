"""How much memory a local run takes, all its processes together."""

import time
from collections.abc import Callable

import psutil

METER_SHARE = 0.01
"""Share of a processor that a `MemoryMeter` may take."""


def memory_gib() -> float:
    """Returns the proportional set size of this process and all it has started, GiB.

    Pages that processes share are counted once. Where the system does not tell the proportional size, the
    resident size stands in for it, which counts shared pages again for every process.
    """
    driver = psutil.Process()
    total = 0
    for process in (driver, *driver.children(recursive=True)):
        try:
            memory = process.memory_full_info()
        except psutil.Error:
            continue
        total += getattr(memory, "pss", memory.rss)
    return total / 2**30


class MemoryMeter:
    """Asks for `memory_gib` only as often as takes one per cent of a processor.

    The system looks at every page of every process: with some dozens of processes that takes a second, and the
    driver would do little else.

    Args:
        measure: What is asked.

    Attributes:
        peak_gib: The largest value so far.
    """

    def __init__(self, measure: Callable[[], float] = memory_gib) -> None:
        self._measure = measure
        self._gib = 0.0
        self._due = 0.0
        self.peak_gib = 0.0

    def gib(self) -> float:
        """Returns the memory, measured now or a while ago, GiB."""
        if time.monotonic() >= self._due:
            started = time.thread_time()
            self._gib = self._measure()
            self._due = time.monotonic() + (time.thread_time() - started) / METER_SHARE
            self.peak_gib = max(self.peak_gib, self._gib)
        return self._gib
