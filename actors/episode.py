"""Playing groups of rollouts: from a task instance to trajectories."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np

from gflowvlm.actors.environments import EpisodeEnvironment, View
from gflowvlm.actors.groups import GroupRequest, PlaySettings, new_group_id
from gflowvlm.actors.sampling import PromptTooLongError, SampleRequest, SampleResponse
from gflowvlm.envs.base import CUT_OUTCOME
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import EndReason, Step, Trajectory, Validity

_Result = TypeVar("_Result")

EXPERT_VERSION = -1
"""Policy version of the steps that the expert made."""


class ResponseSource(Protocol):
    """Whatever answers for the policy: a client of the policy server, or a sampler itself."""

    async def sample(self, request: SampleRequest) -> SampleResponse:
        """Samples one response."""


@dataclass
class PlayedGroup:
    """A finished group.

    Attributes:
        group_id: Its id, new with every attempt.
        trajectories: The rollouts in order, the expert's last where there is one.
        env_seconds: Time waiting for the environments, encoding their pictures included, summed over the rollouts.
        wait_seconds: Time waiting for responses, summed over the rollouts.
        unexplored: Responses whose action was to be replaced by another, for which the tokenizer has no tokens there.
    """

    group_id: str
    trajectories: list[Trajectory] = field(default_factory=list)
    env_seconds: float = 0.0
    wait_seconds: float = 0.0
    unexplored: int = 0


@dataclass(frozen=True)
class _Response:
    """A response as it is recorded: what was sampled, or what an expert or exploration put in its place."""

    token_ids: list[int]
    log_probs: list[float]
    version: int


async def play_group(
    open_environment: Callable[[], EpisodeEnvironment],
    source: ResponseSource,
    inputs: PolicyInputs,
    request: GroupRequest,
    settings: PlaySettings,
) -> PlayedGroup:
    """Plays `group_size` rollouts of one instance, all of them at once.

    Where the expert plays, its rollouts are demonstrations that differ in their wording.
    A malformed or inadmissible response ends its episode at the reward floor and is recorded as such. One that a
    limit of tokens cut off before its action, and a prompt that leaves no room for one, end their episode as an
    incomplete trajectory (`EndReason.by_token_limit`): neither is a behaviour of the policy. A response that could
    not be had at all fails the whole group, and so does a first prompt that leaves no room.

    Args:
        open_environment: Makes an environment; each rollout has its own.
        source: Who answers for the policy.
        inputs: The policy's tokenizer.
        request: Which instance.
        settings: How to play.

    Returns:
        The trajectories, and the expert's when asked for and every rollout failed.

    Raises:
        PromptTooLongError: The first prompt leaves no room for a response.
        Exception: What `source` or an environment raised; the group's other rollouts are cancelled.
    """
    group = PlayedGroup(new_group_id(request.group_index))

    async def roll_out(index: int, demonstrate: bool) -> Trajectory:
        environment = open_environment()
        try:
            rollout = _Rollout(environment, inputs, request, settings, group, index)
            return await (rollout.demonstrate() if demonstrate else rollout.play(source))
        finally:
            environment.close()

    try:
        async with asyncio.TaskGroup() as tasks:
            played = [tasks.create_task(roll_out(index, settings.expert_plays)) for index in range(settings.group_size)]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    group.trajectories = [task.result() for task in played]
    if settings.expert_on_failure and not any(trajectory.success for trajectory in group.trajectories):
        group.trajectories.append(await roll_out(settings.group_size, demonstrate=True))
    return group


async def play_demonstration(
    environment: EpisodeEnvironment, inputs: PolicyInputs, request: GroupRequest, group_id: str, seed: int, noise: float
) -> Trajectory:
    """Plays one episode by the expert, a group of its own. The same arguments give the same trajectory.

    Args:
        environment: Where it is played; it is closed afterwards.
        inputs: The tokenizer that writes the responses.
        request: Which instance.
        group_id: Id of the group, from which the trajectory's is made.
        seed: Seed of the wording and of the noise.
        noise: Probability that an action is replaced by a random admissible one.
    """
    settings = PlaySettings(
        group_size=1, temperature=0.0, max_tokens=0, seed=seed, expert_plays=True, expert_noise=noise
    )
    try:
        return await _Rollout(environment, inputs, request, settings, PlayedGroup(group_id), 0).demonstrate()
    finally:
        environment.close()


def as_member(demonstration: Trajectory, group_id: str, inputs: PolicyInputs) -> Trajectory:
    """Returns a demonstration as a member of a group, its responses in a policy's own tokens.

    Nobody sampled these tokens, so others may stand for the same text.

    Raises:
        UserError: The policy's tokenizer does not give the text back.
    """
    steps = [_in_tokens(step, inputs) for step in demonstration.steps]
    return replace(demonstration, trajectory_id=f"{group_id}-demonstration", group_id=group_id, steps=steps)


class _Rollout:
    """One episode in the making."""

    def __init__(
        self,
        environment: EpisodeEnvironment,
        inputs: PolicyInputs,
        request: GroupRequest,
        settings: PlaySettings,
        group: PlayedGroup,
        index: int,
    ) -> None:
        self._environment = environment
        self._inputs = inputs
        self._request = request
        self._settings = settings
        self._group = group
        self._index = index
        self._seed = [settings.seed, request.group_index, request.instance_seed, index]
        self._rng = np.random.default_rng(self._seed)
        self._steps: list[Step] = []
        self._images: dict[bytes, int] = {}
        self._log_rewards: list[float] = []
        self._original_rewards: list[float] = []

    async def play(self, source: ResponseSource) -> Trajectory:
        """Returns the trajectory of the policy that `source` answers for."""
        view = await self._start()
        while view.end is None:
            started = time.perf_counter()
            try:
                sampled = await source.sample(self._sample_request(view))
            except PromptTooLongError as error:
                if len(self._steps) == 0:
                    raise PromptTooLongError(f"{view.instance_id}: {error}") from None
                return self._recorded(view, EndReason.PROMPT_TOO_LONG, outcome=CUT_OUTCOME)
            self._group.wait_seconds += time.perf_counter() - started
            if sampled.cut and self._inputs.read(sampled.token_ids).parsed.malformed:
                return self._recorded(view, EndReason.RESPONSE_CUT, outcome=CUT_OUTCOME)
            response = _Response(sampled.token_ids, sampled.log_probs, sampled.version)
            if self._settings.epsilon > 0 and self._rng.random() < self._settings.epsilon:
                response = self._explored(response, view.admissible_actions)
            view = await self._step(response, view)
        return self._finished(view, expert=False)

    async def demonstrate(self) -> Trajectory:
        """Returns the expert's trajectory."""
        # Not the generator of exploration, whose seed is that of the wording too.
        rng = np.random.default_rng([*self._seed, 1])
        view = await self._start()
        while view.end is None:
            text = await self._timed(self._environment.demonstration())
            if self._settings.expert_noise > 0 and rng.random() < self._settings.expert_noise:
                action = view.admissible_actions[int(rng.integers(len(view.admissible_actions)))]
                written = self._inputs.answer_format
                # What comes before the action is the same.
                text = written.with_action(text, written.parse(text), action)
            token_ids = self._inputs.encode_response(text)
            view = await self._step(_Response(token_ids, [math.nan] * len(token_ids), EXPERT_VERSION), view)
        return self._finished(view, expert=True)

    async def _start(self) -> View:
        request = self._request
        view = await self._timed(self._environment.start(request.instance_seed, request.split, self._seed))
        self._log_rewards.append(view.log_reward)
        return view

    async def _timed(self, call: Awaitable[_Result]) -> _Result:
        started = time.perf_counter()
        result = await call
        self._group.env_seconds += time.perf_counter() - started
        return result

    def _sample_request(self, view: View) -> SampleRequest:
        settings = self._settings
        seed = None
        if settings.sampling_seed is not None:
            key = [settings.sampling_seed, self._request.instance_seed, self._index, len(self._steps)]
            seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        return SampleRequest(view.prompt, view.image, settings.max_tokens, settings.temperature, settings.version, seed)

    def _explored(self, response: _Response, actions: list[str]) -> _Response:
        """Returns the response with a random admissible action instead of its own.

        The chain of thought stays exactly as sampled. Where no action can be read, or the tokenizer has no tokens that
        write the new one behind it, the response stays as it is.
        """
        read = self._inputs.read(response.token_ids)
        if read.parsed.malformed:
            return response
        kept = read.layout.cot_end
        token_ids = self._inputs.with_action(response.token_ids, actions[int(self._rng.integers(len(actions)))])
        if token_ids is None:
            self._group.unexplored += 1
            return response
        forced = [math.nan] * (len(token_ids) - kept)
        return _Response(token_ids, response.log_probs[:kept] + forced, response.version)

    async def _step(self, response: _Response, before: View) -> View:
        """Steps the environment with a response, records both, and returns what comes after."""
        read = self._inputs.read(response.token_ids)
        parsed, layout = read.parsed, read.layout
        if parsed.action is None:
            validity = Validity.MALFORMED
        elif parsed.action in before.admissible_actions:
            validity = Validity.VALID
        else:
            validity = Validity.INADMISSIBLE
        view = await self._timed(self._environment.act(parsed.action if parsed.action is not None else ""))
        if view.end is not EndReason.DONE:
            self._log_rewards.append(view.log_reward)
        self._original_rewards.append(view.reward)
        self._steps.append(
            Step(
                prompt=before.prompt,
                image=self._images.setdefault(before.image, len(self._images)),
                response_ids=response.token_ids,
                response_text=read.text,
                cot_end=layout.cot_end,
                action_end=layout.action_end,
                stop_ids=layout.stop_ids,
                sampler_log_probs=response.log_probs,
                policy_version=response.version,
                action=parsed.action,
                validity=validity,
            )
        )
        return view

    def _finished(self, view: View, expert: bool) -> Trajectory:
        if view.end is None:
            raise RuntimeError(f"{view.instance_id}: the episode is not over")
        return self._recorded(view, view.end, outcome=view.outcome, success=view.success, expert=expert)

    def _recorded(
        self, view: View, end: EndReason, *, outcome: str, success: bool = False, expert: bool = False
    ) -> Trajectory:
        suffix = "-expert" if expert else ""
        return Trajectory(
            trajectory_id=f"{self._group.group_id}-{self._index:03d}{suffix}",
            group_id=self._group.group_id,
            instance_id=view.instance_id,
            instance_seed=self._request.instance_seed,
            task=view.task,
            split=self._request.split,
            steps=self._steps,
            images=list(self._images),
            log_rewards=self._log_rewards,
            original_rewards=self._original_rewards,
            end=end,
            success=success,
            outcome=outcome,
            expert=expert,
        )


def _in_tokens(step: Step, inputs: PolicyInputs) -> Step:
    token_ids = inputs.encode_response(step.response_text)
    layout = inputs.read(token_ids).layout
    return replace(
        step,
        response_ids=token_ids,
        cot_end=layout.cot_end,
        action_end=layout.action_end,
        stop_ids=layout.stop_ids,
        sampler_log_probs=[math.nan] * len(token_ids),
    )
