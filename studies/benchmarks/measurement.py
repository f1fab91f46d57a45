"""What a benchmark gives back."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from gflowvlm.studies.benchmarks.scale_sizes import FULL_SIMULATION, QUICK_SIMULATION, SimulatedScale

USUAL_PARTS = ("environment", "sampler", "serve", "adapter", "replay", "learner")
"""What is measured when nothing is chosen."""

SIMULATED_PARTS = ("scale", "overlap", "publish")
"""What is measured with simulated engines and a simulated learner."""

PARTS = USUAL_PARTS + SIMULATED_PARTS
"""What can be measured, in the order in which results are shown."""

Say = Callable[[str], None]
"""Shows a line of progress."""


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        rounds: Rounds of sampling per engine.
        requests_per_slot: Requests per round for every one in flight.
        publishes: Adapters published, idle and again under load.
        learner_steps: Learner steps timed.
        seconds: Time for a measurement that can be cut anywhere.
        replay_groups: Groups appended to the replay buffer.
        simulated: How much is simulated, for the parts that simulate.
    """

    rounds: int = 7
    requests_per_slot: int = 4
    publishes: int = 40
    learner_steps: int = 5
    seconds: float = 4.0
    replay_groups: int = 256
    simulated: SimulatedScale = FULL_SIMULATION


QUICK = Scale(
    rounds=3,
    requests_per_slot=3,
    publishes=20,
    learner_steps=2,
    seconds=1.0,
    replay_groups=64,
    simulated=QUICK_SIMULATION,
)


@dataclass(frozen=True)
class Measurement:
    """One measured number.

    Attributes:
        part: The part that measured it.
        name: Unique name, the key in the JSON file.
        value: The number.
        unit: Its unit.
        description: What it says and under which conditions.
        at_least: The least it should be, where the project promises something.
        at_most: The most it should be, likewise.
    """

    part: str
    name: str
    value: float
    unit: str
    description: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the number is as promised; None where nothing is."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most

    @property
    def bar(self) -> str:
        """What is promised, empty where nothing is."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"

    def as_dict(self) -> dict[str, Any]:
        """Returns everything but the name."""
        values = asdict(self)
        del values["name"]
        return {**values, "met": self.met}
