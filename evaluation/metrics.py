"""How good a policy is: success, diversity, validity, and the match to the target distribution."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gflowvlm.envs.base import TaskEnv
from gflowvlm.envs.registry import make_env
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.trajectory import Trajectory, Validity

REPORT_SEED_OFFSET = 1_000_000
"""The final report is on other instances than those the best adapter was chosen by."""

FLOOR_DRAWS = 64
"""Repetitions behind the noise floor of the total variation."""

BOOTSTRAP_DRAWS = 1000
"""Resamplings of the instances behind an interval."""


@dataclass(frozen=True)
class EvaluationPlan:
    """Which instances are played, and how often.

    Attributes:
        split: ``id`` or ``ood``.
        instances: Number of instances.
        samples: N, sampled trajectories per instance.
        seed: Seed of the first instance; the others follow.
        temperature: Of the sampled trajectories.
    """

    split: str
    instances: int
    samples: int
    seed: int
    temperature: float = 1.0

    @classmethod
    def of(cls, config: RunConfig, split: str = "id") -> "EvaluationPlan":
        """Returns the plan of a run's own evaluations."""
        settings = config.evaluation
        return cls(split, settings.instances, settings.samples, settings.seed)

    @property
    def seeds(self) -> range:
        """The instance seeds."""
        return range(self.seed, self.seed + self.instances)


@dataclass(frozen=True)
class Evaluation:
    """The figures of one evaluation; shares and distances are in [0, 1].

    Attributes:
        version: Policy version that was evaluated; 0 is the base model.
        split: ``id`` or ``ood``.
        instances: Instances played.
        samples: N, sampled trajectories per instance.
        temperature: Of the sampled trajectories, which all figures but `success_greedy` are of.
        success: Share of successful trajectories.
        success_by_category: The same for each kind of task that the instances are of (`TaskEnv.category`); None
            where all are of one kind.
        success_greedy: Share of instances that the greedy policy solves.
        success_bound: Success of the perfect sampler of R^beta / Z on the same instances; None if unknown.
        div_at_n: Distinct successful trajectories per instance with at least one; at least 1, 0 without any.
        malformed_rate: Share of responses that could not be read, of those that no limit of tokens cut off.
        inadmissible_rate: Share of responses with an inadmissible action.
        cut_rate: Share of trajectories that a limit of tokens cut off (`EndReason.by_token_limit`).
        mean_response_tokens: Mean tokens of a response that no limit cut off.
        total_variation: Between sampled final outcomes and R^beta / Z, mean over instances; None if unknown.
        total_variation_low: Lower end of its 95 % interval (bootstrap over instances); None if unknown.
        total_variation_high: Upper end.
        total_variation_floor: The same for N draws from R^beta / Z itself: what a perfect policy would show.
    """

    version: int
    split: str
    instances: int
    samples: int
    temperature: float
    success: float
    success_by_category: dict[str, float] | None
    success_greedy: float
    success_bound: float | None
    div_at_n: float
    malformed_rate: float
    inadmissible_rate: float
    cut_rate: float
    mean_response_tokens: float
    total_variation: float | None
    total_variation_low: float | None
    total_variation_high: float | None
    total_variation_floor: float | None

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures as JSON can hold them."""
        return asdict(self)


def evaluate_trajectories(
    config: RunConfig,
    plan: EvaluationPlan,
    version: int,
    sampled: Sequence[Trajectory],
    greedy: Sequence[Trajectory],
) -> Evaluation:
    """Returns the figures of trajectories that were played by a plan.

    Args:
        config: The run's configuration; its task and reward exponent fix the target.
        plan: The plan that was played.
        version: The policy version that played.
        sampled: ``plan.samples`` trajectories per instance at the plan's temperature.
        greedy: One greedy trajectory per instance.
    """
    by_seed: dict[int, list[Trajectory]] = defaultdict(list)
    for trajectory in sampled:
        by_seed[trajectory.instance_seed].append(trajectory)
    env = make_env(config.task)
    match = _distribution_match(env, config.target.reward_exponent, plan, by_seed)
    steps = [step for trajectory in sampled for step in trajectory.steps]
    return Evaluation(
        version=version,
        split=plan.split,
        instances=len(by_seed),
        samples=plan.samples,
        temperature=plan.temperature,
        success=_mean(t.success for t in sampled),
        success_by_category=_success_by_category(env, plan.split, by_seed),
        success_greedy=_mean(t.success for t in greedy),
        success_bound=match["bound"],
        div_at_n=div_at_n(by_seed),
        malformed_rate=_mean(step.validity is Validity.MALFORMED for step in steps),
        inadmissible_rate=_mean(step.validity is Validity.INADMISSIBLE for step in steps),
        cut_rate=_mean(t.end.by_token_limit for t in sampled),
        mean_response_tokens=_mean(len(step.response_ids) for step in steps),
        total_variation=match["distance"],
        total_variation_low=match["low"],
        total_variation_high=match["high"],
        total_variation_floor=match["floor"],
    )


def div_at_n(by_instance: Mapping[int, Sequence[Trajectory]]) -> float:
    """Returns Div@N: the mean number of different successful trajectories over solved instances.

    Trajectories differ when their action sequences differ. 0 when no instance was solved (GFlowVLM, sec. 4).
    """
    distinct = [len({t.actions for t in group if t.success}) for group in by_instance.values()]
    return _mean(count for count in distinct if count >= 1)


def total_variation(counts: Mapping[str, int], target: Mapping[str, float]) -> float:
    """Returns half the L1 distance between the counts' empirical distribution and the target."""
    draws = sum(counts.values())
    outcomes = set(counts) | set(target)
    return 0.5 * sum(abs(counts.get(o, 0) / draws - target.get(o, 0.0)) for o in outcomes)


def noise_floor(target: Mapping[str, float], draws: int, rng: np.random.Generator) -> float:
    """Returns the expected total variation of `draws` draws from the target to the target itself."""
    probabilities = np.asarray(list(target.values()), dtype=np.float64)
    probabilities /= probabilities.sum()
    counts = rng.multinomial(draws, probabilities, size=FLOOR_DRAWS)
    return float(0.5 * np.abs(counts / draws - probabilities).sum(axis=1).mean())


def _success_by_category(
    env: TaskEnv, split: str, by_seed: Mapping[int, Sequence[Trajectory]]
) -> dict[str, float] | None:
    by_category: dict[str, list[bool]] = defaultdict(list)
    for seed, group in by_seed.items():
        category = env.category(seed, split)
        if category is None:
            return None
        by_category[category] += [t.success for t in group]
    return {category: _mean(by_category[category]) for category in sorted(by_category)}


def _distribution_match(
    env: TaskEnv, beta: float, plan: EvaluationPlan, by_seed: Mapping[int, Sequence[Trajectory]]
) -> dict[str, float | None]:
    rng = np.random.default_rng(plan.seed)
    bounds, distances, floors = [], [], []
    for seed, group in by_seed.items():
        env.reset(seed=seed, options={"split": plan.split})
        target, bound = env.target_distribution(beta), env.target_success(beta)
        if target is None or bound is None:
            return dict.fromkeys(("bound", "distance", "low", "high", "floor"))
        bounds.append(bound)
        distances.append(total_variation(Counter(t.outcome for t in group), target))
        floors.append(noise_floor(target, len(group), rng))
    low, high = mean_interval(distances, rng)
    return {"bound": _mean(bounds), "distance": _mean(distances), "low": low, "high": high, "floor": _mean(floors)}


def mean_interval(values: Sequence[float], rng: np.random.Generator) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of the mean of values; it is exact about nothing but their spread."""
    drawn = rng.choice(np.asarray(values, dtype=np.float64), size=(BOOTSTRAP_DRAWS, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def _mean(values: Iterable[float]) -> float:
    collected = list(values)
    return float(np.mean(collected)) if collected else 0.0
