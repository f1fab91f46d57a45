"""What Ray's own autoscaler makes of the cluster: which pods it brings for a run."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingReply, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest

from gflowvlm.cluster.launch.placement import resource_plan
from gflowvlm.run.preset_library import resolve_config
from gflowvlm.shared.config import RunConfig
from tests.k8s.manifests import build, cluster_spec, only

Demand = Mapping[str, float]


def job_config(folder: str) -> RunConfig:
    """The configuration of the run that the job of an overlay starts."""
    _, _, _, preset, *overrides = shlex.split(only(build(folder), "RayJob")["spec"]["entrypoint"])
    return resolve_config(preset, None, overrides)


def autoscale(folder: str, demands: Sequence[Demand], together: Sequence[Demand] = ()) -> SchedulingReply:
    """What autoscaler v2 launches on the empty cluster of an overlay.

    Args:
        folder: The overlay.
        demands: Actors that ask one by one.
        together: A placement group's bundles.
    """
    manifests = build(folder)
    cluster = {"metadata": {"name": "gflowvlm", "namespace": "gflowvlm"}, "spec": cluster_spec(manifests)}
    config = AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(cluster), skip_content_hash=True)
    gangs = [GangResourceRequest(requests=[ResourceRequestUtil.make(dict(d)) for d in together])] if together else []
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        idle_timeout_s=config.get_idle_timeout_s(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(dict(d)) for d in demands]),
        gang_resource_requests=gangs,
    )
    return ResourceDemandScheduler().schedule(request)


def launched(reply: SchedulingReply) -> dict[str, int]:
    """Pods by group."""
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def demands_of(config: RunConfig) -> dict[str, list[dict[str, Any]]]:
    """What each part of a run asks for, as often as it asks."""
    return {part.name: [part.bundle] * part.count for part in resource_plan(config).parts if part.bundle}


@pytest.mark.parametrize("overlay", ["gpu", "spot"])
def test_every_part_of_the_7b_run_gets_pods_of_its_own_group(overlay: str) -> None:
    parts = demands_of(job_config(f"overlays/{overlay}/job"))
    samplers, rollouts, learners = (parts[p] for p in ("policy server replica", "rollout worker", "learner"))
    cluster = f"overlays/{overlay}/cluster"
    assert launched(autoscale(cluster, [{"driver": 1}])) == {"driver": 1}
    assert launched(autoscale(cluster, samplers)) == {"sampler": 2}
    assert launched(autoscale(cluster, rollouts)) == {"rollout": 1}
    assert launched(autoscale(cluster, [], learners)) == {"learner": 1}
    everything = {"driver": 1, "sampler": 2, "rollout": 1, "learner": 1}
    assert launched(autoscale(cluster, [{"driver": 1}, *samplers, *rollouts], learners)) == everything
    # What a run asks for before its parts are started.
    assert launched(autoscale(cluster, [{"driver": 1}], [*samplers, *rollouts[:1], *learners])) == everything


def test_more_rollout_workers_and_samplers_scale_their_groups_alone() -> None:
    parts = demands_of(job_config("overlays/spot/job"))
    wanted = 4 * parts["policy server replica"] + 16 * parts["rollout worker"]
    assert launched(autoscale("overlays/spot/cluster", wanted)) == {"sampler": 8, "rollout": 16}


def test_what_no_group_can_give_is_called_infeasible() -> None:
    reply = autoscale("overlays/gpu/cluster", [{"GPU": 16}])
    assert launched(reply) == {}
    assert len(reply.infeasible_resource_requests) == 1


def test_the_default_run_fits_the_one_pod_of_the_dev_overlay() -> None:
    parts = demands_of(job_config("overlays/dev/job"))
    together = parts.pop("learner")
    reply = autoscale("overlays/dev/cluster", [{"driver": 1}, *(d for part in parts.values() for d in part)], together)
    assert launched(reply) == {"all-parts": 1}
    assert (list(reply.infeasible_resource_requests), list(reply.infeasible_gang_resource_requests)) == ([], [])
