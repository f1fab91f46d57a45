"""What is asked of rollout workers and what they report: groups of rollouts of one instance."""

import re
import secrets
from dataclasses import dataclass, field
from enum import StrEnum

from gflowvlm.shared.trajectory import EndReason

_GROUP_ID = re.compile(r"g(\d+)-[0-9a-f]+")


@dataclass(frozen=True)
class GroupRequest:
    """One group to play.

    Attributes:
        group_index: Running number of the group in the run, or among those of its evaluations.
        instance_seed: Seed of the task instance.
        split: ``id`` or ``ood``.
    """

    group_index: int
    instance_seed: int
    split: str = "id"


@dataclass(frozen=True)
class PlaySettings:
    """How groups are played.

    Attributes:
        group_size: Rollouts of one instance (K).
        temperature: Sampling temperature; 0 is greedy.
        max_tokens: Longest response, tokens.
        epsilon: Probability that a step's action is replaced by a random admissible one.
        version: Policy version that must answer; None for the newest at every step.
        expert_on_failure: Add the expert's trajectory to a group in which all rollouts failed.
        seed: Seed of exploration and of the expert's wording.
        expert_plays: The expert makes every rollout; the policy is not asked.
        expert_noise: Probability that an expert's action is replaced by a random admissible one.
        sampling_seed: Makes every sampled response repeatable for the same engine; None draws freely.
    """

    group_size: int
    temperature: float
    max_tokens: int
    epsilon: float = 0.0
    version: int | None = None
    expert_on_failure: bool = False
    seed: int = 0
    expert_plays: bool = False
    expert_noise: float = 0.0
    sampling_seed: int | None = None


class FailureCause(StrEnum):
    """Why a group failed: what it says about the next try."""

    ENVIRONMENT = "environment"
    """Its own environment's code raised, exited, ended its process or did not return; or its first prompt is too
    long. The same instance is likely to fail again, others are not."""
    LOST = "lost"
    """A process that held a part of it is gone, for no reason of the group's own."""
    SAMPLER = "sampler"
    """No response came in time, or the version that was to answer is gone."""
    BUFFER = "buffer"
    """The replay buffer did not acknowledge it in time."""
    REFUSED = "refused"
    """A person must help before another try can do better: a full disk, settings that allow no environment."""


@dataclass(frozen=True)
class GroupSummary:
    """What became of one group, without its trajectories. Lists have one entry per trajectory.

    Attributes:
        request: What was asked.
        group_id: The group's id; empty when it failed.
        failure: Why there are no trajectories, one line, or None. A failed group has left nothing anywhere. Of an
            environment's failure it names the instance, and the file it is read from where there is one.
        cause: What kind of failure it was; None without one.
        accepted: Trajectories that the replay buffer had accepted in all when it acknowledged this group; 0 where it
            was not asked.
        trajectory_ids: Ids, the expert's last.
        expert: Whether the expert made it.
        success: Whether it solved the task.
        end: Why it ended.
        length: Number of non-stop transitions.
        response_tokens: Response tokens in all its steps.
        malformed: Number of its malformed responses.
        inadmissible: Number of its inadmissible actions.
        log_reward: Final log-reward, nats, before the exponent β.
        versions: Policy versions that answered, ascending.
        env_seconds: Time spent in the environments.
        wait_seconds: Time spent waiting for the policy, summed over the group's rollouts.
        unexplored: Responses whose action exploration could not replace.
    """

    request: GroupRequest
    group_id: str = ""
    failure: str | None = None
    cause: FailureCause | None = None
    accepted: int = 0
    trajectory_ids: list[str] = field(default_factory=list)
    expert: list[bool] = field(default_factory=list)
    success: list[bool] = field(default_factory=list)
    end: list[EndReason] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    response_tokens: list[int] = field(default_factory=list)
    malformed: list[int] = field(default_factory=list)
    inadmissible: list[int] = field(default_factory=list)
    log_reward: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    env_seconds: float = 0.0
    wait_seconds: float = 0.0
    unexplored: int = 0

    @property
    def permanent(self) -> bool:
        """Whether a person must help before another try can do better."""
        return self.cause is FailureCause.REFUSED


def new_group_id(group_index: int) -> str:
    """Returns a group id that no other attempt at the same group index has."""
    return f"g{group_index:08d}-{secrets.token_hex(4)}"


def index_of_group(group_id: str) -> int | None:
    """Returns the group index in an id of `new_group_id`, None for other ids."""
    match = _GROUP_ID.fullmatch(group_id)
    return None if match is None else int(match[1])
