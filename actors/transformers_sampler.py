"""Samples responses with plain transformers and PEFT: for platforms without vLLM, and as its cross-check."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForImageTextToText,
    BatchFeature,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.utils import logging as transformers_logging

from gflowvlm.actors.sampling import (
    AdapterVersions,
    PromptTooLongError,
    SampleRequest,
    SampleResponse,
    SamplerUnavailableError,
    new_engine_seed,
)
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.device import sampler_device
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import BASE_VERSION

GATHER_S = 0.005
"""How long the first request of a batch waits for company."""


@dataclass(frozen=True)
class _Sampled:
    """The tokens of a response, their log-probabilities, and whether a limit ended it."""

    token_ids: list[int]
    log_probs: list[float]
    cut: bool


@dataclass(frozen=True)
class _Waiting:
    """A request with its fixed version, and where its answer goes."""

    request: SampleRequest
    version: int
    answer: "asyncio.Future[_Sampled]"


class TransformersSampler:
    """A policy in this process. Requests that arrive together are answered as one batch per version."""

    def __init__(
        self,
        config: RunConfig,
        model_path: str,
        path_of: Callable[[int], Awaitable[Path]] | None = None,
    ) -> None:
        """Loads the model, on a GPU if ``sampler.gpus_per_replica`` asks for one.

        Args:
            config: The run's configuration.
            model_path: Model directory or hub name.
            path_of: Finds the adapter of a version that a request names (see `AdapterVersions`).

        Raises:
            UserError: The model cannot be loaded, or there is no GPU where one was asked for.
        """
        self._inputs = PolicyInputs.load(model_path, prompts=config.policy)
        self._settings = config.sampler
        self._device = torch.device(sampler_device(config, torch.cuda.is_available()))
        self._dtype: torch.dtype = getattr(torch, config.policy.dtype)
        self._model = _load_model(self._inputs.model, self._dtype).to(self._device)
        self._free_draws = torch.Generator(self._device).manual_seed(new_engine_seed())
        self._versions = AdapterVersions(self._add, self._remove, path_of)
        # One thread: generation and changes of the adapters never overlap, and the loop stays free.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="transformers-sampler")
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._batching: asyncio.Task[None] | None = None

    @property
    def newest(self) -> int:
        """The version that answers requests which name none."""
        return self._versions.newest

    async def sample(self, request: SampleRequest) -> SampleResponse:
        """Samples one response; see `PolicySampler.sample`."""
        if self._batching is None:
            self._batching = asyncio.create_task(self._answer_batches())
        async with self._versions.admit(request.version) as version:
            waiting = _Waiting(request, version, asyncio.get_running_loop().create_future())
            self._waiting.put_nowait(waiting)
            sampled = await waiting.answer
        token_ids = sampled.token_ids
        self._versions.count(len(token_ids))
        return SampleResponse(token_ids, sampled.log_probs, self._inputs.decode(token_ids), version, sampled.cut)

    async def load(self, version: int, path: Path) -> None:
        """Makes an adapter known; see `PolicySampler.load`."""
        await self._versions.load(version, path)

    async def retire(self) -> None:
        """Drops adapters that are not the newest and that no request in flight names."""
        await self._versions.retire()

    async def sleep(self, level: int) -> None:
        """Moves the model into main memory; see `PolicySampler.sleep`."""
        await self._in_thread(self._move, torch.device("cpu"))

    async def wake_up(self) -> None:
        """Moves the model back to its device; see `PolicySampler.wake_up`."""
        await self._in_thread(self._move, self._device)

    async def check_health(self) -> None:
        """Raises `SamplerUnavailableError` when requests are no longer answered."""
        if self._batching is not None and self._batching.done():
            raise SamplerUnavailableError("the transformers sampler stopped")

    def stats(self) -> dict[str, Any]:
        """Returns `AdapterVersions.stats`; the engine has no process of its own."""
        return {**self._versions.stats(), "engine_pids": []}

    def shutdown(self) -> None:
        """Stops answering."""
        if self._batching is not None:
            self._batching.cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _answer_batches(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            await asyncio.sleep(GATHER_S)
            while not self._waiting.empty() and len(batch) < self._settings.max_num_seqs:
                batch.append(self._waiting.get_nowait())
            for version in sorted({waiting.version for waiting in batch}):
                await self._answer([w for w in batch if w.version == version and not w.answer.done()], version)

    async def _answer(self, batch: list[_Waiting], version: int) -> None:
        requests = [waiting.request for waiting in batch]
        answers: Sequence[_Sampled | Exception]
        try:
            answers = await self._in_thread(self._sample_fitting, requests, version)
        except (UserError, ValueError) as error:
            answers = [error] * len(batch)
        except (RuntimeError, OSError, IndexError) as error:
            answers = [SamplerUnavailableError(f"the transformers sampler failed ({error})")] * len(batch)
        for waiting, answer in zip(batch, answers, strict=True):
            if waiting.answer.done():
                continue
            if isinstance(answer, _Sampled):
                waiting.answer.set_result(answer)
            else:
                waiting.answer.set_exception(answer)

    def _sample_fitting(self, requests: Sequence[SampleRequest], version: int) -> list[_Sampled | PromptTooLongError]:
        """Returns a response for each request, or why its prompt leaves no room for one."""
        if len(requests) == 0:
            return []
        longest = self._settings.max_model_len
        inputs = self._encode(requests)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        fitting = [request for request, length in zip(requests, lengths, strict=True) if length < longest]
        if len(fitting) < len(requests):
            # Again, because the longest of a batch says how far the others are padded.
            inputs = self._encode(fitting) if fitting else inputs
        sampled = iter(self._generate(fitting, inputs, version) if fitting else ())
        return [next(sampled) if length < longest else PromptTooLongError.of(length, longest) for length in lengths]

    def _encode(self, requests: Sequence[SampleRequest]) -> BatchFeature:
        return self._inputs.encode([r.prompt for r in requests], [r.image for r in requests])

    @torch.inference_mode()
    def _generate(self, requests: Sequence[SampleRequest], inputs: BatchFeature, version: int) -> list[_Sampled]:
        padded = inputs["input_ids"].shape[1]
        # What the prompt itself leaves, not the longest of those that happen to be answered with it.
        rooms = (self._settings.max_model_len - inputs["attention_mask"].sum(dim=1)).tolist()
        limits = [min(request.max_tokens, room) for request, room in zip(requests, rooms, strict=True)]
        draw = _DrawTokens(requests, self._inputs.forbidden_ids, self._free_draws)
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max(limits),
            eos_token_id=sorted(self._inputs.end_ids),
            pad_token_id=self._inputs.end_id,
        )
        with self._adapter(version):
            sequences = self._model.generate(
                **inputs.to(self._device, self._dtype),
                generation_config=settings,
                logits_processor=LogitsProcessorList([draw]),
            )
        log_probs = torch.stack(draw.log_probs, dim=1)
        return [
            self._ended(ids, probs, limit)
            for ids, probs, limit in zip(sequences[:, padded:].tolist(), log_probs.tolist(), limits, strict=True)
        ]

    def _ended(self, ids: list[int], log_probs: list[float], limit: int) -> _Sampled:
        """Returns a response up to its end token or its limit, whichever comes first."""
        ends = self._inputs.end_ids
        end = next((place for place, token in enumerate(ids, start=1) if token in ends), len(ids) + 1)
        length = min(end, limit)
        return _Sampled(ids[:length], log_probs[:length], cut=end > limit)

    def _adapter(self, version: int) -> AbstractContextManager[None]:
        if not isinstance(self._model, PeftModel):
            return nullcontext()
        if version == BASE_VERSION:
            return self._model.disable_adapter()
        self._model.set_adapter(f"v{version}", inference_mode=True)
        return nullcontext()

    async def _add(self, version: int, path: Path) -> None:
        try:
            await self._in_thread(self._add_adapter, version, path)
        except (ValueError, RuntimeError, OSError, KeyError, SafetensorError) as error:
            reason = one_line(error, 300)
            raise UserError(f"adapter {path}: the sampler cannot apply it ({reason})") from None

    def _add_adapter(self, version: int, path: Path) -> None:
        name = f"v{version}"
        settings = PeftConfig.from_pretrained(str(path))
        settings.inference_mode = True
        if isinstance(self._model, PeftModel):
            self._model.add_adapter(name, settings)
        else:
            self._model = PeftModel(self._model, settings, name).eval()
        try:
            unused = self._model.load_adapter(str(path), name, torch_device=str(self._device)).unexpected_keys
            if unused:
                raise ValueError(f"it adapts {unused[0]}, which the model does not have")
        except (ValueError, RuntimeError, OSError, KeyError, SafetensorError):
            self._model.delete_adapter(name)
            raise

    async def _remove(self, version: int) -> None:
        await self._in_thread(lambda: self._model.delete_adapter(f"v{version}"))

    def _move(self, device: torch.device) -> None:
        self._model.to(device)
        if self._device.type == "cuda":
            # Else torch would keep what the model has left, and the learner could not have it.
            torch.cuda.empty_cache()

    async def _in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)


class _DrawTokens(LogitsProcessor):
    """Draws each row's next token and notes its raw log-probability.

    By the Gumbel-max trick the arg max of ``logits / temperature + Gumbel noise`` is a draw from the
    softmax, so greedy generation over the scores it returns samples, each row at its own temperature and
    from its own seed.
    """

    def __init__(self, requests: Sequence[SampleRequest], forbidden: list[int], free_draws: torch.Generator) -> None:
        device = free_draws.device
        self.log_probs: list[torch.Tensor] = []
        self._forbidden = torch.tensor(forbidden, dtype=torch.long, device=device)
        self._temperatures = [request.temperature for request in requests]
        self._generators = [
            free_draws if r.seed is None else torch.Generator(device).manual_seed(r.seed) for r in requests
        ]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Returns scores (N, vocabulary) whose arg max is the drawn token; notes (N,) log-probabilities."""
        raw = scores.float().log_softmax(dim=-1)
        drawn = raw.clone()
        for row, (temperature, generator) in enumerate(zip(self._temperatures, self._generators, strict=True)):
            if temperature > 0.0:
                noise = torch.empty_like(drawn[row]).exponential_(generator=generator).log()
                drawn[row] = drawn[row] / temperature - noise
        drawn[:, self._forbidden] = float("-inf")
        self.log_probs.append(raw.gather(1, drawn.argmax(dim=-1, keepdim=True)).squeeze(1))
        return drawn


def _load_model(model: str, dtype: torch.dtype) -> Any:
    # A bar for reading a local file would stand in the middle of what others show; downloads keep theirs.
    transformers_logging.disable_progress_bar()
    try:
        loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).eval()
    except (ImportError, OSError, ValueError) as error:
        reason = one_line(error)
        raise UserError(f"model {model!r}: its weights cannot be loaded ({reason})") from None
    # Sampling is what the request says; transformers takes what a call leaves open from the model's own settings, a
    # repetition penalty for example.
    loaded.generation_config = GenerationConfig()
    return loaded
