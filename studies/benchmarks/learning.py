"""How fast the learner is, alone in this process."""

import statistics
import time

import torch

from gflowvlm.learner.learner import Learner
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.studies.benchmarks.measurement import Measurement, Say, Scale
from gflowvlm.studies.benchmarks.output_head import bench_output_head
from gflowvlm.studies.benchmarks.workload import made_groups

PART = "learner"

LONG_EPISODES = 64
"""Trajectories, of the task's full length, of the batch on which the loss's share is measured."""

LOSS_SHARE_BAR = 0.02


def bench_learner(config: RunConfig, model_path: str, scale: Scale, say: Say) -> list[Measurement]:
    """Times optimisation steps on batches of the run's size, each of trajectories not seen before.

    Runs with as many threads as Ray gives the learner of a run.
    """
    threads = max(1, int(config.learner.cpus_per_worker))
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _timed(config, model_path, scale, say, threads)
    finally:
        torch.set_num_threads(usual)


def _timed(config: RunConfig, model_path: str, scale: Scale, say: Say, threads: int) -> list[Measurement]:
    say(f"loading {config.policy.model}")
    inputs = PolicyInputs.load(model_path, config.task.answer_format, config.policy)
    learner = Learner(config, model_path)
    groups = config.groups_per_batch
    seconds, trajectories, tokens = [], 0, 0
    # The first step warms up and is not counted.
    for number in range(scale.learner_steps + 1):
        batch = [t for group in made_groups(config, inputs, groups, first=number * groups) for t in group]
        started = time.perf_counter()
        learner.step(batch)
        elapsed = time.perf_counter() - started
        say(f"step {number} of {scale.learner_steps}: {len(batch)} trajectories in {elapsed:.2f} s")
        if number > 0:
            seconds.append(elapsed)
            trajectories += len(batch)
            tokens += sum(t.response_tokens for t in batch)
    how = f"{config.objective.loss}, batches of {groups} groups, {learner.device.type}, {threads} thread(s)"
    return [
        Measurement(PART, "learner_trajectories_per_s", trajectories / sum(seconds), "trajectories/s", how),
        Measurement(PART, "learner_tokens_per_s", tokens / sum(seconds), "tokens/s", f"response tokens; {how}"),
        Measurement(PART, "learner_step_s", statistics.median(seconds), "s", f"median; {how}"),
        _loss_share(config, learner, inputs, say),
        *bench_output_head(learner.device, scale, say),
    ]


def _loss_share(config: RunConfig, learner: Learner, inputs: PolicyInputs, say: Say) -> Measurement:
    """Measures how much of a step the loss function and its gradient in the scores take."""
    groups = -(-LONG_EPISODES // config.rollout.group_size)
    batch = [t for group in made_groups(config, inputs, groups, first=10**6, stops=False) for t in group]
    batch = batch[:LONG_EPISODES]
    say(f"one step on {len(batch)} long trajectories, {sum(len(t.steps) for t in batch)} responses")
    started = time.perf_counter()
    metrics = learner.step(batch)
    share = metrics["seconds_loss"] / (time.perf_counter() - started)
    what = (
        f"of a step's time in {config.objective.loss} and its gradient in the scores; {len(batch)} trajectories of "
        f"up to {max(len(t.steps) for t in batch)} steps"
    )
    return Measurement(PART, "learner_loss_share", share, "share", what, at_most=LOSS_SHARE_BAR)
