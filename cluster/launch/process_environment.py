"""Environment variables that every process of a run needs, set before the libraries that read them are imported."""

import os
from types import MappingProxyType

PROCESS_ENVIRONMENT = MappingProxyType(
    {
        "RAY_TRAIN_V2_ENABLED": "1",
        # Requests go straight to a replica's event loop over gRPC: on two cores Serve then costs nothing
        # (docs/benchmarks.md). It binds a process's requests to the first event loop that makes one, so a
        # process must keep to one loop.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Part of the former, and unwanted: replicas would listen on HTTP ports of their own beside the proxy's, and
        # each would be kept for half a minute after it was told to stop.
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    }
)


def prepare_process() -> None:
    """Sets what the user has not set. Ray Serve and Train read it on import, and child processes inherit it."""
    for name, value in PROCESS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
