"""What a sampler takes of a device's memory, by its settings and its model's sizes."""

from dataclasses import dataclass

from gflowvlm.actors.vllm_arguments import ADAPTERS, GIB
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.model_sizes import ModelSizes

BATCHED_TOKENS = 8192
"""Tokens of the pass that vLLM measures at its start; it chooses 2,048 to 16,384 by the GPU."""

PASS_WIDTHS = 6
"""Copies of the hidden states that a pass without gradients holds at once, beside two of its feed-forward layers."""

LOGIT_COPIES = 3
"""Float32 copies of a batch's logits while tokens are drawn."""

GRAPHS_GIB = 1.0
"""CUDA graphs, where `sampler.enforce_eager` is off; assumed."""

CUDA_CONTEXT = int(0.75 * GIB)
"""What a process takes of a GPU before it has a tensor there; assumed. vLLM counts it as part of its share."""

SMALLEST_RANK = 8
"""vLLM rounds the adapters' rank up, from this on to powers of two."""


@dataclass(frozen=True)
class SamplerMemory:
    """Bytes that one sampler holds on one device.

    Attributes:
        weights: The model, or this device's part of it.
        adapters: Room for the adapters of a run, all versions that are held at once.
        passes: The most that a pass takes, the pictures' and the logits included.
        graphs: CUDA graphs.
        cache: Keys and values.
        cache_tokens: How many tokens' keys and values that is.
    """

    weights: int
    adapters: int
    passes: int
    graphs: int
    cache: int
    cache_tokens: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.adapters + self.passes + self.graphs + self.cache


def sampler_memory(config: RunConfig, sizes: ModelSizes, patches: int, gpu_bytes: int | None) -> SamplerMemory:
    """Returns what one sampler holds on each of its devices.

    Args:
        config: The run's configuration.
        sizes: The model's sizes.
        patches: Pieces that the vision tower cuts the largest picture into.
        gpu_bytes: Memory of a GPU, of which vLLM's cache takes what `sampler.gpu_memory_utilization` leaves. None on a
            CPU or where it is not known: the cache is then the least that the run needs.
    """
    sampler, vllm = config.sampler, config.sampler.engine == "vllm"
    parts = sampler.tensor_parallel_size if vllm else 1
    tokens = max(BATCHED_TOKENS, sampler.max_model_len) if sampler.gpus_per_replica > 0 else sampler.max_model_len
    text = tokens * (PASS_WIDTHS * sizes.hidden + 2 * sizes.intermediate) * sizes.element_bytes
    pictures = patches * sizes.vision_width * sizes.element_bytes
    logits = LOGIT_COPIES * sampler.max_num_seqs * sizes.vocabulary * 4
    rank = config.policy.lora_rank
    rounded = max(SMALLEST_RANK, 1 << (rank - 1).bit_length()) / rank
    weights = sizes.weight_bytes // parts
    # One slot of vLLM stays empty.
    slots = ADAPTERS + 1 if vllm else ADAPTERS
    adapters = int(slots * sizes.adapter_parameters * rounded) * sizes.element_bytes // parts
    passes = (max(text, pictures) + logits) // parts
    graphs = 0 if sampler.enforce_eager or not vllm or sampler.gpus_per_replica == 0 else int(GRAPHS_GIB * GIB)
    per_token = max(1, sizes.cache_bytes_per_token // parts)
    if not vllm:
        cache = sampler.max_num_seqs * sampler.max_model_len * per_token
    elif sampler.gpus_per_replica == 0:
        cache = int(sampler.kv_cache_gib * GIB)
    elif gpu_bytes is None:
        cache = sampler.max_model_len * per_token
    else:
        share = int(sampler.gpu_memory_utilization * gpu_bytes) - CUDA_CONTEXT
        cache = max(0, share - weights - adapters - passes - graphs)
    return SamplerMemory(weights, adapters, passes, graphs, cache, cache // per_token)
