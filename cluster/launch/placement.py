"""What a run asks of a cluster, what the cluster's nodes have, and what is lacking."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gflowvlm.shared.config import RunConfig

NODE_ID_LABEL = "ray.io/node-id"
# Small control actors of ours and Ray's that take a slot each.
_CONTROL_CPUS = 0.5
# Ray counts in steps of 0.0001.
_LEAST = 1e-4


@dataclass(frozen=True)
class Part:
    """Processes of one kind that a run starts.

    Attributes:
        name: What they are.
        count: How many.
        needed: How many of them the run cannot start without.
        cpus: CPUs of each.
        gpus: GPUs of each.
        resources: Custom resources of each.
        labels: Selectors by label that a node has to satisfy (`matches`).
    """

    name: str
    count: int
    needed: int
    cpus: float
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def bundle(self) -> dict[str, float]:
        """What one of them asks for, by Ray's names; only what is more than zero."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: amount for name, amount in asked.items() if amount > 0}

    def actor_options(self) -> dict[str, Any]:
        """Returns the options that place one of them as a Ray actor."""
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "resources": dict(self.resources),
            "label_selector": dict(self.labels),
        }


@dataclass(frozen=True)
class ResourcePlan:
    """What a run asks of the cluster.

    Attributes:
        parts: Its processes.
    """

    parts: tuple[Part, ...]

    @property
    def cpus(self) -> float:
        """CPUs in total."""
        return sum(part.count * part.cpus for part in self.parts) + _CONTROL_CPUS

    @property
    def gpus(self) -> float:
        """GPUs in total."""
        return sum(part.count * part.gpus for part in self.parts)

    def part(self, name: str) -> Part:
        """Returns the part of that name; raises KeyError when there is none."""
        return {part.name: part for part in self.parts}[name]

    def resources(self) -> dict[str, float]:
        """Returns custom resources in total."""
        total: dict[str, float] = {}
        for part in self.parts:
            for name, amount in part.resources.items():
                total[name] = total.get(name, 0.0) + part.count * amount
        return total


SAMPLER, ROLLOUT, LEARNER = "policy server replica", "rollout worker", "learner"
STORE, BUFFER = "adapter store", "replay buffer"


def resource_plan(config: RunConfig, driver_node: str | None = None) -> ResourcePlan:
    """Returns what the run's parts ask of the cluster.

    Args:
        config: The run's configuration.
        driver_node: Ray's id of the node that the driver runs on, where it is known.
    """
    sampler, rollout, learner, cluster = config.sampler, config.rollout, config.learner, config.cluster
    here = {} if driver_node is None else {NODE_ID_LABEL: driver_node}
    return ResourcePlan(
        (
            Part(
                SAMPLER,
                sampler.replicas,
                sampler.replicas,
                sampler.cpus_per_replica,
                sampler.gpus_per_replica,
                sampler.resources_per_replica,
                sampler.node_labels,
            ),
            Part(
                ROLLOUT,
                rollout.workers,
                1,
                rollout.cpus_per_worker,
                resources=rollout.resources_per_worker,
                labels=rollout.node_labels,
            ),
            Part(
                LEARNER,
                learner.workers,
                learner.workers,
                learner.cpus_per_worker,
                learner.gpus_per_worker,
                learner.resources_per_worker,
                learner.node_labels,
            ),
            Part(STORE, 1, 1, 0.0, resources=cluster.control_resources, labels=cluster.control_node_labels),
            Part(BUFFER, 1, 1, 0.0, resources=cluster.control_resources, labels=here),
        )
    )


def resized(config: RunConfig, workers: int, replicas: int) -> RunConfig:
    """Returns a configuration with other numbers of rollout workers and policy server replicas."""
    return config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={"workers": workers}),
            "sampler": config.sampler.model_copy(update={"replicas": replicas}),
        }
    )


def as_placed(config: RunConfig) -> RunConfig:
    """Returns the configuration as the run's parts are placed.

    On a local cluster rollout workers take no slots: those cannot become more later, but workers may, and the
    operating system shares the processors anyway.
    """
    if config.cluster.address is not None:
        return config
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"cpus_per_worker": 0.0})})


def largest(config: RunConfig) -> RunConfig:
    """Returns the configuration with as many workers and replicas as it may come to have by itself."""
    scaling = config.scaling
    return resized(config, scaling.max_workers, scaling.max_replicas) if scaling.automatic else config


@dataclass(frozen=True)
class Node:
    """A node of a cluster.

    Attributes:
        name: Its network address or name.
        alive: Whether it answers.
        resources: What it has in all, by Ray's names.
        labels: Its labels.
    """

    name: str
    alive: bool
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    @classmethod
    def from_ray(cls, entry: Mapping[str, Any]) -> "Node":
        """Reads an entry of `ray.nodes()`."""
        return cls(
            str(entry["NodeManagerAddress"]),
            bool(entry["Alive"]),
            dict(entry.get("Resources") or {}),
            dict(entry.get("Labels") or {}),
        )


@dataclass(frozen=True)
class Lack:
    """Processes of one part that find no room.

    Attributes:
        part: The part.
        missing: How many of it.
        reason: What the nodes lack for it.
    """

    part: Part
    missing: int
    reason: str

    @property
    def stops(self) -> bool:
        """Whether the run cannot start without them."""
        return self.part.count - self.missing < self.part.needed

    def describe(self) -> str:
        """Returns one line: who, how many, what each asks for, what there is."""
        asked = " and ".join(filter(None, (amounts(self.part.bundle), selectors(self.part.labels))))
        of = f"{self.missing} of {self.part.count}" if self.part.count > 1 else "the"
        return f"{of} {self.part.name}{'s' if self.part.count > 1 else ''} ({asked or 'nothing'}): {self.reason}"


def amounts(resources: Mapping[str, float]) -> str:
    """Returns amounts of resources as text, for example ``1 GPU, 0.5 CPU``."""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def selectors(labels: Mapping[str, str]) -> str:
    """Returns label selectors as text, for example ``disk=ssd``."""
    return ", ".join(f"{key}={value}" for key, value in labels.items())


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Returns whether a node's labels satisfy a selector by Ray's rules: ``a``, ``!a``, ``in(a, b)``, ``!in(a, b)``.

    A node without the label satisfies a negation.
    """
    for key, condition in selector.items():
        negated, text = condition.startswith("!"), condition.removeprefix("!")
        inside = re.fullmatch(r"in\((.*)\)", text)
        values = {text} if inside is None else {value.strip() for value in inside[1].split(",")}
        if (labels.get(key) in values) == negated:
            return False
    return True


def lacking(plan: ResourcePlan, nodes: Sequence[Node]) -> list[Lack]:
    """Returns the processes of a plan for which the living nodes have no room, were they empty.

    What the run cannot start without is placed before the rest, parts that few nodes can take before others, and
    each process where it leaves least over: this can find less room than there is for an odd mixture of parts.
    """
    living = [node for node in nodes if node.alive]
    free = [dict(node.resources) for node in living]
    placed = dict.fromkeys((part.name for part in plan.parts), 0)
    for needed in (True, False):
        for part in sorted(plan.parts, key=_hardest_first):
            able = [have for node, have in zip(living, free, strict=True) if matches(node.labels, part.labels)]
            placed[part.name] += _place(part.bundle, part.needed if needed else part.count - part.needed, able)
    return [
        Lack(part, part.count - placed[part.name], _reason(part, living))
        for part in plan.parts
        if placed[part.name] < part.count
    ]


def _hardest_first(part: Part) -> tuple[float, ...]:
    return (-part.gpus, -len(part.resources), -len(part.labels), -part.cpus)


def _place(bundle: Mapping[str, float], count: int, free: Sequence[dict[str, float]]) -> int:
    """Takes a bundle out of `free`, node by node, at most `count` times; returns how many found room."""
    if not bundle:
        return count if free else 0
    for placed in range(count):
        able = [node for node in free if all(node.get(name, 0.0) >= amount - _LEAST for name, amount in bundle.items())]
        if not able:
            return placed
        # Nodes with what the bundle does not ask for (GPUs, say) are left to those that do.
        node = min(able, key=lambda n: (_unrequested_kinds(n, bundle), sum(n.get(name, 0.0) for name in bundle)))
        for name, amount in bundle.items():
            node[name] -= amount
    return count


def _unrequested_kinds(node: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    ordinary = ("CPU", "memory", "object_store_memory")
    return sum(
        amount > 0 and name not in bundle and name not in ordinary and not name.startswith("node:")
        for name, amount in node.items()
    )


def _reason(part: Part, living: Sequence[Node]) -> str:
    fitting = [node for node in living if matches(node.labels, part.labels)]
    if not living:
        return "no node is alive"
    if not fitting:
        return f"none of {len(living)} nodes has the labels"
    where = f"{len(fitting)} of {len(living)} nodes with the labels" if part.labels else f"{len(living)} nodes"
    for name, amount in part.bundle.items():
        most = max(node.resources.get(name, 0.0) for node in fitting)
        if most < amount - _LEAST:
            return f"{where}, none with more than {most:g} {name}"
    total = {name: sum(node.resources.get(name, 0.0) for node in fitting) for name in part.bundle}
    return f"{where}, with {amounts(total)} in all, shared with the run's other parts"
