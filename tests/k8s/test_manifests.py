"""What `kubectl kustomize` makes of k8s/: valid for Kubernetes and KubeRay, locked down, and consistent in itself."""

import re
import shlex
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from gflowvlm.cli.main import app
from gflowvlm.run.preset_library import resolve_config
from tests.k8s.manifests import (
    BUILDS,
    CLUSTERS,
    JOBS,
    K8S,
    RAY_SCHEMAS,
    ROOT,
    SERVICES,
    Manifest,
    build,
    cluster_spec,
    only,
    pod_templates,
    worker_groups,
)

# The oldest that KubeRay's and our fields need, and the newest known here.
KUBERNETES_VERSIONS = ("1.29", "1.37")
PREEMPTIBLE_NODES = (
    {"cloud.google.com/gke-spot": "true"},
    {"eks.amazonaws.com/capacityType": "SPOT"},
    {"karpenter.sh/capacity-type": "spot"},
    {"kubernetes.azure.com/scalesetpriority": "spot"},
)
ORDINARY_NODES: tuple[dict[str, str], ...] = (
    {},
    {"eks.amazonaws.com/capacityType": "ON_DEMAND"},
    {"karpenter.sh/capacity-type": "on-demand"},
)


def unknown_keys_refused(schema: Any) -> Any:
    """The same schema, refusing the fields that a Kubernetes API server would drop without a word."""
    if isinstance(schema, list):
        return [unknown_keys_refused(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: unknown_keys_refused(value) for key, value in schema.items()}
    open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields") is True
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        changed["additionalProperties"] = False
    return changed


@cache
def ray_validator(kind: str) -> Any:
    file = RAY_SCHEMAS / f"ray.io_{kind.lower()}s.yaml"
    if not file.exists():
        pytest.skip(f"KubeRay's schemas are not here ({file})")
    versions = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"]
    top = unknown_keys_refused(schema)
    top["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(top)


def check_with_kuberay(manifest: Manifest) -> list[str]:
    errors = ray_validator(manifest["kind"]).iter_errors(manifest)
    return [f"{error.json_path}: {error.message[:200]}" for error in errors]


KINDS = {
    **dict.fromkeys(CLUSTERS, "RayCluster"),
    **dict.fromkeys(JOBS, "RayJob"),
    **dict.fromkeys(SERVICES, "RayService"),
}


@pytest.mark.parametrize("folder", KINDS)
def test_ray_resources_follow_kuberays_schema(folder: str) -> None:
    of_ray = [m for m in build(folder) if m["apiVersion"] == "ray.io/v1"]
    assert [m["kind"] for m in of_ray] == [KINDS[folder]]
    assert [check_with_kuberay(m) for m in of_ray] == [[]]


def test_a_misspelt_field_would_be_seen() -> None:
    job = yaml.safe_load(yaml.safe_dump(only(build("overlays/gpu/job"), "RayJob")))
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["securityContexts"] = {}
    (error,) = check_with_kuberay(job)
    assert "securityContexts" in error


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("folder", [*JOBS, *SERVICES, "warm-start"])
def test_kubernetes_own_resources_follow_its_schema(folder: str, version: str) -> None:
    own = [m for m in build(folder) if "." not in m["apiVersion"].split("/")[0] or "k8s.io" in m["apiVersion"]]
    assert own
    for manifest in own:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("folder", [*JOBS, *SERVICES])
def test_pod_templates_inside_ray_resources_follow_kubernetes_schema(folder: str, version: str) -> None:
    for name, template in pod_templates(build(folder)).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
        try:
            kubernetes_validate.validate(pod, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{name}: {error}")


@pytest.mark.parametrize("folder", BUILDS)
def test_every_pod_meets_the_restricted_standard_with_a_read_only_root(folder: str) -> None:
    for name, template in pod_templates(build(folder)).items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        allowed = {"emptyDir", "persistentVolumeClaim"}
        assert all(set(volume) - {"name"} <= allowed for volume in spec.get("volumes", [])), name
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert all("hostPort" not in port for port in container.get("ports", [])), name


@pytest.mark.parametrize("folder", BUILDS)
def test_every_container_has_limits_and_all_the_memory_it_may_use(folder: str) -> None:
    for name, template in pod_templates(build(folder)).items():
        for container in template["spec"]["containers"]:
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]) & set(resources["limits"]), name
            if name not in ("submitter", "StatefulSet redis"):
                assert resources["requests"]["memory"] == resources["limits"]["memory"], name


@pytest.mark.parametrize("folder", BUILDS)
def test_secrets_come_by_reference_only(folder: str) -> None:
    manifests = build(folder)
    assert not any(m["kind"] == "Secret" for m in manifests)
    for name, template in pod_templates(manifests).items():
        for container in template["spec"]["containers"]:
            secret = [e for e in container.get("env", []) if re.search("TOKEN|PASSWORD|SECRET|KEY", e["name"])]
            assert all(set(e) == {"name", "valueFrom"} and "secretKeyRef" in e["valueFrom"] for e in secret), name


@pytest.mark.parametrize("folder", [*CLUSTERS, *JOBS, *SERVICES])
def test_only_the_head_gets_a_token_of_kubernetes(folder: str) -> None:
    manifests = build(folder)
    assert not any("Role" in m["kind"] for m in manifests)
    accounts = {
        m["metadata"]["name"]: m["automountServiceAccountToken"] for m in manifests if m["kind"] == "ServiceAccount"
    }
    for name, template in pod_templates(manifests).items():
        spec = template["spec"]
        mounted = spec.get("automountServiceAccountToken", accounts[spec["serviceAccountName"]])
        assert mounted is (name == "head"), name


@pytest.mark.parametrize("folder", [*CLUSTERS, *JOBS, *SERVICES])
def test_nothing_is_reached_or_reaches_out_by_default_and_all_pods_are_under_the_policies(folder: str) -> None:
    manifests = build(folder)
    deny = only(manifests, "NetworkPolicy", "default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    within = only(manifests, "NetworkPolicy", "within-gflowvlm")["spec"]["podSelector"]["matchLabels"]
    for name, template in pod_templates(manifests).items():
        assert within.items() <= template["metadata"]["labels"].items(), name


@pytest.mark.parametrize("folder", CLUSTERS)
def test_the_cluster_asks_for_tokens_autoscales_and_runs_the_pinned_ray(folder: str) -> None:
    spec = cluster_spec(build(folder))
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={spec['rayVersion']}" in pins
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in spec["workerGroupSpecs"])


@pytest.mark.parametrize("folder", BUILDS)
def test_claims_and_images_are_named_the_same_everywhere(folder: str) -> None:
    manifests = build(folder)
    templates = pod_templates(manifests)
    claims = {
        v["persistentVolumeClaim"]["claimName"]
        for t in templates.values()
        for v in t["spec"].get("volumes", [])
        if "persistentVolumeClaim" in v
    }
    assert claims == {only(build("overlays/gpu/cluster"), "PersistentVolumeClaim")["metadata"]["name"]}
    images = {c["image"] for t in templates.values() for c in t["spec"]["containers"]} - {"redis:7.2-bookworm"}
    assert images == {"gflowvlm-cpu:0.1.0" if "dev" in folder else "gflowvlm-gpu:0.1.0"}


@pytest.mark.parametrize("folder", ["overlays/gpu/cluster", "overlays/spot/job"])
def test_disruption_budgets_are_of_the_only_kind_that_pods_of_a_ray_cluster_can_have(folder: str) -> None:
    manifests = build(folder)
    groups = {*worker_groups(manifests), "headgroup"}
    guarded = {}
    for budget in (m for m in manifests if m["kind"] == "PodDisruptionBudget"):
        assert isinstance(budget["spec"]["minAvailable"], int)
        assert "maxUnavailable" not in budget["spec"]
        labels = budget["spec"]["selector"]["matchLabels"]
        guarded[budget["metadata"]["name"]] = labels.get("ray.io/group", labels.get("ray.io/node-type", "redis"))
    assert guarded == {n: n for n in ("driver", "learner", "sampler", "head", "redis")}
    assert {"driver", "learner", "sampler"} <= groups


def admits(template: Manifest, node: dict[str, str]) -> bool:
    """Whether the required node affinity lets the pod onto a node with these labels."""
    affinity = template["spec"].get("affinity", {}).get("nodeAffinity", {})
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is None:
        return True
    fits = {
        "In": lambda e: node.get(e["key"]) in e["values"],
        "NotIn": lambda e: node.get(e["key"]) not in e["values"],
    }
    return any(all(fits[e["operator"]](e) for e in term["matchExpressions"]) for term in required["nodeSelectorTerms"])


@pytest.mark.parametrize("folder", ["overlays/spot/cluster", "overlays/spot/job"])
def test_on_spot_only_rollout_workers_are_on_nodes_that_can_be_taken_away(folder: str) -> None:
    manifests = build(folder)
    of_ray = {n: t for n, t in pod_templates(manifests).items() if n in {"head", *worker_groups(manifests)}}
    assert set(of_ray) == {"head", "driver", "rollout", "sampler", "learner"}
    for name, template in of_ray.items():
        assert [admits(template, node) for node in PREEMPTIBLE_NODES] == [name == "rollout"] * 4, name
        assert [admits(template, node) for node in ORDINARY_NODES] == [name != "rollout"] * 3, name


def test_gcs_fault_tolerance_is_in_the_gpu_overlays_with_its_password_by_reference() -> None:
    for folder in ("overlays/gpu/job", "overlays/spot/cluster"):
        manifests = build(folder)
        options = cluster_spec(manifests)["gcsFaultToleranceOptions"]
        service = only(manifests, "Service", "redis")
        assert options["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
        env = only(manifests, "StatefulSet", "redis")["spec"]["template"]["spec"]["containers"][0]["env"]
        assert options["redisPassword"]["valueFrom"] == env[0]["valueFrom"]
    assert "gcsFaultToleranceOptions" not in cluster_spec(build("overlays/dev/cluster"))


@pytest.mark.parametrize("folder", JOBS)
def test_the_job_starts_a_run_that_exists_on_a_pod_that_exists(folder: str) -> None:
    manifests = build(folder)
    job = only(manifests, "RayJob")["spec"]
    command, run, option, preset, *overrides = shlex.split(job["entrypoint"])
    config = resolve_config(preset, None, overrides)
    assert (command, option) == ("train-or-resume", "--preset")
    assert (K8S / "docker" / command).exists()
    assert run == f"/runs/{config.name}"
    assert config.cluster.address == "auto"
    (wanted,) = yaml.safe_load(job["entrypointResources"])
    assert [g for g in worker_groups(manifests).values() if g.get("resources", {}).get(wanted) == "1"]
    head = cluster_spec(manifests)["headGroupSpec"]
    assert head["resources"] == {"CPU": "0"}


def test_the_warm_start_makes_the_model_that_the_job_trains() -> None:
    (container,) = pod_templates(build("warm-start"))["Job gflowvlm-warm-start"]["spec"]["containers"]
    program, name, *arguments = container["args"]
    sft = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    options = sft.make_context(name, arguments).params
    entrypoint = shlex.split(only(build("overlays/gpu/job"), "RayJob")["spec"]["entrypoint"])
    assert program == "gflowvlm"
    assert f"policy.model={options['out']}" in entrypoint
