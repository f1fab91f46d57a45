"""How much memory a local run takes, all its processes together."""

import psutil


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
