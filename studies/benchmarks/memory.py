"""How much memory a piece of work takes at its peak."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(work: Callable[[], object]) -> int:
    """Returns how many bytes torch's allocators held at most during some work, over what they held before it.

    On a GPU its allocator's own peak; elsewhere every allocation in main memory is counted, also those inside of
    torch's operations. What a library such as MKL sets aside for itself is not seen.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    memory = sorted(
        (event["ts"], number, event["args"]["Bytes"])
        for number, event in enumerate(trace["traceEvents"])
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    )
    held = most = 0
    for _, _, change in memory:
        held += change
        most = max(most, held)
    return most
