"""The pacing of generation and learning, and the counts that it is applied to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gflowvlm.actors.admission import Admission, Pacing
from gflowvlm.run.preset_library import load_preset


def admission_of(max_staleness: int, batch: int, group_size: int, **counts: int) -> Admission:
    """Counts under a pacing that publishes after every step."""
    return Admission(Pacing(max_staleness, batch, publish_every=1, group_size=group_size), **counts)


def test_generation_runs_ahead_by_exactly_the_staleness_limit() -> None:
    admission = admission_of(max_staleness=2, batch=16, group_size=8)
    assert admission.capacity == 3 * 16
    assert admission.admit(100) == 6
    assert admission.capacity == 0
    assert admission.admit(1) == 0


def test_a_published_version_frees_one_batch() -> None:
    admission = Admission(Pacing(max_staleness=0, fresh_per_step=8, publish_every=2, group_size=8))
    admission.admit(2)
    admission.note_accepted(2, accepted=16)
    assert admission.admit(5) == 0
    admission.note_learned(1)
    assert admission.admit(5) == 0
    admission.note_learned(2)
    assert admission.admit(5) == 2
    assert (admission.accepted, admission.running, admission.groups_running) == (16, 16, 2)


def test_acknowledged_groups_still_count_and_failed_ones_do_not() -> None:
    admission = admission_of(max_staleness=0, batch=32, group_size=8)
    assert admission.admit(4) == 4
    admission.note_accepted(1, accepted=8)
    assert admission.capacity == 0
    admission.note_failed(2)
    assert admission.capacity == 16
    assert admission.admit(9) == 2


def test_a_batch_that_is_no_multiple_of_a_group_never_starves_the_learner() -> None:
    admission = admission_of(max_staleness=0, batch=12, group_size=8)
    admission.admit(admission.admissible_groups)
    assert admission.running >= 12
    admission.note_accepted(2, accepted=16)
    assert admission.capacity == -4
    assert admission.admissible_groups == 0


def test_resume_goes_on_where_the_run_was() -> None:
    before = admission_of(max_staleness=1, batch=16, group_size=8)
    for step in range(1, 6):
        before.note_accepted(before.admit(2), accepted=16 * step)
        before.note_learned(step)
    before.admit(1)  # lost with the run: nothing is running after a resume
    after = admission_of(max_staleness=1, batch=16, group_size=8, learned=before.learned, accepted=before.accepted)
    assert after.capacity == before.capacity + before.running
    assert after.admit(100) == after.running // 8


def test_what_the_buffer_has_of_a_worker_that_died_before_telling_counts_once_any_other_answer_comes() -> None:
    admission = admission_of(max_staleness=0, batch=32, group_size=8)
    admission.admit(4)
    # Three groups are in the buffer. One worker told, one will, and one died: its group is played again.
    admission.note_accepted(1, accepted=24)
    assert admission.capacity == 32 - (24 + 24)
    admission.note_accepted(1, accepted=16)  # this answer was overtaken
    assert (admission.accepted, admission.running, admission.capacity) == (24, 16, -8)
    admission.note_accepted(2, accepted=40)
    assert (admission.accepted, admission.running, admission.capacity) == (40, 0, -8)


def test_finishing_more_than_runs_is_an_error() -> None:
    admission = admission_of(max_staleness=0, batch=8, group_size=8)
    with pytest.raises(ValueError, match="0 were running"):
        admission.note_accepted(1, accepted=8)
    with pytest.raises(ValueError, match="0 were running"):
        admission.note_failed()


def test_a_learner_that_goes_back_to_its_checkpoint_takes_no_room_away() -> None:
    admission = admission_of(max_staleness=0, batch=8, group_size=8, learned=3)
    capacity = admission.capacity
    admission.note_learned(2)
    assert admission.capacity == capacity
    admission.note_learned(4)
    assert admission.capacity == capacity + 8


@pytest.mark.parametrize("wrong", [{"accepted": -1}, {"running": -1}, {"learned": -1}])
def test_impossible_counts_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        admission_of(max_staleness=0, batch=8, group_size=4, **wrong)


@pytest.mark.parametrize("wrong", [{"fresh_per_step": 0}, {"group_size": 0}, {"max_staleness": -1}])
def test_an_impossible_pacing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Pacing(**{"max_staleness": 0, "fresh_per_step": 8, "publish_every": 1, "group_size": 4, **wrong})


def test_a_runs_pacing_is_that_of_its_settings_on_policy_without_any_running_ahead() -> None:
    overrides = ["buffer.max_staleness=3", "learner.publish_every=2", "rollout.group_size=4"]
    config = load_preset("numberline-tiny", overrides)
    assert Pacing.of(config) == Pacing(3, config.fresh_per_step, 2, 4)
    assert Pacing.of(load_preset("numberline-tiny", ["objective.loss=ppo"])).max_staleness == 0


@given(
    pacing=st.builds(
        Pacing,
        max_staleness=st.integers(0, 5),
        fresh_per_step=st.integers(1, 40),
        publish_every=st.integers(1, 5),
        group_size=st.integers(1, 9),
    ),
    events=st.lists(st.sampled_from(["admit", "accept", "fail", "learn"]), max_size=60),
)
def test_never_more_than_a_group_beyond_the_bound_and_always_enough_for_the_next_step(
    pacing: Pacing, events: list[str]
) -> None:
    admission, buffer = Admission(pacing), 0
    for event in events:
        if event == "admit":
            admission.admit(3)
        elif event == "learn":
            admission.note_learned(admission.learned + 1)
        elif admission.running >= pacing.group_size and event == "accept":
            buffer += pacing.group_size
            admission.note_accepted(1, buffer)
        elif admission.running >= pacing.group_size:
            admission.note_failed()
        started = admission.accepted + admission.running
        assert started < pacing.most_started(admission.learned) + pacing.group_size
        # What the learner waits for at its next step can always be played.
        still = admission.admissible_groups * pacing.group_size
        assert started + still >= pacing.accepted_before(admission.learned)
