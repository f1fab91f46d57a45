"""A small finished run, made in this process by the real parts: sampler, buffer, learner, evaluation; no Ray."""

import asyncio
import json
from pathlib import Path

from gflowvlm.actors.environments import LocalEnvironment
from gflowvlm.actors.episode import play_group
from gflowvlm.actors.groups import GroupRequest, PlaySettings
from gflowvlm.actors.replay_buffer import ReplayBuffer
from gflowvlm.actors.transformers_sampler import TransformersSampler
from gflowvlm.api.training import load_config
from gflowvlm.envs.registry import make_env
from gflowvlm.evaluation.metrics import EvaluationPlan, evaluate_trajectories
from gflowvlm.learner.learner import Learner
from gflowvlm.run.log import append_row
from gflowvlm.run.models import resolve_model
from gflowvlm.run.setup import new_run
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.files import write_whole
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import Trajectory, to_record_batch

STEPS = 2
SETTINGS = {
    "learner.steps": STEPS,
    "learner.groups_per_batch": 2,
    "rollout.group_size": 4,
    "evaluation.instances": 2,
    "evaluation.samples": 2,
    "sampler.engine": "transformers",
}


class _Player:
    def __init__(self, config: RunConfig, model: str) -> None:
        self._config, self._inputs = config, PolicyInputs.load(model)
        self.sampler = TransformersSampler(config, model)

    async def play(self, seeds: range, version: int, size: int, temperature: float, split: str) -> list[Trajectory]:
        settings = PlaySettings(
            group_size=size,
            temperature=temperature,
            max_tokens=self._config.policy.max_response_tokens,
            version=version,
            sampling_seed=1,
        )
        groups = [
            play_group(
                lambda: LocalEnvironment(make_env(self._config.task)),
                self.sampler,
                self._inputs,
                GroupRequest(index, seed, split),
                settings,
            )
            for index, seed in enumerate(seeds)
        ]
        return [t for group in await asyncio.gather(*groups) for t in group.trajectories]


async def _make(directory: Path) -> None:
    config = load_config("numberline-tiny", SETTINGS)
    folder = new_run(config, directory)
    model = resolve_model(config.policy.model)
    player, learner = _Player(config, model), Learner(config, model)
    buffer = ReplayBuffer(config.replay, config.seed, folder.trajectories)

    async def evaluate(kind: str, plan: EvaluationPlan, step: int, version: int) -> None:
        sampled = await player.play(plan.seeds, version, plan.samples, 1.0, plan.split)
        greedy = await player.play(plan.seeds, version, 1, 0.0, plan.split)
        figures = evaluate_trajectories(config, plan, version, sampled, greedy).as_dict()
        append_row(folder.metrics, kind, {"step": step, **figures})
        if kind == "evaluation":
            write_whole(folder.best, json.dumps({"step": step, **figures}))

    await evaluate("evaluation", EvaluationPlan.of(config), 0, 0)
    append_row(folder.metrics, "learner", {"step": 0, "version": 0})
    for step in range(STEPS):
        seeds = range(1 + 2 * step, 3 + 2 * step)
        batch = await player.play(seeds, step, config.rollout.group_size, 1.0, "id")
        renamed = [_renamed(t, step) for t in batch]
        buffer.append(to_record_batch(renamed))
        figures = learner.step(renamed)
        version = step + 1
        learner.save_adapter(folder.adapter(version))
        await player.sampler.load(version, folder.adapter(version))
        success = sum(t.success for t in batch) / len(batch)
        append_row(folder.metrics, "step", {"step": version, "version": version, "batch_success": success, **figures})
        append_row(folder.metrics, "rollout", {"step": version, "rollout_success": success})
    await evaluate("evaluation", EvaluationPlan.of(config), STEPS, STEPS)
    for split in ("id", "ood"):
        for version in (0, STEPS):
            await evaluate("report", EvaluationPlan(split, 2, 2, 30_000_000), STEPS, version)
    write_whole(folder.summary, json.dumps({"steps": STEPS, "version": STEPS}))
    player.sampler.shutdown()


def _renamed(trajectory: Trajectory, step: int) -> Trajectory:
    group = f"g{2 * step + int(trajectory.group_id[1:9]):08d}-0a"
    name = f"{group}/{trajectory.trajectory_id.rsplit('/')[-1]}"
    return Trajectory(**{**vars(trajectory), "group_id": group, "trajectory_id": name})


def make_run(directory: Path) -> None:
    """Makes the run in a folder that does not exist yet: two learner steps, two adapters, six evaluations."""
    asyncio.run(_make(directory))
