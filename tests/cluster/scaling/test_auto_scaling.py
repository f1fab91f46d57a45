"""The rules of scaling by load, and that they settle on a plant of known rates."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gflowvlm.cluster.scaling.auto_scaling import AutoScaling, Load, Size
from gflowvlm.shared.cluster_settings import ScalingSettings

SETTINGS = ScalingSettings(automatic=True, max_workers=16, max_replicas=4, patience=2, cooldown_s=30)
SIZE = Size(workers=4, replicas=2)
# Everything in use and the learner in balance; the tests change what they are about.
LOAD = Load(
    learner_waiting=0.1,
    sampler_idle=0.0,
    requests=64,
    requests_capacity=128,
    groups=16,
    groups_capacity=16,
    serving=SIZE,
)


def decided(load, size=SIZE, settings=SETTINGS, looks=10):
    """The first change in so many equal looks, a second apart."""
    auto = AutoScaling(settings)
    for second in range(looks):
        change = auto.decide(load, size, now=100.0 + second)
        if change is not None:
            return change.size
    return None


def load(**changes):
    return replace(LOAD, **changes)


def test_a_learner_that_waits_gets_workers_when_all_are_busy_and_the_replicas_have_places():
    assert decided(load(learner_waiting=0.5)) == Size(6, 2)
    assert decided(load(learner_waiting=0.5, groups=8)) is None


def test_a_learner_that_waits_gets_replicas_when_requests_fill_them():
    assert decided(load(learner_waiting=0.5, requests=120)) == Size(4, 3)
    assert decided(load(learner_waiting=0.5, requests=400)) == Size(4, 3)


def test_engines_that_are_busy_with_small_batches_get_company_once_no_more_workers_are_allowed():
    settings = SETTINGS.model_copy(update={"max_workers": 4})
    assert decided(load(learner_waiting=0.5), settings=settings) == Size(4, 3)
    assert decided(load(learner_waiting=0.5, sampler_idle=0.4), settings=settings) is None


def test_a_learner_that_never_waits_lets_go_of_what_the_rest_can_do_without():
    idle = load(learner_waiting=0.0, sampler_idle=0.7, requests=40)
    assert decided(idle) == Size(4, 1)
    # One replica would be busy 100 % of its time.
    assert decided(load(learner_waiting=0.0, sampler_idle=0.5, requests=40)) is None
    # One replica would have 60 requests for 64 places.
    assert decided(load(learner_waiting=0.0, sampler_idle=0.7, requests=60)) is None
    assert decided(load(learner_waiting=0.0, groups=9)) == Size(3, 2)
    assert decided(load(learner_waiting=0.0, groups=10)) is None


def test_in_between_nothing_changes():
    assert decided(load(learner_waiting=0.1, groups=1, sampler_idle=1.0, requests=0)) is None


@pytest.mark.parametrize("waiting", [0.0, 1.0])
def test_bounds_hold(waiting):
    settings = SETTINGS.model_copy(
        update={"min_workers": 4, "max_workers": 4, "min_replicas": 2, "max_replicas": 2, "patience": 1}
    )
    for requests, groups, idle in ((0, 0, 1.0), (400, 16, 0.0), (64, 16, 0.0)):
        assert (
            decided(load(learner_waiting=waiting, requests=requests, groups=groups, sampler_idle=idle), SIZE, settings)
            is None
        )


def test_a_wish_has_to_repeat_itself():
    auto, more, none = AutoScaling(SETTINGS), load(learner_waiting=0.5), load(learner_waiting=0.1)
    assert [auto.decide(seen, SIZE, now) for now, seen in enumerate((more, none, more, none, more))] == [None] * 5
    # Wishes for other things do not add up.
    replicas = load(learner_waiting=0.5, requests=128)
    assert [auto.decide(seen, SIZE, now) for now, seen in enumerate((none, more, replicas, more))] == [None] * 4
    assert auto.decide(more, SIZE, 5.0).size == Size(6, 2)


def test_after_any_change_there_is_quiet_for_a_while():
    auto, more = AutoScaling(SETTINGS), load(learner_waiting=0.5)
    auto.note_change(now=100.0)
    assert [auto.decide(more, SIZE, now) for now in (101.0, 115.0, 129.9)] == [None] * 3
    assert auto.decide(more, SIZE, 130.0) is None
    assert auto.decide(more, SIZE, 131.0).size == Size(6, 2)


def test_what_was_asked_for_and_has_not_come_is_not_asked_for_again_but_may_be_given_up():
    waiting = load(learner_waiting=0.5, serving=Size(3, 2), groups=12, groups_capacity=12)
    assert decided(waiting) is None
    waiting = load(learner_waiting=0.5, serving=Size(4, 1), requests=64, requests_capacity=64)
    assert decided(waiting) is None
    given_up = load(learner_waiting=0.0, serving=Size(4, 1), sampler_idle=0.5, requests=20, requests_capacity=64)
    assert decided(given_up) == Size(4, 1)


def test_a_decision_says_what_was_seen():
    auto = AutoScaling(SETTINGS.model_copy(update={"patience": 1}))
    reason = auto.decide(load(learner_waiting=0.5), SIZE, 0.0).reason
    assert reason == (
        "the learner waits 50% of its time, 16 of 16 groups play, 64 requests for 128 places, samplers idle 0%"
    )


@dataclass(frozen=True)
class Plant:
    """A run of fixed rates, in groups a second: of a group's place in a worker, of a replica, of the learner."""

    place: float
    replica: float
    learner: float
    places: int = 4
    group_size: int = 8
    sequences: int = 32

    def load(self, size):
        room = self.places * size.workers
        made = min(room * self.place, size.replicas * self.replica)
        used = min(made, self.learner)
        # The capacity rule holds back what the learner does not use up.
        groups = room if made < self.learner else min(room, round(used / self.place))
        return Load(
            learner_waiting=1 - used / self.learner,
            sampler_idle=max(0.0, 1 - used / (size.replicas * self.replica)),
            requests=groups * self.group_size,
            requests_capacity=self.sequences * size.replicas,
            groups=groups,
            groups_capacity=room,
            serving=size,
        )


rates = st.floats(0.05, 20.0)


@given(place=rates, replica=rates, learner=rates, rollouts=st.integers(1, 16), samplers=st.integers(1, 4))
def test_on_a_run_of_fixed_rates_it_settles_and_leaves_no_learner_waiting_that_it_could_feed(
    place, replica, learner, rollouts, samplers
):
    plant, size, auto = Plant(place, replica, learner), Size(rollouts, samplers), AutoScaling(SETTINGS)
    sizes = [size]
    for look in range(200):
        change = auto.decide(plant.load(size), size, now=10.0 * look)
        if change is not None:
            size = change.size
            auto.note_change(now=10.0 * look)
            sizes.append(size)
    assert len(sizes) <= 20, sizes
    end = plant.load(size)
    assert all(change is None for change in (auto.decide(end, size, now) for now in (5000.0, 5010.0, 5020.0)))
    largest = Size(SETTINGS.max_workers, SETTINGS.max_replicas)
    if plant.load(largest).learner_waiting < SETTINGS.more_above and end.requests < end.requests_capacity:
        assert end.learner_waiting < SETTINGS.more_above, (sizes, end)
