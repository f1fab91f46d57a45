"""Where a process computes: on a GPU only where the configuration gave it one.

What torch sees decides nothing: Ray shows all GPUs of a node also to those that asked for none.
"""

from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError


def device_name(gpus: float, setting: str, gpu_seen: bool) -> str:
    """Returns torch's name of this process's device: `cuda`, the current GPU, where GPUs were asked for, else `cpu`.

    Args:
        gpus: GPUs that the process was given.
        setting: The setting that says so, for the message.
        gpu_seen: Whether torch sees a GPU.

    Raises:
        UserError: GPUs were asked for, and there is none.
    """
    if gpus == 0:
        return "cpu"
    if not gpu_seen:
        raise UserError(f"{setting} = {gpus:g}, but torch sees no GPU here; set it to 0, or install the extra `gpu`")
    return "cuda"


def sampler_device(config: RunConfig, gpu_seen: bool) -> str:
    """Returns torch's name of the device that a run's sampler computes on in this process; see `device_name`."""
    return device_name(config.sampler.gpus_per_replica, "sampler.gpus_per_replica", gpu_seen)


def on_this_machine(config: RunConfig, gpu_seen: bool) -> RunConfig:
    """Returns a run's configuration for a sampler in this process, without Ray.

    It computes on a GPU where the run's samplers did (``sampler.gpus_per_replica``) and this machine has one, and
    never sleeps: there is no learner beside it.

    Args:
        config: The run's configuration.
        gpu_seen: Whether torch sees a GPU.
    """
    gpus = config.sampler.gpus_per_replica if gpu_seen else 0.0
    changes = {"gpus_per_replica": gpus, "sleep_level": 0}
    return config.model_copy(update={"sampler": config.sampler.model_copy(update=changes)})
