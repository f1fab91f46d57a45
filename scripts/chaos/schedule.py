"""What is killed, and when: a function of the seed, so that a run can be disturbed again in the same way."""

import random
from dataclasses import dataclass

MOMENT_S = 2.0
"""A kill comes up to so many seconds after the learner step that it waits for: anywhere within the next one."""


@dataclass(frozen=True)
class Part:
    """Something that can be killed.

    Attributes:
        name: What it is.
        title: How the titles of its processes begin; None for nodes and their network.
    """

    name: str
    title: str | None


ENGINE = Part("vLLM engine", "VLLM::EngineCore")
NODE = Part("worker node", None)
NETWORK = Part("worker node's network", None)
"""Only where nodes have network addresses of their own."""

HEAD = Part("head", None)
"""Only where its state is kept outside of it."""

PARTS: tuple[Part, ...] = (
    Part("rollout worker", "ray::RolloutWorker"),
    Part("policy server replica", "ray::ServeReplica"),
    ENGINE,
    Part("replay buffer", "ray::ReplayBufferActor"),
    Part("learner", "ray::RayTrainWorker"),
    Part("adapter store", "ray::_AdapterStoreActor"),
    Part("mailbox of the learner's reports", "ray::LearnerMailbox"),
    NODE,
)


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        step: It waits for this learner step.
        delay_s: How long after that step it comes, seconds.
        part: What is killed.
        pick: Which of several: a share of their number, in [0, 1).
    """

    step: int
    delay_s: float
    part: Part
    pick: float


def schedule(seed: int, kills: int, steps: int, parts: tuple[Part, ...] = PARTS) -> list[Kill]:
    """Returns the kills in order of their steps.

    Parts come in rounds, each in another order: none is killed again before all others were. Steps are drawn evenly
    from the first to the last but two, so that the run is still going when the last kill comes.

    Args:
        seed: Fixes all of it.
        kills: How many.
        steps: Learner steps of the run; at least 3.
        parts: What can be killed.

    Raises:
        ValueError: The run is too short, or there is nothing to kill.
    """
    if steps < 3 or not parts:
        raise ValueError(f"{steps} learner steps and {len(parts)} parts leave nothing to disturb")
    draw = random.Random(seed)
    order: list[Part] = []
    while len(order) < kills:
        order += draw.sample(parts, len(parts))
    moments = sorted(draw.randint(1, steps - 2) for _ in range(kills))
    return [
        Kill(step, draw.uniform(0.0, MOMENT_S), part, draw.random()) for step, part in zip(moments, order, strict=False)
    ]
