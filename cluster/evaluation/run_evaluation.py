"""Evaluating a run's policy in this process, without Ray."""

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from actors.environments import LocalEnvironment
from actors.episode import PlayedGroup, play_group
from actors.groups import GroupRequest, PlaySettings
from actors.samplers import make_sampler
from actors.sampling import BASE_VERSION, PolicySampler
from cluster.evaluation.exact import (
    LEFT_OUT,
    MAX_STATES,
    action_probabilities,
    exact_match,
    expand_tree,
    mean_match,
    tree_size,
)
from cluster.evaluation.figures import EvaluationPlan, evaluate_trajectories
from cluster.models import resolve_model
from cluster.playing import best_version
from cluster.run.run_setup import open_run
from envs.registry import make_env
from learner.model import default_device, load_adapted
from learner.scoring import Scorer
from shared.config import RunConfig
from shared.errors import UserError
from shared.policy_inputs import PolicyInputs
from shared.run_folder import RunFolder

GROUPS_AT_ONCE = 8


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
        UserError: There is no such run or version.
    """
    folder, config = open_run(directory)
    version = best_version(folder) if version is None else version
    _check_version(folder, version)
    model = resolve_model(config.policy.model)
    engine = config.sampler.engine if engine is None else engine

    async def play() -> tuple[list[PlayedGroup], list[PlayedGroup]]:
        sampler = make_sampler(config, model, engine)
        try:
            if version != BASE_VERSION:
                await sampler.load(version, folder.adapter(version))
            return await _play(config, model, sampler, plan, version, console)
        finally:
            sampler.shutdown()

    console.print(f"starting the {engine} sampler")
    sampled, greedy = asyncio.run(play())
    return evaluate_trajectories(
        config,
        plan,
        version,
        [t for group in sampled for t in group.trajectories],
        [t for group in greedy for t in group.trajectories],
    ).as_dict()


def exact_figures(
    directory: Path, *, split: str, seed: int, instances: int, versions: Sequence[int], console: Console
) -> dict[int, dict[str, float]] | None:
    """Returns the exact match of policy versions to the target, by version and figure.

    Args:
        directory: The run's folder.
        split: ``id`` or ``ood``.
        seed: Seed of the first instance.
        instances: Instances to expand; figures are means over them.
        versions: Adapter versions; 0 is the base model.
        console: Where progress is shown.

    Returns:
        The figures of `ExactMatch` by version; None where the tree of an instance is too large.

    Raises:
        UserError: There is no such run or version.
    """
    folder, config = open_run(directory)
    for version in versions:
        _check_version(folder, version)
    env = make_env(config.task)
    trees = []
    for instance in range(instances):
        env.reset(seed=seed + instance, options={"split": split})
        if tree_size(env) > MAX_STATES:
            return None
        trees.append(expand_tree(env))
    model = resolve_model(config.policy.model)
    inputs = PolicyInputs.load(model)
    result = {}
    with Progress(console=console, transient=True) as progress:
        for version in versions:
            adapter = folder.adapter(version) if version != BASE_VERSION else None
            policy = load_adapted(model, config.policy.dtype, adapter)
            scorer = Scorer(policy, inputs, default_device(), config.learner.token_budget)
            task = progress.add_task(f"following every action sequence, version {version}", total=float(instances))
            advance = partial(progress.advance, task)
            matches = [
                exact_match(
                    tree,
                    action_probabilities(tree, scorer, inputs, advance, LEFT_OUT),
                    config.target.reward_exponent,
                )
                for tree in trees
            ]
            result[version] = mean_match(matches).as_dict()
    return result


def _check_version(folder: RunFolder, version: int) -> None:
    if version != BASE_VERSION and not folder.adapter(version).is_dir():
        raise UserError(f"{folder.root}: there is no adapter version {version}; `ls {folder.adapters}` shows them")


async def _play(
    config: RunConfig, model: str, sampler: PolicySampler, plan: EvaluationPlan, version: int, console: Console
) -> tuple[list[PlayedGroup], list[PlayedGroup]]:
    inputs = PolicyInputs.load(model)
    free = asyncio.Semaphore(GROUPS_AT_ONCE)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("playing", total=2 * plan.instances)

        async def played(index: int, seed: int, settings: PlaySettings) -> PlayedGroup:
            async with free:
                request = GroupRequest(index, seed, plan.split)
                group = await play_group(
                    lambda: LocalEnvironment(make_env(config.task)), sampler, inputs, request, settings
                )
                progress.advance(task)
                return group

        settings = partial(PlaySettings, max_tokens=config.policy.max_response_tokens, version=version)
        sampled = settings(group_size=plan.samples, temperature=plan.temperature, sampling_seed=plan.seed)
        greedy = settings(group_size=1, temperature=0.0)
        return (
            await asyncio.gather(*(played(i, seed, sampled) for i, seed in enumerate(plan.seeds))),
            await asyncio.gather(*(played(i, seed, greedy) for i, seed in enumerate(plan.seeds))),
        )
