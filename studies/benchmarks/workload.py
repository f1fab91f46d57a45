"""What the benchmarks feed in: episodes as a run would see them, played without a policy."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gflowvlm.actors.groups import new_group_id
from gflowvlm.actors.sampling import SampleRequest
from gflowvlm.envs.base import TaskEnv
from gflowvlm.envs.registry import make_env
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.trajectory import EndReason, Step, Trajectory, Validity

EXPERT_SHARE = 0.7
"""Share of actions that are the expert's; the others are random, so that lengths and ends vary."""


def made_groups(
    config: RunConfig, inputs: PolicyInputs, count: int, first: int = 0, stops: bool = True
) -> list[list[Trajectory]]:
    """Returns groups of demonstrated trajectories.

    Args:
        config: Fixes task and group size.
        inputs: Makes the response tokens.
        count: Number of groups.
        first: Number of the first group; every group has an instance of its own.
        stops: Whether `[DONE]` is among the actions; without it only the environment ends an episode.
    """
    return [_made_group(config, inputs, index, stops) for index in range(first, first + count)]


def copied_groups(groups: Sequence[list[Trajectory]], count: int) -> list[list[Trajectory]]:
    """Returns `count` groups with ids of their own and the given groups' content, in turn."""
    copies = []
    for index in range(count):
        group_id = new_group_id(index)
        members = enumerate(groups[index % len(groups)])
        copies.append([replace(t, group_id=group_id, trajectory_id=f"{group_id}-{i:03d}") for i, t in members])
    return copies


def made_requests(config: RunConfig, inputs: PolicyInputs, count: int, first: int = 0) -> list[SampleRequest]:
    """Returns requests as rollout workers make them: the states of whole groups, in order."""
    requests: list[SampleRequest] = []
    while len(requests) < count:
        for trajectory in _made_group(config, inputs, first):
            for step in trajectory.steps:
                image = trajectory.images[step.image]
                requests.append(
                    SampleRequest(step.prompt, image, config.policy.max_response_tokens, config.sampler.temperature)
                )
        first += 1
    return requests[:count]


def _made_group(config: RunConfig, inputs: PolicyInputs, index: int, stops: bool = True) -> list[Trajectory]:
    group_id = new_group_id(index)
    return [
        _made_trajectory(make_env(config.task), inputs, group_id, index, member, stops)
        for member in range(config.rollout.group_size)
    ]


def _made_trajectory(
    env: TaskEnv, inputs: PolicyInputs, group_id: str, instance_seed: int, member: int, stops: bool
) -> Trajectory:
    rng = np.random.default_rng([instance_seed, member])
    env.reset(seed=instance_seed, options={"split": "id"})
    steps: list[Step] = []
    images: dict[bytes, int] = {}
    log_rewards, original_rewards = [env.log_reward], []
    while env.end is None:
        actions = [action for action in env.admissible_actions if stops or action != DONE_TOKEN]
        action = env.expert_action() if rng.random() < EXPERT_SHARE else actions[int(rng.integers(len(actions)))]
        if action not in actions:
            action = actions[0]
        image = images.setdefault(env.shown(), len(images))
        steps.append(_made_step(inputs, env.prompt(), image, env.demonstration(action, rng)))
        original_rewards.append(float(env.step(action)[1]))
        if env.end is not EndReason.DONE:
            log_rewards.append(env.log_reward)
    return Trajectory(
        trajectory_id=f"{group_id}-{member:03d}",
        group_id=group_id,
        instance_id=env.instance_id,
        instance_seed=instance_seed,
        task=env.task,
        split=env.split,
        steps=steps,
        images=list(images),
        log_rewards=log_rewards,
        original_rewards=original_rewards,
        end=env.end,
        success=env.success,
        outcome=env.outcome,
        expert=False,
    )


def _made_step(inputs: PolicyInputs, prompt: str, image: int, response: str) -> Step:
    token_ids = inputs.encode_response(response)
    read = inputs.read(token_ids)
    return Step(
        prompt=prompt,
        image=image,
        response_ids=token_ids,
        response_text=read.text,
        cot_end=read.layout.cot_end,
        action_end=read.layout.action_end,
        sampler_log_probs=[math.nan] * len(token_ids),
        policy_version=0,
        action=read.parsed.action,
        validity=Validity.VALID,
        stop_ids=read.layout.stop_ids,
    )
