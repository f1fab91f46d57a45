"""The manifests as kustomize builds them."""

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
RAY_SCHEMAS = ROOT.parent / "shared" / "k8s-schemas"
CLUSTERS = ("overlays/dev/cluster", "overlays/gpu/cluster", "overlays/spot/cluster")
JOBS = ("overlays/dev/job", "overlays/gpu/job", "overlays/spot/job")
SERVICES = ("overlays/dev/serve", "overlays/gpu/serve")
BUILDS = (*CLUSTERS, *JOBS, *SERVICES, "warm-start")

Manifest = dict[str, Any]


def tool(name: str) -> str:
    """Path of a command beside this Python or on PATH; skips the test where there is none."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here")
    return found


@cache
def _built(kustomize: str, folder: str) -> str:
    done = subprocess.run([kustomize, "kustomize", str(K8S / folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(folder: str) -> list[Manifest]:
    """The resources of `k8s/FOLDER`, built by kubectl's kustomize."""
    return [m for m in yaml.load_all(_built(tool("kubectl"), folder), yaml.CSafeLoader) if m is not None]


def only(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The one resource of a kind, or of a kind and a name."""
    (found,) = [m for m in manifests if m["kind"] == kind and name in (None, m["metadata"]["name"])]
    return found


def cluster_spec(manifests: list[Manifest]) -> Manifest:
    """The spec of the RayCluster that the resources ask for, also inside a RayJob or a RayService."""
    jobs = [m["spec"]["rayClusterSpec"] for m in manifests if m["kind"] == "RayJob"]
    services = [m["spec"]["rayClusterConfig"] for m in manifests if m["kind"] == "RayService"]
    clusters = [m["spec"] for m in manifests if m["kind"] == "RayCluster"]
    (spec,) = jobs + services + clusters
    return spec


def worker_groups(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The worker groups by name."""
    return {group["groupName"]: group for group in cluster_spec(manifests)["workerGroupSpecs"]}


def pod_templates(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Every pod template of the resources, by where it stands."""
    found = {}
    for manifest in manifests:
        kind, spec = manifest["kind"], manifest.get("spec", {})
        if kind in ("Job", "StatefulSet"):
            found[f"{kind} {manifest['metadata']['name']}"] = spec["template"]
        if kind == "RayJob":
            found["submitter"] = spec["submitterPodTemplate"]
    if any(m["kind"] in ("RayCluster", "RayJob", "RayService") for m in manifests):
        found["head"] = cluster_spec(manifests)["headGroupSpec"]["template"]
        found |= {name: group["template"] for name, group in worker_groups(manifests).items()}
    return found
