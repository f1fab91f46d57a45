"""Environment variables that every process of a run needs, set before the libraries that read them are imported."""

import os
import site
from types import MappingProxyType

from gflowvlm.cluster.launch.installation import installation

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
        # What lies in the folder that a user stands in is not ours: a Python that we start does not import from there.
        "PYTHONSAFEPATH": "1",
    }
)


def prepare_process() -> None:
    """Sets what the user has not set. Ray Serve and Train read it on import, and child processes inherit it."""
    for name, value in PROCESS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def package_path() -> str:
    """Returns the ``PYTHONPATH`` of a Python that is to find this package, and what this one was told to find."""
    root = str(installation())
    # An installed package is found by itself, and the rest of its folder must not come before the standard library.
    own = [] if root in {*site.getsitepackages(), site.getusersitepackages()} else [root]
    # Absolute, because the other process may stand elsewhere.
    given = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return os.pathsep.join(dict.fromkeys([*own, *given]))
