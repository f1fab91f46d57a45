"""NumberLine's exact target distribution, against every action sequence written out."""

import itertools
from collections import Counter

import numpy as np
import pytest

from gflowvlm.envs.numberline.environment import NumberLineEnv
from gflowvlm.envs.numberline.settings import NumberLineSettings
from gflowvlm.shared.response import DONE_TOKEN


def enumerated(env: NumberLineEnv, seed: int, split: str, beta: float) -> dict[str, float]:
    """R^β/Z by playing every sequence of moves and a stop in the environment itself."""
    mass: Counter[str] = Counter()
    for moves in range(env.max_steps + 1):
        for walk in itertools.product("+-", repeat=moves):
            env.reset(seed=seed, options={"split": split})
            for action in walk:
                env.step(action)
            if env.end is None:
                env.step(DONE_TOKEN)
            mass[env.outcome] += np.exp(env.log_reward) ** beta
    total = sum(mass.values())
    return {outcome: value / total for outcome, value in mass.items()}


@pytest.mark.parametrize("split", ["id", "ood"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 8.0])
def test_distribution_equals_brute_force_enumeration(split: str, beta: float) -> None:
    env = NumberLineEnv(NumberLineSettings(n_max=3, ood_low=10, ood_high=13, ood_max_distance=3, max_steps=5))
    for seed in range(4):
        expected = enumerated(env, seed, split, beta)
        env.reset(seed=seed, options={"split": split})
        found = env.target_distribution(beta)
        assert found == pytest.approx(expected, rel=1e-10)
        assert env.target_success(beta) == pytest.approx(expected[str(env.target)], rel=1e-10)


def test_distribution_is_the_instances_own_wherever_the_episode_stands() -> None:
    env = NumberLineEnv()
    env.reset(seed=1)
    before = env.target_distribution(2.0)
    env.step("+")
    env.step("nonsense")
    assert env.target_distribution(2.0) == before


@pytest.mark.parametrize("beta", [0.0, 1.0, 100.0])
def test_distribution_sums_to_one_at_the_largest_horizon(beta: float) -> None:
    env = NumberLineEnv(NumberLineSettings(n_max=99, max_steps=64))
    env.reset(seed=0)
    found = env.target_distribution(beta)
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-12)
    assert all(np.isfinite(p) for p in found.values())


def test_target_out_of_reach_has_no_mass() -> None:
    env = NumberLineEnv(NumberLineSettings(n_max=5, max_steps=1))
    for seed in range(50):
        env.reset(seed=seed)
        reachable = abs(env.start - env.target) <= 1
        assert (env.target_success(8.0) > 0) == reachable


@pytest.mark.parametrize(("beta", "mean_success"), [(1, 0.35), (2, 0.57), (4, 0.88), (8, 0.99)])
def test_perfect_sampler_succeeds_about_as_often_as_the_design_note_measured(beta: float, mean_success: float) -> None:
    env = NumberLineEnv(NumberLineSettings(max_steps=8))
    successes = []
    for seed in range(300):
        env.reset(seed=seed)
        successes.append(env.target_success(beta))
    assert np.mean(successes) == pytest.approx(mean_success, abs=0.04)
