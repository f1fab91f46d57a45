"""Which sampler an engine's name stands for."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from gflowvlm.actors.sampling import PolicySampler
from gflowvlm.shared.config import RunConfig

SamplerFactory = Callable[[RunConfig, str, str, Callable[[int], Awaitable[Path]] | None], PolicySampler]
"""Starts a sampler: see `make_sampler`."""


def make_sampler(
    config: RunConfig,
    model_path: str,
    engine: str,
    path_of: Callable[[int], Awaitable[Path]] | None = None,
) -> PolicySampler:
    """Starts a sampler.

    Args:
        config: The run's configuration.
        model_path: Model directory or hub name.
        engine: ``vllm`` or ``transformers``.
        path_of: Finds the adapter of a version that a request names.

    Raises:
        UserError: The engine is not installed, or cannot serve the model.
    """
    # Imported here: each engine brings libraries that the other, and the driver, can do without.
    if engine == "vllm":
        from gflowvlm.actors.vllm_sampler import VllmSampler

        return VllmSampler(config, model_path, path_of)
    from gflowvlm.actors.transformers_sampler import TransformersSampler

    return TransformersSampler(config, model_path, path_of)
