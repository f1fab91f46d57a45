"""Evaluating a run's policy in this process, without Ray."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from gflowvlm.actors.environments import EnvironmentFailedError, LocalEnvironment, make_environment
from gflowvlm.actors.episode import PlayedGroup, ResponseSource, play_group
from gflowvlm.actors.event_loop import run_to_end
from gflowvlm.actors.groups import GroupRequest, PlaySettings
from gflowvlm.actors.samplers import make_sampler
from gflowvlm.actors.sampling import (
    PolicySampler,
    PromptTooLongError,
    SampleRequest,
    SampleResponse,
    SamplerUnavailableError,
    UnknownVersionError,
)
from gflowvlm.evaluation.metrics import EvaluationPlan, evaluate_trajectories
from gflowvlm.evaluation.playing import best_version
from gflowvlm.run.adapters import published_adapter
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.models import resolve_model
from gflowvlm.run.paths import check_paths
from gflowvlm.run.setup import open_run
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.device import on_this_machine
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import BASE_VERSION

GROUPS_AT_ONCE = 8


class BoundedSource:
    """A sampler's responses, each within a time limit.

    Args:
        sampler: The sampler.
        limit_s: Longest one may take, seconds; the first waits for what an engine compiles.
    """

    def __init__(self, sampler: ResponseSource, limit_s: float) -> None:
        self._sampler = sampler
        self._limit_s = limit_s

    async def sample(self, request: SampleRequest) -> SampleResponse:
        """Samples one response.

        Raises:
            SamplerUnavailableError: It did not come in time.
        """
        try:
            async with asyncio.timeout(self._limit_s):
                return await self._sampler.sample(request)
        except TimeoutError:
            limits = "sampler.start_timeout_s and sampler.request_timeout_s"
            raise SamplerUnavailableError(f"no response within {self._limit_s:g} s ({limits})") from None


def evaluate_run(
    directory: Path, plan: EvaluationPlan, *, version: int | None, engine: str | None, console: Console
) -> dict[str, Any]:
    """Returns the figures of a run's policy (the keys of `Evaluation`).

    Args:
        directory: The run's folder.
        plan: What to play.
        version: Adapter version; None for the best.
        engine: ``vllm`` or ``transformers``; None for the run's.
        console: Where progress is shown.

    Raises:
        UserError: There is no such run or version, or the sampler fails.
    """
    folder, config = open_run(directory)
    check_paths(config)
    # Looked for before the engine starts: a version that is not there is said at once.
    _adapter_of(folder, version)
    model = resolve_model(config.policy.model)
    engine = config.sampler.engine if engine is None else engine

    async def play() -> tuple[int, list[list[PlayedGroup]]]:
        sampler = make_sampler(on_this_machine(config, torch.cuda.is_available()), model, engine)
        try:
            # And again: a run that goes on has removed and published others meanwhile.
            chosen, adapter = _adapter_of(folder, version)
            if adapter is not None:
                await sampler.load(chosen, adapter)
            return chosen, await _play(config, model, sampler, plan, chosen, console)
        finally:
            sampler.shutdown()

    console.print(f"starting the {engine} sampler")
    try:
        chosen, (sampled, greedy) = run_to_end(play())
    except UnknownVersionError as error:
        raise UserError(f"{error}; evaluate again, or name an evaluated version, which stays") from None
    except SamplerUnavailableError as error:
        raise UserError(f"{directory}: {error}; what it said stands above. Evaluate again") from None
    if not (sampled and greedy):
        raise UserError(f"{directory}: none of the {plan.instances} instances could be played; the reasons stand above")
    return evaluate_trajectories(
        config,
        plan,
        chosen,
        [t for group in sampled for t in group.trajectories],
        [t for group in greedy for t in group.trajectories],
    ).as_dict()


def _adapter_of(folder: RunFolder, version: int | None) -> tuple[int, Path | None]:
    """Returns the version that is evaluated, the best where none is named, and its adapter's folder."""
    chosen = best_version(folder) if version is None else version
    return chosen, None if chosen == BASE_VERSION else published_adapter(folder, chosen)


async def _play(
    config: RunConfig, model: str, sampler: PolicySampler, plan: EvaluationPlan, version: int, console: Console
) -> list[list[PlayedGroup]]:
    """Returns the sampled and the greedy groups; instances whose environment fails are named and left out."""
    inputs = PolicyInputs.load(model, config.task.answer_format, config.policy)
    source = BoundedSource(sampler, config.sampler.start_timeout_s + config.sampler.request_timeout_s)
    free = asyncio.Semaphore(GROUPS_AT_ONCE)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("playing", total=2 * plan.instances)

        async def played(index: int, seed: int, settings: PlaySettings) -> PlayedGroup | None:
            async with free:
                request = GroupRequest(index, seed, plan.split)
                try:
                    return await play_group(
                        lambda: LocalEnvironment(make_environment(config.task)), source, inputs, request, settings
                    )
                except (EnvironmentFailedError, PromptTooLongError) as failure:
                    console.print(f"left out: {failure}", highlight=False, markup=False, soft_wrap=True)
                    return None
                finally:
                    progress.advance(task)

        settings = partial(PlaySettings, max_tokens=config.policy.max_response_tokens, version=version)
        sampled = settings(group_size=plan.samples, temperature=plan.temperature, sampling_seed=plan.seed)
        greedy = settings(group_size=1, temperature=0.0)
        return [
            [group for group in groups if group is not None]
            for groups in (
                await asyncio.gather(*(played(i, seed, sampled) for i, seed in enumerate(plan.seeds))),
                await asyncio.gather(*(played(i, seed, greedy) for i, seed in enumerate(plan.seeds))),
            )
        ]
