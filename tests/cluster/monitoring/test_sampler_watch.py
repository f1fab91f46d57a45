import pytest

from gflowvlm.cluster.monitoring.sampler_watch import SamplerLoad, SamplerWatch


def status(replica, busy_s, up_s, in_flight=0):
    return {"replica": replica, "busy_s": busy_s, "up_s": up_s, "in_flight": in_flight}


def watch(*looks):
    """A watch whose replicas say one of these at each look; an exception is raised."""
    answers = iter(looks)

    def statuses():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return SamplerWatch(statuses)


def test_idle_is_what_was_not_busy_since_the_look_before():
    samplers = watch(
        [status("a", 5.0, 100.0, 3), status("b", 0.0, 50.0, 4)],
        [status("a", 14.0, 110.0, 3), status("b", 5.0, 60.0, 40)],
    )
    assert samplers.look() == SamplerLoad(replicas=2, requests=7, idle_share=None)
    seen = samplers.look()
    assert (seen.replicas, seen.requests) == (2, 43)
    assert seen.idle_share == pytest.approx((0.1 + 0.5) / 2)


def test_a_replica_that_came_since_has_no_share_yet():
    samplers = watch(
        [status("a", 0.0, 10.0)], [status("a", 10.0, 20.0), status("new", 0.0, 1.0)], [status("new", 0.0, 5.0)]
    )
    samplers.look()
    assert samplers.look() == SamplerLoad(replicas=2, requests=0, idle_share=0.0)
    assert samplers.look() == SamplerLoad(replicas=1, requests=0, idle_share=1.0)


def test_replicas_that_do_not_answer_say_nothing():
    samplers = watch([status("a", 0.0, 10.0)], [], TimeoutError(), [status("a", 0.0, 20.0)])
    samplers.look()
    assert samplers.look() is None
    assert samplers.look() is None
    assert samplers.look().idle_share is None
