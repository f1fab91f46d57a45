"""Rollout workers: RLlib environment runners that play groups of rollouts of a vision-language policy."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import gymnasium
import pyarrow as pa
from ray.exceptions import RayActorError, RayTaskError
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.env.env_runner import EnvRunner

from gflowvlm.actors.buffer_actor import Acknowledgement, get_buffer
from gflowvlm.actors.demonstration_set import DemonstrationSet
from gflowvlm.actors.environment_hosts import EnvironmentHosts
from gflowvlm.actors.environments import (
    EnvironmentFailedError,
    EnvironmentLostError,
    EpisodeEnvironment,
    LocalCalls,
    instance_name,
)
from gflowvlm.actors.episode import PlayedGroup, ResponseSource, as_member, play_group
from gflowvlm.actors.event_loop import EventLoopEndedError, EventLoopThread
from gflowvlm.actors.groups import FailureCause, GroupRequest, GroupSummary, PlaySettings
from gflowvlm.actors.policy_client import PolicyServerError
from gflowvlm.actors.sampling import PromptTooLongError, SamplerUnavailableError, UnknownVersionError
from gflowvlm.envs.base import TaskEnv
from gflowvlm.envs.registry import make_env
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import Trajectory, Validity, to_record_batch

APPEND_TRY_S = 60.0
"""Longest one append may take before it is sent again."""

APPEND_DEADLINE_S = 300.0
"""Longest all tries of an append may take: covers a restart of the replay buffer with a long history."""

APPEND_PAUSE_S = 0.5

STOP_TIMEOUT_S = 10.0
"""How long the calls of environments whose processes were ended may take to notice."""

_PlayedGroups = list[tuple[GroupSummary, list[Trajectory]]]


class ReplayBufferError(RuntimeError):
    """The replay buffer did not acknowledge a group in time."""


def _worker_config(config: RunConfig) -> AlgorithmConfig:
    """Returns the RLlib configuration that an `EnvRunner` needs of a run.

    It only says what happens on failure: environments, policy and sampling are this project's.
    """
    return (
        AlgorithmConfig()
        .env_runners(num_env_runners=config.rollout.workers)
        .fault_tolerance(restart_failed_env_runners=True, delay_between_env_runner_restarts_s=0.5)
    )


class RolloutWorker(EnvRunner):
    """Plays groups, all requests in flight at once, and appends each finished group to the replay buffer.

    Every method that plays takes keywords only and never raises for a failed group (`FaultAwareApply.apply`
    would end the process): failures are in the summaries. A defect does raise, and ends the process.
    One thread runs an event loop for all calls, so several calls play at the same time: give the actor a
    `max_concurrency` of the calls wanted and one more, for `ping`. No method may be a coroutine function: Ray would
    run all calls of such an actor on one event loop, where each of these blocks the others.
    """

    def __init__(
        self,
        *,
        run_config: RunConfig,
        model_path: str,
        source: ResponseSource,
        buffer: Any = None,
        worker_index: int = 0,
    ) -> None:
        """Makes a worker.

        Args:
            run_config: The run's configuration.
            model_path: The policy's directory or hub name, for its tokenizer.
            source: Who answers for the policy, for example a `PolicyClient`.
            buffer: Name or handle of the replay buffer's actor; `rollout` does without. Give remote workers
                the name: of a handle among an actor's arguments, Ray warns that it may not survive a restart.
            worker_index: Number of the worker.
        """
        super().__init__(config=_worker_config(run_config), worker_index=worker_index)
        self._run = run_config
        self._inputs = PolicyInputs.load(model_path, run_config.task.answer_format)
        self._source = source
        self._buffer = get_buffer(buffer) if isinstance(buffer, str) else buffer
        timeout_s = run_config.rollout.environment_timeout_s
        self._loop = EventLoopThread("rollouts", blocked_s=timeout_s)
        self._demonstrations: DemonstrationSet | None = None
        self._opening = threading.Lock()
        self._local_calls = LocalCalls()
        processes = run_config.environment_processes
        self._hosts = EnvironmentHosts(run_config.task, processes, timeout_s, self._local_calls)

    def __repr__(self) -> str:
        """Returns what Ray's dashboard and log lines call this actor."""
        return f"rollout worker {self.worker_index}"

    def make_env(self) -> TaskEnv:
        """Returns a new environment of the run's task."""
        return make_env(self._run.task)

    def assert_healthy(self) -> None:
        """Raises AssertionError when the worker cannot play."""
        assert self._loop.is_running, "the rollout worker's event loop has ended"

    def get_spaces(self) -> dict[str, tuple[gymnasium.Space, gymnasium.Space]]:
        """Returns the observation and action space of the task."""
        env = self.make_env()
        return {"__env__": (env.observation_space, env.action_space)}

    def sample(
        self, *, requests: Sequence[GroupRequest], version: int | None = None, **kwargs: Any
    ) -> list[GroupSummary]:
        """Plays groups with the run's rollout settings and appends each to the replay buffer.

        Args:
            requests: The groups, all played at the same time.
            version: Policy version that must answer; None for the newest at every step.
            **kwargs: Ignored, for RLlib.

        Returns:
            One summary per request, in order; without `failure`, the group was acknowledged.
        """
        if self._buffer is None:
            raise ValueError("this rollout worker was made without a replay buffer")
        rollout, only_recorded = self._run.rollout, self._run.only_recorded
        settings = PlaySettings(
            group_size=0 if only_recorded else rollout.group_size,
            temperature=self._run.sampler.temperature,
            max_tokens=self._run.policy.max_response_tokens,
            epsilon=rollout.epsilon,
            version=version,
            expert_on_failure=rollout.expert_on_failure and not only_recorded,
            seed=self._run.seed,
            expert_plays=self._run.expert_plays,
        )

        async def record(request: GroupRequest, group: PlayedGroup) -> int:
            members = list(group.trajectories)
            if rollout.demonstrations is not None:
                # Nobody played it, so it is in the buffer and not in the summary.
                recorded = await asyncio.to_thread(self._recorded, request.instance_seed)
                members.append(as_member(recorded, group.group_id, self._inputs))
            return await append_group(self._buffer, to_record_batch(members))

        return [summary for summary, _ in self._play(requests, settings, record)]

    def rollout(
        self,
        *,
        requests: Sequence[GroupRequest],
        group_size: int,
        temperature: float,
        version: int | None = None,
        sampling_seed: int | None = None,
        **kwargs: Any,
    ) -> tuple[pa.RecordBatch, list[GroupSummary]]:
        """Plays groups without exploration or experts and returns them instead of recording them.

        Args:
            requests: The groups, all played at the same time.
            group_size: Rollouts of each instance.
            temperature: Sampling temperature; 0 is greedy.
            version: Policy version that must answer; None for the newest.
            sampling_seed: Makes the responses repeatable for the same engine.
            **kwargs: Ignored, for RLlib.

        Returns:
            The trajectories of the groups that did not fail, and one summary per request, both in order.
        """
        settings = PlaySettings(
            group_size=group_size,
            temperature=temperature,
            max_tokens=self._run.policy.max_response_tokens,
            version=version,
            sampling_seed=sampling_seed,
        )

        async def keep(_: GroupRequest, __: PlayedGroup) -> int:
            return 0

        played = self._play(requests, settings, keep)
        trajectories = [trajectory for _, members in played for trajectory in members]
        return to_record_batch(trajectories), [summary for summary, _ in played]

    def stop(self) -> None:
        """Ends the worker's event loop and its environments' processes."""
        if self._run.environment_processes > 0 and self._loop.is_running:
            # There, where calls of the environments may be finding their process gone just now.
            self._loop.run(self._hosts.close_and_settle(), STOP_TIMEOUT_S)
        else:
            self._hosts.close()
        self._loop.close()

    def _play(
        self,
        requests: Sequence[GroupRequest],
        settings: PlaySettings,
        finish: Callable[[GroupRequest, PlayedGroup], Coroutine[Any, Any, int]],
    ) -> _PlayedGroups:
        async def play_one(request: GroupRequest) -> tuple[GroupSummary, list[Trajectory]]:
            open_environment = partial(self._open_environment, request)
            try:
                group = await play_group(open_environment, self._source, self._inputs, request, settings)
                accepted = await finish(request, group)
            except _GROUP_FAILURES as error:
                return GroupSummary(request, failure=str(error), cause=_cause_of(error)), []
            return summarise(request, group, accepted), group.trajectories

        async def play_all() -> _PlayedGroups:
            async with asyncio.TaskGroup() as tasks:
                groups = [tasks.create_task(play_one(request)) for request in requests]
            return [group.result() for group in groups]

        playing = self._loop.is_running
        try:
            # No time limit of its own: every wait inside (for a response, for the buffer) has one.
            played = self._loop.run(play_all())
        except EventLoopEndedError:
            running = self._local_calls.running
            if not playing or running is None:
                raise
            return [(self._blocked(request, *running), []) for request in requests]
        steps = sum(len(trajectory.steps) for _, members in played for trajectory in members)
        if steps > 0:
            self.num_env_steps_sampled_lifetime += steps
            self._log_env_steps(self._metrics_num_env_steps_sampled, steps)
        return played

    def _recorded(self, instance_seed: int) -> Trajectory:
        """Returns the demonstration of an instance in the run's set, which is opened at the first call."""
        with self._opening:
            if self._demonstrations is None:
                self._demonstrations = DemonstrationSet.of_run(self._run)
        if self._demonstrations is None:
            raise ValueError("this run has no demonstrations")
        return self._demonstrations.find(instance_seed)

    def _open_environment(self, request: GroupRequest) -> EpisodeEnvironment:
        try:
            return self._hosts.open(request.group_index)
        except EnvironmentFailedError as error:
            raise EnvironmentFailedError(f"{self._name_of(request)}: {error}") from None

    def _blocked(self, request: GroupRequest, split: str, seed: int, name: str) -> GroupSummary:
        """Returns what becomes of a group when an environment in this process does not return.

        The worker plays nothing any more: its next call raises, which ends its process, and Ray starts it again.
        """
        if (request.split, request.instance_seed) == (split, seed):
            limit = f"{self._run.rollout.environment_timeout_s:g} s (rollout.environment_timeout_s)"
            failure = f"{name}: did not return in {limit}; its worker is started again"
            return GroupSummary(request, failure=failure, cause=FailureCause.ENVIRONMENT)
        failure = f"{self._name_of(request)}: lost with its worker, because {name} does not return"
        return GroupSummary(request, failure=failure, cause=FailureCause.LOST)

    def _name_of(self, request: GroupRequest) -> str:
        return instance_name(self._run.task.name, request.split, request.instance_seed)


_GROUP_FAILURES = (
    EnvironmentLostError,
    PolicyServerError,
    SamplerUnavailableError,
    ReplayBufferError,
    UnknownVersionError,
    # `EnvironmentFailedError` included.
    UserError,
)
"""What fails one group; anything else is a defect."""


def _cause_of(error: Exception) -> FailureCause:
    match error:
        case EnvironmentFailedError() | PromptTooLongError():
            return FailureCause.ENVIRONMENT
        case EnvironmentLostError():
            return FailureCause.LOST
        # A training group whose version is gone is played again by the newest.
        case PolicyServerError() | SamplerUnavailableError() | UnknownVersionError():
            return FailureCause.SAMPLER
        case ReplayBufferError():
            return FailureCause.BUFFER
        case _:
            return FailureCause.REFUSED


async def append_group(buffer: Any, batch: pa.RecordBatch, deadline_s: float = APPEND_DEADLINE_S) -> int:
    """Appends a group to the replay buffer, again and again while the buffer is away.

    Trajectory ids make repeated appends harmless.

    Returns:
        How many trajectories the buffer has accepted in all.

    Raises:
        UserError: The buffer refused it.
        ReplayBufferError: It was not acknowledged before the deadline (seconds).
    """
    started = time.monotonic()
    while True:
        try:
            acknowledgement: Acknowledgement = await asyncio.wait_for(
                buffer.append.remote(batch), min(APPEND_TRY_S, deadline_s)
            )
        except (RayActorError, TimeoutError) as error:
            waited = time.monotonic() - started
            if waited + APPEND_PAUSE_S > deadline_s:
                raise ReplayBufferError(
                    f"waited {waited:.0f} s for the replay buffer to take a group ({type(error).__name__})"
                ) from None
            await asyncio.sleep(APPEND_PAUSE_S)
        except RayTaskError as error:
            raise error.cause from None
        else:
            return acknowledgement.accepted


def summarise(request: GroupRequest, group: PlayedGroup, accepted: int) -> GroupSummary:
    """Returns the summary of a group that was played, and of which the replay buffer said what it has accepted."""

    def count(trajectory: Trajectory, validity: Validity) -> int:
        return sum(step.validity is validity for step in trajectory.steps)

    members = group.trajectories
    answered = {step.policy_version for t in members if not t.expert for step in t.steps}
    return GroupSummary(
        request=request,
        group_id=group.group_id,
        accepted=accepted,
        trajectory_ids=[t.trajectory_id for t in members],
        expert=[t.expert for t in members],
        success=[t.success for t in members],
        end=[t.end for t in members],
        length=[t.length for t in members],
        response_tokens=[t.response_tokens for t in members],
        malformed=[count(t, Validity.MALFORMED) for t in members],
        inadmissible=[count(t, Validity.INADMISSIBLE) for t in members],
        log_reward=[t.log_rewards[-1] for t in members],
        versions=sorted(answered),
        env_seconds=group.env_seconds,
        wait_seconds=group.wait_seconds,
        unexplored=group.unexplored,
    )
