"""The replay buffer: whole groups of trajectories, Arrow in memory, Parquet on disk."""

import heapq
import math
from collections import Counter, deque
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gflowvlm.actors.groups import index_of_group
from gflowvlm.actors.trajectory_files import TrajectoryFiles
from gflowvlm.shared.config import BufferSettings
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import SCHEMA_VERSION, TRAJECTORY_SCHEMA, concatenate, python_values

NEWEST_WINDOW = 128
"""Policy trajectories over which the newest success rate is taken."""

QUEUE_SLACK = 64
"""Entries of groups that are gone that a queue may hold, besides as many as there are groups."""


@dataclass
class _Group:
    """Trajectories of one instance in memory.

    Attributes:
        order: Running number in order of acceptance.
        batch: Their rows.
        bytes: Their size.
        policy: Number of trajectories that the policy made.
        priority: The largest final log-reward, nats.
        version: The oldest policy version in it; None when only the expert made it.
        newest: Whether it lies in the window of newest groups that eviction spares.
    """

    group_id: str
    order: int
    batch: pa.RecordBatch
    bytes: int
    policy: int
    priority: float
    version: int | None
    newest: bool = True

    @property
    def weight(self) -> int:
        """What it counts against the capacity: its policy trajectories (or all, when it has none)."""
        return self.policy if self.policy > 0 else self.batch.num_rows

    @property
    def eviction_key(self) -> tuple[float, int, str]:
        """Lowest priority goes first, the oldest of equals before the others."""
        return self.priority, self.order, self.group_id


class ReplayBuffer:
    """Holds the trajectories that the learner samples; the same after a crash as before it.

    An append is acknowledged once its file is on disk, and appending an acknowledged trajectory again
    changes nothing. Counts of *accepted* trajectories are of those the policy made, and of groups that the
    expert alone made; an expert's trajectory beside the policy's is extra and counts neither there nor against
    the capacity.

    Eviction takes whole groups out of memory; their files stay, as the run's record. Groups leave when they
    are staler than `replay_staleness` against the newest version in the buffer, and, beyond the capacity, by
    lowest priority (the group's largest final log-reward), oldest first. The newest groups, up to the share
    `newest_share` of the capacity, are spared, so that nothing is dropped before it could be learned from.

    Reading the files again in order makes the same decisions, so a restarted buffer has the same content.
    """

    def __init__(self, settings: BufferSettings, seed: int, directory: Path | None) -> None:
        """Opens a buffer, with what its folder already holds.

        Args:
            settings: Capacity, shares and staleness.
            seed: With the step, fixes which groups are sampled.
            directory: Folder of the Parquet files; None keeps everything in memory only.

        Raises:
            UserError: A file in the folder is damaged or in another schema.
        """
        self.settings = settings
        self.seed = seed
        self._groups: dict[str, _Group] = {}
        self._spared: deque[tuple[int, str]] = deque()
        self._spared_weight = 0
        self._by_priority: list[tuple[float, int, str]] = []
        self._by_version: list[tuple[int, int, str]] = []
        self._known: set[str] = set()
        self._weight = 0
        # Kept up to date, because the driver asks for them again and again, however many groups there are.
        self._size = self._experts = self._bytes = 0
        self._orders = 0
        self._newest_version = 0
        self._accepted_by_version: Counter[int] = Counter()
        self._accepted_experts = 0
        self._accepted_groups: set[str] = set()
        self._largest_group_index: int | None = None
        self._evicted = 0
        self._refused = 0
        self._last_refusal: str | None = None
        self._newest_success: deque[bool] = deque(maxlen=NEWEST_WINDOW)
        self._files: TrajectoryFiles | None = None
        if directory is not None:
            self._files = TrajectoryFiles(directory)
            for batch in self._files.read():
                self._remember(self._unknown_rows(batch))

    @property
    def accepted(self) -> int:
        """Trajectories ever acknowledged, those that an expert added to the policy's left out."""
        return self._accepted_by_version.total()

    def append(self, batch: pa.RecordBatch) -> list[str]:
        """Adds trajectories; all of one group should come in one append.

        Args:
            batch: Rows of `TRAJECTORY_SCHEMA`.

        Returns:
            The ids of all its trajectories: every one of them is now safe, the repeated ones included.

        Raises:
            UserError: They are in another schema, or could not be written; the buffer is as it was.
            ValueError: A log-reward is missing, NaN or infinite.
        """
        self.check(batch)
        self.append_checked([batch])
        return list(batch["trajectory_id"].to_pylist())

    def check(self, batch: pa.RecordBatch) -> None:
        """Raises what `append` raises for trajectories that can never be taken.

        Raises:
            UserError: They are in another schema.
            ValueError: A log-reward is missing, NaN or infinite.
        """
        if not batch.schema.equals(TRAJECTORY_SCHEMA):
            raise UserError(
                f"replay buffer: trajectories must be in schema version {SCHEMA_VERSION}; "
                "run the same release on every node"
            )
        for name, rewards in zip(batch["trajectory_id"].to_pylist(), python_values(batch["log_rewards"]), strict=True):
            if len(rewards) == 0 or not all(map(math.isfinite, rewards)):
                raise ValueError(f"trajectory {name}: its log-rewards must be finite, found {rewards}")

    def append_checked(self, batches: Sequence[pa.RecordBatch]) -> None:
        """Adds the trajectories of several appends, all of them or none, with one file; see `append`.

        Raises:
            UserError: They could not be written; the buffer is as it was.
        """
        new = self._unknown_rows(batches[0] if len(batches) == 1 else concatenate(batches))
        if new.num_rows > 0:
            if self._files is not None:
                try:
                    self._files.append(new)
                except UserError as refusal:
                    self._refused += new.num_rows
                    self._last_refusal = str(refusal)
                    raise
            self._remember(new)

    def available(self, version: int) -> int:
        """Returns how many groups are fresh enough to be sampled at a policy version."""
        return sum(self._is_fresh(group, version) for group in self._groups.values())

    def sample(self, step: int, groups: int, version: int) -> pa.RecordBatch:
        """Returns whole groups: the newest, then the rest drawn by priority.

        The share `newest_share` of the groups (rounded; at least one, unless it is 0) are the newest ones, newest
        first. The others are drawn without replacement with probabilities softmax(priority / priority_temperature).
        The draw is a function of the seed, the step and the groups in the buffer in order of acceptance.

        Args:
            step: The learner's step.
            groups: Number of groups.
            version: The learner's policy version; groups older than `replay_staleness` versions stay out.

        Raises:
            ValueError: Fewer groups than that are available.
        """
        fresh = [group for group in self._groups.values() if self._is_fresh(group, version)]
        if len(fresh) < groups:
            raise ValueError(f"{groups} groups asked for, {len(fresh)} are available at version {version}")
        split = len(fresh) - self.settings.newest_of(groups)
        chosen = fresh[split:][::-1]
        rest = fresh[:split]
        priorities = np.array([group.priority for group in rest]) / self.settings.priority_temperature
        # The largest of priority + Gumbel noise are a softmax draw without replacement.
        noisy = priorities + np.random.default_rng([self.seed, step]).gumbel(size=len(rest))
        drawn = np.argsort(-noisy, kind="stable")[: groups - len(chosen)]
        chosen += [rest[i] for i in drawn]
        return concatenate([group.batch for group in chosen])

    def find(self, trajectory_ids: Sequence[str]) -> pa.RecordBatch:
        """Returns trajectories that were acknowledged before the buffer was opened, or are in memory, in this order.

        Raises:
            UserError: One is in no file any more.
        """
        wanted = dict.fromkeys(trajectory_ids)
        found = [_rows_of(group.batch, wanted) for group in self._groups.values()]
        missing = set(wanted).difference(*(part["trajectory_id"].to_pylist() for part in found))
        if missing and self._files is not None:
            # They left memory since they were sampled.
            for batch in self._files.read():
                found.append(_rows_of(batch, missing))
                missing -= set(found[-1]["trajectory_id"].to_pylist())
        if missing:
            raise UserError(f"replay buffer: {len(missing)} trajectories that a learner was given are gone from disk")
        together = concatenate(found)
        row_of = {name: row for row, name in enumerate(together["trajectory_id"].to_pylist())}
        return together.take(pa.array([row_of[name] for name in trajectory_ids], pa.int64()))

    def content(self) -> pa.RecordBatch:
        """Returns every trajectory in memory, in order of acceptance."""
        return concatenate([group.batch for group in self._groups.values()])

    def stats(self) -> dict[str, Any]:
        """Returns the buffer's counts.

        ``accepted`` (trajectories ever acknowledged without the extra experts'), ``accepted_groups``,
        ``accepted_experts`` (all of the expert's), ``accepted_by_version`` (by a trajectory's oldest version, -1
        for the expert's), ``largest_group_index`` (None before the
        first group), ``size`` (trajectories in memory, experts
        included), ``groups``, ``expert`` (expert trajectories in memory), ``evicted`` (ever), ``bytes`` (in
        memory), ``newest_version``, ``newest_success`` (share among the newest `NEWEST_WINDOW` of the policy;
        None before the first), ``refused`` and ``last_refusal`` (trajectories that could not be written).
        """
        newest = self._newest_success
        return {
            "accepted": self.accepted,
            "accepted_groups": len(self._accepted_groups),
            "accepted_experts": self._accepted_experts,
            "accepted_by_version": dict(self._accepted_by_version),
            "largest_group_index": self._largest_group_index,
            "size": self._size,
            "groups": len(self._groups),
            "expert": self._experts,
            "evicted": self._evicted,
            "bytes": self._bytes,
            "newest_version": self._newest_version,
            "newest_success": sum(newest) / len(newest) if len(newest) > 0 else None,
            "refused": self._refused,
            "last_refusal": self._last_refusal,
        }

    def _is_fresh(self, group: _Group, version: int) -> bool:
        return group.version is None or version - group.version <= self.settings.replay_staleness

    def _unknown_rows(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Returns a copy of the rows that were not acknowledged yet, each id once."""
        first = {name: row for row, name in reversed(list(enumerate(batch["trajectory_id"].to_pylist())))}
        rows = sorted(row for name, row in first.items() if name not in self._known)
        # A copy on purpose: a batch that came through the object store pins its memory there.
        return batch.take(pa.array(rows, pa.int64()))

    def _remember(self, batch: pa.RecordBatch) -> None:
        """Takes new rows into memory, then makes room: the one way both appends and restarts go."""
        rows_of: dict[str, list[int]] = {}
        for row, group_id in enumerate(batch["group_id"].to_pylist()):
            rows_of.setdefault(group_id, []).append(row)
        versions = _oldest_versions(batch)
        self._count(batch, versions)
        for group_id, rows in rows_of.items():
            self._enter(group_id, batch if len(rows_of) == 1 else batch.take(pa.array(rows, pa.int64())))
        self._make_room()

    def _count(self, batch: pa.RecordBatch, versions: Sequence[int]) -> None:
        self._known.update(batch["trajectory_id"].to_pylist())
        for group_id in set(batch["group_id"].to_pylist()) - self._accepted_groups:
            self._accepted_groups.add(group_id)
            index = index_of_group(group_id)
            if index is not None:
                self._largest_group_index = max(index, self._largest_group_index or 0)
        names = ("expert", "success", "group_id")
        rows = list(zip(*(batch[name].to_pylist() for name in names), versions, strict=True))
        of_policy = {group_id for expert, _, group_id, _ in rows if not expert}
        for expert, success, group_id, version in rows:
            self._accepted_experts += expert
            if not (expert and group_id in of_policy):
                self._accepted_by_version[version] += 1
            if not expert:
                self._newest_success.append(success)
                self._newest_version = max(self._newest_version, version)

    def _enter(self, group_id: str, batch: pa.RecordBatch) -> None:
        if group_id in self._groups:
            # Late members join their group, which counts as new again.
            batch = concatenate([self._leave(group_id).batch, batch])
        experts = batch["expert"].to_pylist()
        policy_versions = [
            version
            for version, expert in zip(_oldest_versions(batch), experts, strict=True)
            if not expert and version >= 0
        ]
        group = _Group(
            group_id=group_id,
            order=self._orders,
            batch=batch,
            bytes=batch.nbytes,
            policy=len(experts) - sum(experts),
            priority=max(rewards[-1] for rewards in python_values(batch["log_rewards"])),
            version=min(policy_versions, default=None),
        )
        self._orders += 1
        self._groups[group_id] = group
        self._weigh(group, 1)
        self._spared.append((group.order, group_id))
        self._spared_weight += group.weight
        if group.version is not None:
            heapq.heappush(self._by_version, (group.version, group.order, group_id))

    def _leave(self, group_id: str) -> _Group:
        """Takes a group out; what the queues still say of it is skipped, since its order is gone."""
        group = self._groups.pop(group_id)
        self._weigh(group, -1)
        if group.newest:
            self._spared_weight -= group.weight
        return group

    def _weigh(self, group: _Group, sign: int) -> None:
        self._weight += sign * group.weight
        self._size += sign * group.batch.num_rows
        self._experts += sign * (group.batch.num_rows - group.policy)
        self._bytes += sign * group.bytes

    def _evict(self, group_id: str) -> None:
        self._evicted += self._leave(group_id).batch.num_rows

    def _is_alive(self, order: int, group_id: str) -> bool:
        return group_id in self._groups and self._groups[group_id].order == order

    def _make_room(self) -> None:
        oldest = self._newest_version - self.settings.replay_staleness
        while self._by_version and self._by_version[0][0] < oldest:
            _, order, group_id = heapq.heappop(self._by_version)
            if self._is_alive(order, group_id):
                self._evict(group_id)
        spared = int(self.settings.capacity * self.settings.newest_share)
        while self._spared_weight > spared and len(self._spared) > 1:
            self._make_oldest_evictable()
        while self._weight > self.settings.capacity and len(self._groups) > 1:
            while len(self._by_priority) == 0:
                self._make_oldest_evictable()
            _, order, group_id = heapq.heappop(self._by_priority)
            if self._is_alive(order, group_id):
                self._evict(group_id)
        self._shorten_queues()

    def _shorten_queues(self) -> None:
        """Drops what the queues say of groups that are gone, once that is most of a queue."""
        longest = 2 * len(self._groups) + QUEUE_SLACK
        if len(self._spared) > longest:
            self._spared = deque(entry for entry in self._spared if self._is_alive(*entry))
        if len(self._by_priority) > longest:
            self._by_priority = [entry for entry in self._by_priority if self._is_alive(*entry[1:])]
            heapq.heapify(self._by_priority)
        if len(self._by_version) > longest:
            self._by_version = [entry for entry in self._by_version if self._is_alive(*entry[1:])]
            heapq.heapify(self._by_version)

    def _make_oldest_evictable(self) -> None:
        order, group_id = self._spared.popleft()
        if self._is_alive(order, group_id):
            group = self._groups[group_id]
            group.newest = False
            self._spared_weight -= group.weight
            heapq.heappush(self._by_priority, group.eviction_key)


def _rows_of(batch: pa.RecordBatch, trajectory_ids: Container[str]) -> pa.RecordBatch:
    """Returns the rows of some trajectories."""
    rows = [row for row, name in enumerate(batch["trajectory_id"].to_pylist()) if name in trajectory_ids]
    return batch.take(pa.array(rows, pa.int64()))


def _oldest_versions(batch: pa.RecordBatch) -> list[int]:
    """Returns each trajectory's oldest policy version, -1 without steps."""
    steps = batch["steps"]
    versions = python_values(steps.flatten().field("policy_version"))
    offsets = steps.offsets.to_numpy()
    return [min(versions[start:end], default=-1) for start, end in pairwise((offsets - offsets[0]).tolist())]
