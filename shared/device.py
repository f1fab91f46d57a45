"""Where a process computes: on a GPU only where the configuration gave it one.

What torch sees decides nothing: Ray shows all GPUs of a node also to those that asked for none.
"""

import torch

from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError

CPU = torch.device("cpu")


def compute_device(gpus: float, setting: str) -> torch.device:
    """Returns this process's current GPU where GPUs were asked for, else the CPU.

    Args:
        gpus: GPUs that the process was given.
        setting: The setting that says so, for the message.

    Raises:
        UserError: GPUs were asked for, and torch sees none.
    """
    if gpus == 0:
        return CPU
    if not torch.cuda.is_available():
        raise UserError(
            f"{setting} = {gpus:g}, but torch {torch.__version__} sees no GPU here; set it to 0, or install the "
            "extra `gpu`"
        )
    return torch.device("cuda", torch.cuda.current_device())


def on_this_machine(config: RunConfig) -> RunConfig:
    """Returns a run's configuration for a sampler in this process, without Ray.

    It computes on a GPU where the run's samplers did (``sampler.gpus_per_replica``) and this machine has one.
    """
    if config.sampler.gpus_per_replica == 0 or torch.cuda.is_available():
        return config
    return config.model_copy(update={"sampler": config.sampler.model_copy(update={"gpus_per_replica": 0.0})})
