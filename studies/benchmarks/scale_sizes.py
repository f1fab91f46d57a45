"""How much is simulated."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SimulatedScale:
    """How much is simulated, and how slow the simulated parts are.

    The defaults are those of a policy of 7 billion parameters on 16 GPUs: an answer of some 800 tokens at 25 tokens/s
    for each of 256 sequences, half a second for an adapter of some hundred MB. A rollout worker's worth of
    environments is 48: six groups of eight.

    Attributes:
        trajectories: Trajectories of the large run.
        few_trajectories: Trajectories of the runs with one sampler.
        samplers: Samplers of the large run.
        places: Requests that a sampler answers at the same time.
        environments_per_sampler: Environments for each sampler: three times the places, since on average half of
            a group's episodes have ended while its longest is still played.
        batches_in_play: The environments' trajectories in terms of the learner's fresh trajectories per step.
        processes: Processes that hold the rollout workers' worth of environments of the large run.
        response_s: Mean time of a response, seconds.
        spread: Sigma of its log-normal distribution.
        load_s: Time in which an engine loads an adapter, seconds.
        adapter_kib: Size of the adapters.
        overlap_steps: Learner steps of the runs with and without overlap.
        overlap_response_s: Time of a response there, seconds.
        overlap_places: Requests that the sampler there answers at the same time, and trajectories of a learner step.
        publish_replicas: Replicas to which adapters are published.
        publishes: Adapters published, to one replica and to all.
    """

    trajectories: int = 100_000
    few_trajectories: int = 1_000
    samplers: int = 16
    places: int = 256
    environments_per_sampler: int = 768
    batches_in_play: int = 8
    processes: int = 4
    response_s: float = 32.0
    spread: float = 0.5
    load_s: float = 0.5
    adapter_kib: int = 2048
    overlap_steps: int = 40
    overlap_response_s: float = 1.5
    overlap_places: int = 64
    publish_replicas: int = 32
    publishes: int = 40


FULL_SIMULATION = SimulatedScale()

QUICK_SIMULATION = SimulatedScale(
    trajectories=1600,
    few_trajectories=400,
    samplers=4,
    places=16,
    environments_per_sampler=48,
    batches_in_play=3,
    processes=2,
    response_s=1.0,
    load_s=0.25,
    adapter_kib=64,
    overlap_steps=8,
    overlap_response_s=0.5,
    overlap_places=16,
    publish_replicas=4,
    publishes=10,
)
