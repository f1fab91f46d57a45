"""The service: the application that it names exists and takes these arguments, on pods that may only read."""

import inspect
from importlib import import_module

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from gflowvlm.cluster.serving.served_policy import API_KEY_VARIABLE, ServeArguments
from gflowvlm.run.preset_library import resolve_config
from tests.k8s.manifests import SERVICES, Manifest, build, cluster_spec, only, pod_templates, worker_groups
from tests.k8s.test_autoscaling import autoscale, job_config, launched


def serve_config(folder: str) -> Manifest:
    """The Serve configuration of an overlay."""
    return yaml.safe_load(only(build(folder), "RayService")["spec"]["serveConfigV2"])


def arguments(folder: str) -> ServeArguments:
    """What the application of an overlay is called with."""
    (application,) = serve_config(folder)["applications"]
    return ServeArguments.model_validate(application["args"])


@pytest.mark.parametrize("folder", SERVICES)
def test_ray_serve_accepts_the_configuration_and_finds_the_application(folder: str) -> None:
    (application,) = ServeDeploySchema.model_validate(serve_config(folder)).applications
    module, _, name = application.import_path.partition(":")
    (parameter,) = inspect.signature(getattr(import_module(module), name)).parameters.values()
    assert parameter.annotation is ServeArguments
    assert arguments(folder).require_api_key is True


@pytest.mark.parametrize("overlay", ["dev", "gpu"])
def test_what_is_served_is_what_the_job_of_the_same_overlay_trains(overlay: str) -> None:
    entrypoint = only(build(f"overlays/{overlay}/job"), "RayJob")["spec"]["entrypoint"]
    assert arguments(f"overlays/{overlay}/serve").policy in entrypoint.split()


def test_replicas_of_the_7b_policy_get_a_sampler_pod_each_and_there_are_no_other_groups() -> None:
    assert set(worker_groups(build("overlays/gpu/serve"))) == {"sampler"}
    sampler = job_config("overlays/gpu/job").sampler
    replicas = arguments("overlays/gpu/serve").replicas
    assert replicas is not None
    demands = [{"CPU": sampler.cpus_per_replica, "GPU": sampler.gpus_per_replica}] * replicas
    assert launched(autoscale("overlays/gpu/serve", demands)) == {"sampler": replicas}


def test_the_replica_of_the_default_policy_fits_the_one_pod_of_the_dev_overlay() -> None:
    sampler = resolve_config("numberline-tiny", None, []).sampler
    reply = autoscale("overlays/dev/serve", [{"CPU": sampler.cpus_per_replica}])
    assert launched(reply) == {"all-parts": 1}


@pytest.mark.parametrize("folder", SERVICES)
def test_the_runs_can_only_be_read_and_nothing_is_downloaded(folder: str) -> None:
    manifests = build(folder)
    of_ray = {n: t["spec"] for n, t in pod_templates(manifests).items() if n in {"head", *worker_groups(manifests)}}
    assert len(of_ray) == 2
    for name, spec in of_ray.items():
        (claim,) = [v["persistentVolumeClaim"] for v in spec["volumes"] if "persistentVolumeClaim" in v]
        assert claim["readOnly"] is True, name
        mounts = [m for c in spec["containers"] for m in c["volumeMounts"] if m["name"] == "runs"]
        assert [m["readOnly"] for m in mounts] == [True], name
        variables = {e["name"]: e for e in spec["containers"][0]["env"]}
        assert variables["HF_HUB_OFFLINE"]["value"] == "1", name
        assert "HF_TOKEN" not in variables, name
    https = only(manifests, "NetworkPolicy", "https-out")["spec"]["podSelector"]["matchLabels"]
    assert https["ray.io/node-type"] == "head"


@pytest.mark.parametrize("folder", SERVICES)
def test_only_replicas_have_the_key_and_a_pod_without_it_does_not_start(folder: str) -> None:
    manifests = build(folder)
    with_key = {}
    for name, template in pod_templates(manifests).items():
        for entry in template["spec"]["containers"][0].get("env", []):
            if entry["name"] == API_KEY_VARIABLE:
                with_key[name] = entry["valueFrom"]["secretKeyRef"]
    assert set(with_key) == set(worker_groups(manifests))
    assert all(not reference.get("optional", False) for reference in with_key.values())


@pytest.mark.parametrize("folder", SERVICES)
def test_clients_reach_the_port_that_serve_listens_on_at_the_pods_with_replicas(folder: str) -> None:
    manifests = build(folder)
    port = serve_config(folder)["http_options"]["port"]
    templates = {n: t for n, t in pod_templates(manifests).items() if n in {"head", *worker_groups(manifests)}}
    for name, template in templates.items():
        ports = {p["name"]: p["containerPort"] for p in template["spec"]["containers"][0]["ports"]}
        assert ports["serve"] == port, name
    assert only(manifests, "RayService")["spec"]["excludeHeadPodFromServeSvc"] is True
    clients = only(manifests, "NetworkPolicy", "from-policy-clients")["spec"]
    assert clients["podSelector"]["matchLabels"]["ray.io/node-type"] == "worker"
    (rule,) = clients["ingress"]
    assert rule["ports"] == [{"port": port, "protocol": "TCP"}]
    assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"gflowvlm.io/policy-client": "true"}}}]


@pytest.mark.parametrize("folder", SERVICES)
def test_the_cluster_is_as_locked_as_the_training_cluster(folder: str) -> None:
    spec = cluster_spec(build(folder))
    trained = cluster_spec(build(folder.replace("/serve", "/cluster")))
    assert spec["authOptions"] == trained["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == trained["rayVersion"]
    assert spec.get("gcsFaultToleranceOptions") == trained.get("gcsFaultToleranceOptions")
    budgets = {m["metadata"]["name"] for m in build(folder) if m["kind"] == "PodDisruptionBudget"}
    assert not budgets & {"driver", "learner"}
