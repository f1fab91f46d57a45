"""Trajectories made by hand."""

import math
from pathlib import Path

from gflowvlm.actors.replay_buffer import ReplayBuffer
from gflowvlm.shared.config import BufferSettings
from gflowvlm.shared.trajectory import EndReason, Step, Trajectory, Validity, to_record_batch


def make_trajectory(
    trajectory_id: str,
    group_id: str = "g00000000-00",
    *,
    log_reward: float = 0.0,
    version: int = 0,
    expert: bool = False,
    success: bool = False,
    steps: int = 2,
    task: str = "numberline",
    split: str = "id",
    image: bytes = b"picture",
) -> Trajectory:
    """Returns a trajectory of `steps` moves that was cut off."""
    return Trajectory(
        trajectory_id=trajectory_id,
        group_id=group_id,
        instance_id=f"{task}/{split}/7",
        instance_seed=7,
        task=task,
        split=split,
        steps=[
            Step(
                prompt=f"prompt {t}",
                image=0,
                response_ids=[1, 2, 3],
                response_text='{"thoughts": "t", "action": "+"}',
                cot_end=1,
                action_end=2,
                sampler_log_probs=[math.nan if expert else -0.5] * 3,
                policy_version=-1 if expert else version,
                action="+",
                validity=Validity.VALID,
            )
            for t in range(steps)
        ],
        images=[image],
        log_rewards=[0.0] * steps + [log_reward],
        original_rewards=[-1.0] * steps,
        end=EndReason.STEP_LIMIT,
        success=success,
        outcome="3",
        expert=expert,
    )


def make_group(index: int, size: int = 2, *, expert: bool = False, **settings: object) -> list[Trajectory]:
    """Returns one group of `size` policy trajectories, and the expert's when asked for."""
    group_id = f"g{index:08d}-0a"
    members = [make_trajectory(f"{group_id}/{k}", group_id, **settings) for k in range(size)]  # type: ignore[arg-type]
    if expert:
        members.append(make_trajectory(f"{group_id}/expert", group_id, expert=True, log_reward=4.0, success=True))
    return members


def write_groups(run: Path) -> Path:
    """Writes groups 0..4, made by version 0..4, of two; solved from 3 on; an expert in 2; out of distribution in 4."""
    buffer = ReplayBuffer(BufferSettings(), 0, run / "trajectories")
    for index in range(5):
        made = make_group(
            index, expert=index == 2, version=index, success=index > 2, split="ood" if index == 4 else "id"
        )
        buffer.append(to_record_batch(made))
    return run
