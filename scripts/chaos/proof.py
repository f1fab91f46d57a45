"""Whether a run's records hold what they must, whatever was killed. Each check is a function of the records alone."""

import math
from dataclasses import dataclass, field
from itertools import pairwise

from chaos.records import Records
from gflowvlm.run.log import Row

NOISE_DEVIATIONS = 2.0
"""How many standard deviations two final success rates may be apart."""

_SHOWN = 5


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: What must hold.
        seen: What was looked at.
        problems: What does not hold; empty when all does.
    """

    name: str
    seen: str
    problems: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def prove(records: Records, kills: int, status: int) -> list[Check]:
    """Returns all checks of a run by itself.

    Args:
        records: What the run has written.
        kills: How many kills were asked for.
        status: The exit status of its driver.
    """
    return [
        all_kills(records, kills),
        ended(records, status),
        nothing_lost(records),
        nothing_doubled(records),
        groups_whole(records),
        count_never_falls(records),
        steps_without_gap(records),
        versions_monotone(records),
        versions_exist(records),
    ]


def all_kills(records: Records, kills: int) -> Check:
    """Every kill that was asked for has happened."""
    made = len(records.kills)
    problems = [] if made == kills else [f"{made} of {kills}: the run ended before; take more learner.steps"]
    return Check("every kill was made", f"{made} kills", problems)


def ended(records: Records, status: int) -> Check:
    """The run has ended by itself, after its last step."""
    steps = records.config.learner.steps
    problems = [] if status == 0 else [f"exit status {status}"]
    if records.summary is None:
        problems.append("no summary.json: it did not come to its end")
    elif records.summary["steps"] != steps:
        problems.append(f"summary.json: {records.summary['steps']} of {steps} steps")
    return Check("the run ended well", f"exit status {status}", problems)


def nothing_lost(records: Records) -> Check:
    """What the workers were told is safe is on disk."""
    lost = sorted(records.acknowledged - records.written.keys())
    problems = [f"{len(lost)} acknowledged, not on disk: {_some(lost)}"] if lost else []
    if not records.acknowledged:
        problems.append("nothing was acknowledged")
    return Check("no acknowledged trajectory is lost", f"{len(records.acknowledged)} acknowledged", problems)


def nothing_doubled(records: Records) -> Check:
    """No trajectory stands on disk twice."""
    doubled = sorted(name for name, count in records.written.items() if count > 1)
    problems = [f"{len(doubled)} more than once: {_some(doubled)}"] if doubled else []
    return Check("no trajectory is doubled", f"{records.written.total()} on disk", problems)


def groups_whole(records: Records) -> Check:
    """Each group on disk has all its rollouts: an append is written whole or not at all."""
    size = records.config.rollout.group_size
    broken = sorted(f"{name} has {count} of {size}" for name, count in records.groups.items() if count != size)
    return Check("groups are whole", f"{len(records.groups)} groups", [_some(broken)] if broken else [])


def count_never_falls(records: Records) -> Check:
    """A replay buffer that was restarted has counted what it held before, and all it counts is on disk."""
    counts = [row["accepted"] for row in records.rows_of("rollout") if "accepted" in row]
    problems = [f"fell from {before} to {after}" for before, after in pairwise(counts) if after < before]
    if not counts:
        problems.append("it was never seen")
    elif max(counts) > len(records.written):
        problems.append(f"{max(counts)} counted, {len(records.written)} on disk")
    return Check("the replay buffer's count never falls", f"seen {len(counts)} times", problems)


def steps_without_gap(records: Records) -> Check:
    """Each step follows the one before; a restarted learner goes back to its newest checkpoint and no further."""
    problems, step, undone, restarts = [], 0, 0, -1
    for row in records.rows_of("learner", "step"):
        now = int(row["step"])
        if row["kind"] == "step":
            if now != step + 1:
                problems.append(f"step {now} follows step {step}")
        else:
            restarts += 1
            if now > step:
                problems.append(f"the learner started at step {now}, the log ends at step {step}")
            elif step - now > records.config.checkpoint_every:
                problems.append(f"the learner started at step {now} after step {step}: older than a checkpoint")
            undone += max(0, step - now)
        step = now
    if step != records.config.learner.steps:
        problems.append(f"the last step is {step} of {records.config.learner.steps}")
    seen = f"{step} steps, {max(0, restarts)} restarts of the learner, {undone} steps done again"
    return Check("learner steps have no gap", seen, problems)


def versions_monotone(records: Records) -> Check:
    """Versions never fall, and grow with each published step, over all restarts."""
    every, problems = records.config.learner.publish_every, []
    before: Row = {"version": 0, "step": 0}
    for row in records.rows_of("learner", "step"):
        publishes = row["kind"] == "step" and row["step"] % every == 0
        if row["version"] < before["version"] or (publishes and row["version"] == before["version"]):
            problems.append(
                f"version {row['version']} at step {row['step']} ({row['kind']}) "
                f"after {before['version']} at step {before['step']}"
            )
        before = row
    return Check("policy versions are monotone", f"up to {before['version']}", problems)


def versions_exist(records: Records) -> Check:
    """The newest adapters and all evaluated ones are there, and no step or trajectory names one that never was."""
    adapters = set(records.adapters)
    newest, problems = max(adapters, default=0), []
    kept = set(range(max(1, newest - records.config.learner.keep_adapters + 1), newest + 1))
    kept |= {row["version"] for row in records.rows_of("evaluation") if row["version"] > 0}
    if kept - adapters:
        problems.append(f"adapters that are kept are missing: {_some(list(map(str, sorted(kept - adapters))))}")
    unknown = sorted({row["version"] for row in records.rows_of("step") if row["version"] > newest})
    if unknown:
        problems.append(f"steps name versions without an adapter: {_some(list(map(str, unknown)))}")
    if records.newest_played > newest:
        problems.append(f"a trajectory names version {records.newest_played}, which has no adapter")
    return Check("every version exists", f"up to {newest}, {len(adapters)} kept", problems)


def same_success(disturbed: Records, undisturbed: Records) -> Check:
    """The final success rates differ by no more than noise.

    Rollouts of one instance are alike, so the instances are what counts as independent: of each split the difference
    may be `NOISE_DEVIATIONS` standard deviations of a difference of two binomial shares of that many instances.
    """
    seen, problems, instances = [], [], disturbed.config.evaluation.instances
    for split, other in sorted(undisturbed.final.items()):
        if split not in disturbed.final:
            problems.append(f"{split}: not evaluated")
            continue
        ours, theirs = float(disturbed.final[split]["success"]), float(other["success"])
        allowed = NOISE_DEVIATIONS * deviation_of_difference(ours, theirs, instances)
        seen.append(f"{split} {ours:.2f} against {theirs:.2f} (noise {allowed:.2f})")
        if abs(ours - theirs) > allowed:
            problems.append(f"{split}: {ours:.2f} against {theirs:.2f}, more than {allowed:.2f} apart")
    if not undisturbed.final:
        problems.append("the undisturbed run has no final evaluation")
    return Check("final success is that of an undisturbed run", ", ".join(seen), problems)


def deviation_of_difference(first: float, second: float, instances: int) -> float:
    """Returns the standard deviation of the difference of two shares, each of so many instances, if both are the same.

    One success and one failure are added, so that shares of 0 and 1 are not taken as certain.
    """
    share = ((first + second) * instances + 1.0) / (2.0 * instances + 2.0)
    return math.sqrt(2.0 * share * (1.0 - share) / instances)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
