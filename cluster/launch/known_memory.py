"""What memory is known to be there before a run starts."""

import torch

from gflowvlm.cluster.launch.machine import memory_limit
from gflowvlm.evaluation.memory_plan import GIB, Memory
from gflowvlm.shared.config import RunConfig


def known_memory(config: RunConfig, gpu_gib: float | None = None) -> Memory:
    """Returns the memory of the GPUs and of the machine that a run would have.

    Args:
        config: The run's configuration. Of a cluster that it names nothing is known.
        gpu_gib: Memory of each GPU, GiB, where the user says it; otherwise it is this machine's first one's.
    """
    local = config.cluster.address is None
    gpu = None if gpu_gib is None else int(gpu_gib * GIB)
    if gpu is None and local and torch.cuda.is_available():
        gpu = int(torch.cuda.get_device_properties(0).total_memory)
    return Memory(gpu, memory_limit() if local else None)
