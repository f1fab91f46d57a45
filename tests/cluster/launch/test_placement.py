"""What a run asks for, compared with what nodes have."""

import pytest
from ray._private.label_utils import validate_label_selector

from gflowvlm.cluster.launch.placement import (
    BUFFER,
    LEARNER,
    ROLLOUT,
    SAMPLER,
    STORE,
    Node,
    Part,
    as_placed,
    lacking,
    largest,
    matches,
    resource_plan,
)
from gflowvlm.run.preset_library import load_preset


def node(name="n", *, alive=True, labels=None, **resources):
    return Node(name, alive, resources, labels or {})


def plan(*overrides):
    return resource_plan(load_preset("numberline-tiny", overrides))


def lines(lacks):
    return [lack.describe() for lack in lacks]


def test_settings_of_a_part_reach_its_actor_options():
    parts = plan(
        "sampler.gpus_per_replica=1",
        "sampler.resources_per_replica={h100: 0.5}",
        "sampler.node_labels={disk: 'in(ssd, nvme)'}",
        "rollout.node_labels={spot: '!no'}",
        "cluster.control_resources={driver: 0.3}",
        "cluster.control_node_labels={role: driver}",
    )
    assert parts.part(SAMPLER).actor_options() == {
        "num_cpus": 0.5,
        "num_gpus": 1,
        "resources": {"h100": 0.5},
        "label_selector": {"disk": "in(ssd, nvme)"},
    }
    assert parts.part(ROLLOUT).actor_options()["label_selector"] == {"spot": "!no"}
    assert parts.part(STORE).actor_options()["resources"] == {"driver": 0.3}
    # The buffer is pinned to the driver's node, whose labels are not asked about.
    assert (parts.part(BUFFER).resources, parts.part(BUFFER).labels) == ({"driver": 0.3}, {})
    assert parts.resources() == {"h100": 0.5, "driver": 0.6}


def test_a_cluster_that_is_large_enough_lacks_nothing():
    wanted = plan("sampler.gpus_per_replica=1", "learner.gpus_per_worker=1", "rollout.workers=4")
    assert lacking(wanted, [node(CPU=8.0), node(CPU=1.0, GPU=2.0)]) == []


def test_no_living_node_is_said():
    lacks = lacking(plan(), [node(alive=False, CPU=64.0)])
    assert {lack.part.name for lack in lacks} == {SAMPLER, ROLLOUT, LEARNER, STORE, BUFFER}
    assert all("no node is alive" in line for line in lines(lacks))


def test_labels_that_no_node_has_are_named():
    (lack,) = lacking(plan("sampler.node_labels={disk: ssd}"), [node(CPU=8.0, labels={"disk": "hdd"})])
    assert lack.describe() == "the policy server replica (0.5 CPU and disk=ssd): none of 1 nodes has the labels"
    assert lack.stops


def test_a_resource_that_no_node_has_enough_of_is_named():
    (lack,) = lacking(plan("learner.gpus_per_worker=4"), [node(CPU=8.0, GPU=2.0), node(CPU=8.0)])
    assert lack.describe() == "the learner (0.5 CPU, 4 GPU): 2 nodes, none with more than 2 GPU"


def test_processes_are_counted_node_by_node_not_in_sum():
    # 3 + 3 GPUs hold two samplers of 2 GPUs, although 6 would be enough for three.
    wanted = plan("sampler.replicas=3", "sampler.gpus_per_replica=2", "sampler.tensor_parallel_size=2")
    (lack,) = lacking(wanted, [node(CPU=8.0, GPU=3.0), node(CPU=8.0, GPU=3.0)])
    assert (lack.part.name, lack.missing) == (SAMPLER, 1)
    assert "1 of 3 policy server replicas" in lack.describe()


def test_parts_compete_for_the_same_nodes():
    (lack,) = lacking(plan("rollout.workers=4", "rollout.cpus_per_worker=1"), [node(CPU=4.0)])
    assert (lack.part.name, lack.missing, lack.stops) == (ROLLOUT, 1, False)
    assert "4 CPU in all, shared" in lack.describe()


def test_rollout_workers_leave_gpu_nodes_to_those_that_need_them():
    wanted = plan("rollout.workers=8", "rollout.cpus_per_worker=1", "sampler.gpus_per_replica=1")
    wide, small = node(CPU=16.0), node(CPU=1.0, GPU=1.0)
    assert lacking(wanted, [small, wide]) == []
    assert lacking(wanted, [wide, small]) == []


def test_a_run_starts_without_all_its_rollout_workers_but_not_without_any():
    wanted = plan("rollout.workers=3", "rollout.resources_per_worker={slot: 1}")
    (some,) = lacking(wanted, [node(CPU=8.0, slot=1.0)])
    assert (some.missing, some.stops) == (2, False)
    (none,) = lacking(wanted, [node(CPU=8.0)])
    assert (none.missing, none.stops) == (3, True)


@pytest.mark.parametrize(
    ("selector", "labels", "expected"),
    [
        ("a", {"k": "a"}, True),
        ("a", {"k": "b"}, False),
        ("a", {}, False),
        ("!a", {"k": "b"}, True),
        ("!a", {"k": "a"}, False),
        ("!a", {}, True),
        ("in(a, b)", {"k": "b"}, True),
        ("in(a,b)", {"k": "c"}, False),
        ("!in(a, b)", {"k": "c"}, True),
        ("!in(a, b)", {"k": "a"}, False),
        ("!in(a, b)", {}, True),
    ],
)
def test_selectors_mean_what_they_mean_to_ray(selector, labels, expected):
    assert validate_label_selector({"k": selector}) is None
    assert matches(labels, {"k": selector}) is expected


def test_many_processes_are_compared_at_once():
    wanted = plan("rollout.workers=4096", "rollout.cpus_per_worker=1")
    nodes = [node(f"n{i}", CPU=8.0) for i in range(256)]
    (lack,) = lacking(wanted, nodes)
    assert lack.part.name == ROLLOUT
    assert lack.missing == 4096 - (256 * 8 - 1)


def test_the_amounts_of_a_bundle_are_those_above_zero():
    assert Part("x", 1, 1, 0.0, 1.0, {"slot": 2.0}).bundle == {"GPU": 1.0, "slot": 2.0}


def test_scaling_by_load_makes_room_for_the_most_it_may_want():
    bounds = ("scaling.max_workers=6", "scaling.max_replicas=3")
    assert largest(load_preset("numberline-tiny", bounds)) == load_preset("numberline-tiny", bounds)
    wanted = resource_plan(largest(load_preset("numberline-tiny", (*bounds, "scaling.automatic=true"))))
    assert (wanted.part(ROLLOUT).count, wanted.part(SAMPLER).count) == (6, 3)


def test_rollout_workers_take_no_slots_of_a_run_s_own_cluster():
    alone, far = load_preset("numberline-tiny"), load_preset("numberline-tiny", ["cluster.address=auto"])
    assert resource_plan(as_placed(alone)).part(ROLLOUT).cpus == 0
    assert as_placed(far) == far
