import dataclasses
import math

from gflowvlm.learner.mismatch import compare
from gflowvlm.shared.trajectory import EndReason


def with_sampler(trajectory, values):
    step = dataclasses.replace(trajectory.steps[0], response_ids=[5, 6, 7], sampler_log_probs=values)
    return dataclasses.replace(trajectory, steps=[step])


def test_reports_the_differences_of_sampled_tokens_worst_first(make_trajectory):
    trajectory = with_sampler(make_trajectory(["jump"], EndReason.INVALID), [-1.0, math.nan, -2.0])
    found = compare([trajectory], [[[-1.1, -9.0, -1.5]]])
    assert (found.tokens, found.response_tokens) == (2, 3)
    assert math.isclose(found.max, 0.5)
    assert math.isclose(found.mean, 0.3)
    worst = found.worst[0]
    assert (worst.trajectory_id, worst.step, worst.position, worst.token_id) == (trajectory.trajectory_id, 0, 2, 7)


def test_the_quantile_leaves_one_token_in_a_hundred_above_it(make_trajectory):
    step = make_trajectory(["jump"], EndReason.INVALID).steps[0]
    step = dataclasses.replace(step, response_ids=list(range(300)), sampler_log_probs=[0.0] * 300)
    trajectory = dataclasses.replace(make_trajectory(["jump"], EndReason.INVALID), steps=[step])
    found = compare([trajectory], [[[-float(i) for i in range(300)]]])
    assert (found.max, found.high, found.trajectories) == (299.0, 296.0, 1)


def test_a_learner_value_that_is_no_number_is_an_infinite_mismatch(make_trajectory):
    trajectory = with_sampler(make_trajectory(["jump"], EndReason.INVALID), [-1.0, -1.0, -1.0])
    assert compare([trajectory], [[[-1.0, math.nan, -1.0]]]).max == math.inf


def test_nothing_sampled_is_no_mismatch(make_trajectory):
    found = compare([with_sampler(make_trajectory(["jump"], EndReason.INVALID), [math.nan] * 3)], [[[0.0] * 3]])
    assert (found.tokens, found.max, found.high, found.mean, found.worst) == (0, 0.0, 0.0, 0.0, [])
