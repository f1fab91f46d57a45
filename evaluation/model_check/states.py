"""States of a task that a model is checked at: as its expert comes by them, and as someone does who never stops."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from gflowvlm.actors.environment_hosts import EnvironmentHosts
from gflowvlm.actors.environments import (
    EnvironmentFailedError,
    EnvironmentLostError,
    EpisodeEnvironment,
    View,
)
from gflowvlm.actors.event_loop import EventLoopEndedError, EventLoopThread
from gflowvlm.envs.base import SPLITS
from gflowvlm.shared.answer_formats import AnswerFormat, answer_format
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.response import DONE_TOKEN


@dataclass(frozen=True)
class ProbedState:
    """A state.

    Attributes:
        prompt: Text for the policy.
        image: The picture as PNG.
        demonstrations: By admissible action, an answer that gives it; all of them have the expert's thoughts.
    """

    prompt: str
    image: bytes
    demonstrations: dict[str, str]


def probed_states(config: RunConfig, instances: int, limit_s: float) -> list[ProbedState]:
    """Returns the states of some evaluation instances, those with the longest histories among them.

    Each instance is played by the expert, and once more by actions that do not stop, to the step limit.

    Args:
        config: The run's configuration.
        instances: How many instances of each split.
        limit_s: No instance is begun after so many seconds.

    Raises:
        UserError: The task cannot be played: its settings allow no environment, none of its instances starts, or one
            does not return in `rollout.environment_timeout_s`.
    """
    timeout_s, processes = config.rollout.environment_timeout_s, config.environment_processes
    hosts = EnvironmentHosts(config.task, min(processes, 1), timeout_s)
    loop = EventLoopThread("probed-states", blocked_s=timeout_s)

    async def play() -> tuple[list[ProbedState], str]:
        found: dict[tuple[str, bytes], ProbedState] = {}
        reason, until = "", time.monotonic() + limit_s
        for seed, split in ((s, p) for s in range(instances) for p in SPLITS):
            for lingers in (True, False):
                if found and time.monotonic() > until:
                    break
                try:
                    environment = hosts.open(0)
                    try:
                        view = await environment.start(config.evaluation.seed + seed, split, [seed])
                        states = await _walk(environment, view, answer_format(config.task.answer_format), lingers)
                    finally:
                        environment.close()
                except (EnvironmentFailedError, EnvironmentLostError) as error:
                    reason = str(error)
                    continue
                found.update({(state.prompt, state.image): state for state in states})
        return list(found.values()), reason

    try:
        states, reason = loop.run(play())
    except EventLoopEndedError:
        raise UserError(
            f"{config.task.name}: did not return in {timeout_s:g} s (rollout.environment_timeout_s); play it in a "
            "process of its own (rollout.environment_processes=1)"
        ) from None
    finally:
        hosts.close()
        loop.close()
    if not states:
        raise UserError(f"{config.task.name}: none of its evaluation instances can be played: {reason}")
    return states


async def _walk(environment: EpisodeEnvironment, view: View, answers: AnswerFormat, lingers: bool) -> list[ProbedState]:
    found = []
    while view.end is None:
        text = await environment.demonstration()
        parsed = answers.parse(text)
        actions = view.admissible_actions
        if parsed.action is None:
            raise UserError(f"{view.instance_id}: the task's demonstration cannot be read ({text[:80]!r})")
        written = {action: answers.with_action(text, parsed, action) for action in actions}
        found.append(ProbedState(view.prompt, view.image, written))
        view = await environment.act(_lingering(actions, len(found)) if lingers else parsed.action)
    return found


def _lingering(actions: Sequence[str], step: int) -> str:
    """Returns an action that goes on where there is one: another one at each step."""
    going_on = [action for action in actions if action != DONE_TOKEN] or list(actions)
    return going_on[step % len(going_on)]
