"""Trajectories played in a real environment by hand-made responses, and a whole run's folder around them."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gflowvlm.actors.replay_buffer import ReplayBuffer
from gflowvlm.envs.base import TaskEnv
from gflowvlm.envs.registry import make_env
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.log import append_row
from gflowvlm.run.setup import new_run
from gflowvlm.shared.config import BufferSettings, RunConfig
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.trajectory import Step, Trajectory, Validity, to_record_batch
from tests.shared.json_answers import format_response

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> "
    "<!--<script> ${7*7} $title &lt; \\u003c '\" ]]> --> \u202egnp.exe \u2028 \x1b[2J </pre></textarea></style>"
)
"""What a page must show as text and do nothing with."""


def play(
    env: TaskEnv,
    seed: int,
    actions: Sequence[str],
    number: int,
    *,
    group: int = 0,
    expert: bool = False,
    version: int = 3,
) -> Trajectory:
    """Plays actions; every action token has log-probability -0.5, the chain of thought -0.25 twice."""
    env.reset(seed=seed, options={"split": "id"})
    steps, images, log_rewards, rewards = [], [env.image_png()], [env.log_reward], []
    for action in actions:
        prompt = env.prompt()
        valid = action in env.admissible_actions
        rewards.append(env.advance(action))
        steps.append(
            Step(
                prompt=prompt,
                image=len(images) - 1,
                response_ids=[10, 11, 12, 13],
                response_text=format_response(action, "thinking of it"),
                cot_end=2,
                action_end=3,
                sampler_log_probs=[math.nan] * 4 if expert else [-0.25, -0.25, -0.5, 0.0],
                policy_version=-1 if expert else version,
                action=action,
                validity=Validity.VALID if valid else Validity.INADMISSIBLE,
            )
        )
        if action != DONE_TOKEN:
            log_rewards.append(env.log_reward)
            images.append(env.image_png())
    assert env.end is not None
    group_id = f"g{group:08d}-0a"
    return Trajectory(
        trajectory_id=f"{group_id}/{number}",
        group_id=group_id,
        instance_id=env.instance_id,
        instance_seed=seed,
        task=env.task,
        split="id",
        steps=steps,
        images=images,
        log_rewards=log_rewards,
        original_rewards=rewards,
        end=env.end,
        success=env.success,
        outcome=env.outcome,
        expert=expert,
    )


def numberline_group(group: int, seed: int, *, version: int = 3) -> list[Trajectory]:
    """One solved by stopping at once or not, one that walked, one inadmissible, and the expert's."""
    env = make_env(RunConfig().task)
    env.reset(seed=seed)
    expert = []
    while env.end is None:
        expert.append(env.expert_action())
        env.advance(expert[-1])
    plans = [[DONE_TOKEN], ["+", "-", DONE_TOKEN], ["+", "fly"], expert]
    played = [play(env, seed, plan, at, group=group, version=version) for at, plan in enumerate(plans)]
    return [*played, play(env, seed, expert, 4, group=group, expert=True)]


def hostile(trajectory: Trajectory) -> Trajectory:
    """Returns a trajectory with an attack in every text that a model or a run's files could bring in."""
    step = replace(
        trajectory.steps[0], prompt=HOSTILE, response_text=HOSTILE, action=HOSTILE, validity=Validity.INADMISSIBLE
    )
    steps = [*trajectory.steps[:-1], step]
    return replace(trajectory, steps=steps, outcome=HOSTILE, instance_id=HOSTILE)


def write_run(root: Path, groups: Sequence[Sequence[Trajectory]], config: RunConfig | None = None) -> RunFolder:
    """Writes a run's folder with a log, a final report and these trajectories."""
    folder = new_run(RunConfig() if config is None else config, root)
    buffer = ReplayBuffer(BufferSettings(), 0, folder.trajectories)
    for group in groups:
        buffer.append(to_record_batch(list(group)))
    append_row(folder.metrics, "learner", {"step": 0, "pid": 1})
    figures = {
        "version": 0, "split": "id", "instances": 20, "samples": 8, "success": 0.25, "success_greedy": 0.5,
        "success_bound": 0.99, "div_at_n": 2.0, "malformed_rate": 0.0, "inadmissible_rate": 0.125,
        "mean_response_tokens": 12.0, "total_variation": 0.6, "total_variation_low": 0.5,
        "total_variation_high": 0.7, "total_variation_floor": 0.01,
    }  # fmt: skip
    for step in range(1, 21):
        row = {"step": step, "version": step, "loss": 10.0 / step, "batch_success": step / 20, "grad_norm": 1.0}
        append_row(folder.metrics, "step", row)
        append_row(folder.metrics, "rollout", {"step": step, "env_steps": 50 * step, "rollout_success": step / 20})
    for step in (0, 10, 20):
        grown = {**figures, "step": step, "version": step, "success": 0.25 + step / 40}
        append_row(folder.metrics, "evaluation", grown)
    after = {**figures, "version": 20, "success": 0.875}
    summary = {"steps": 20, "version": 20, "wall_s": 90.0, "peak_memory_gib": 2.5, "report": [figures, after]}
    folder.summary.write_text(json.dumps(summary))
    return folder
