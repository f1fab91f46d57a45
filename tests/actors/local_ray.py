"""A Ray instance of the test's own."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray


@contextmanager
def local_ray(num_cpus: int = 4) -> Iterator[None]:
    """Starts Ray on this machine for as long as the block runs."""
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
    )
    try:
        yield
    finally:
        ray.shutdown()
