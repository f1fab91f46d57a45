"""The capacity rule of new rollouts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gflowvlm.actors.admission import Admission


def test_generation_runs_ahead_by_exactly_the_staleness_limit() -> None:
    admission = Admission(max_staleness=2, batch=16, group_size=8)
    assert admission.capacity == 3 * 16
    assert admission.admit(100) == 6
    assert admission.capacity == 0
    assert admission.admit(1) == 0


def test_a_published_version_frees_one_batch() -> None:
    admission = Admission(max_staleness=0, batch=16, group_size=8)
    admission.admit(2)
    admission.note_accepted(2)
    assert admission.admit(5) == 0
    admission.advance(1)
    assert admission.admit(5) == 2
    assert (admission.accepted, admission.running) == (16, 16)


def test_acknowledged_groups_still_count_and_failed_ones_do_not() -> None:
    admission = Admission(max_staleness=0, batch=32, group_size=8)
    assert admission.admit(4) == 4
    admission.note_accepted()
    assert admission.capacity == 0
    admission.note_failed(2)
    assert admission.capacity == 16
    assert admission.admit(9) == 2


def test_a_batch_that_is_no_multiple_of_a_group_never_starves_the_learner() -> None:
    admission = Admission(max_staleness=0, batch=12, group_size=8)
    admission.admit(admission.admissible_groups)
    assert admission.running >= 12
    admission.note_accepted(2)
    assert admission.capacity == -4
    assert admission.admissible_groups == 0


def test_resume_goes_on_where_the_run_was() -> None:
    before = Admission(max_staleness=1, batch=16, group_size=8)
    for version in range(1, 6):
        before.note_accepted(before.admit(2))
        before.advance(version)
    before.admit(1)  # lost with the run: nothing is running after a resume
    after = Admission(max_staleness=1, batch=16, group_size=8, version=before.version, accepted=before.accepted)
    assert after.capacity == before.capacity + before.running
    assert after.admit(100) == after.running // 8


def test_finishing_more_than_runs_is_an_error() -> None:
    admission = Admission(max_staleness=0, batch=8, group_size=8)
    with pytest.raises(ValueError, match="0 were running"):
        admission.note_accepted()
    with pytest.raises(ValueError, match="0 were running"):
        admission.note_failed()


def test_versions_only_go_forward() -> None:
    admission = Admission(max_staleness=0, batch=8, group_size=8, version=3)
    admission.advance(3)
    with pytest.raises(ValueError, match="from 3 to 2"):
        admission.advance(2)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"group_size": 0}, {"max_staleness": -1}, {"accepted": -1}])
def test_impossible_counts_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Admission(**{"max_staleness": 0, "batch": 8, "group_size": 4, **wrong})


@given(
    staleness=st.integers(0, 5),
    batch=st.integers(1, 40),
    size=st.integers(1, 9),
    events=st.lists(st.sampled_from(["admit", "accept", "fail", "publish"]), max_size=60),
)
def test_never_more_than_a_group_beyond_the_bound(staleness: int, batch: int, size: int, events: list[str]) -> None:
    admission = Admission(staleness, batch, size)
    for event in events:
        if event == "admit":
            admission.admit(3)
        elif event == "publish":
            admission.advance(admission.version + 1)
        elif admission.running >= size:
            admission.note_accepted() if event == "accept" else admission.note_failed()
        started = admission.accepted + admission.running
        assert started < (staleness + admission.version + 1) * batch + size
        # The learner can always get what its next version needs.
        assert started + admission.admissible_groups * size >= (admission.version + 1) * batch
