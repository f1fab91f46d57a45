"""What is installed, what works on this machine, and what to do about the rest.

Whatever imports large packages is tried in a process of its own: a broken installation can crash it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gflowvlm.cluster.launch.machine import GIB, memory_limit, versions
from gflowvlm.cluster.launch.process_environment import package_path
from gflowvlm.cluster.launch.ray_folder import check_ray_folder, is_free, ray_folder
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.findings import Check, Status

PROBE_TIMEOUT_S = 120.0
NEEDED_DISK_GIB = 1.0
COMFORTABLE_DISK_GIB = 5.0
NEEDED_MEMORY_GIB = 4.0
COMFORTABLE_MEMORY_GIB = 8.0
FULL_DISK_SHARE = 0.95
"""Above this Ray refuses to spill objects to disk."""

SET_UP = "run `make setup`"

_NOT_INSTALLED = 3
_IS_INSTALLED = f"""
import importlib.util, json, sys
if importlib.util.find_spec({{name!r}}) is None:
    sys.exit({_NOT_INSTALLED})
"""
_TORCH = """
import json, torch
torch.ones(2, 2) @ torch.ones(2, 2)
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(json.dumps({"gpus": [torch.cuda.get_device_name(i) for i in range(count)], "threads": torch.get_num_threads()}))
"""
_TORCHVISION = """
import torchvision.transforms.v2
print(json.dumps({"version": torchvision.__version__}))
"""
# The kernels are what differs between processors; importing the rest of the engine takes long and adds nothing.
_VLLM = """
from vllm.platforms import current_platform
current_platform.import_kernels()
print(json.dumps({"platform": current_platform.device_type}))
"""
_RAY = """
import json, ray, ray.serve, ray.train
print(json.dumps({"version": ray.__version__}))
"""
_MODEL = """
import json, sys
from gflowvlm.run.models import resolve_model
from gflowvlm.shared.policy_inputs import PolicyInputs
path = resolve_model(sys.argv[1])
inputs = PolicyInputs.load(path)
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(path)
print(json.dumps({"parameters": model.num_parameters(), "done_id": inputs.done_id}))
"""
_RAY_START = """
import json, sys, urllib.error, urllib.request
from ray.job_submission import JobSubmissionClient
from gflowvlm.cluster.launch.ray_runtime import ray_cluster
from gflowvlm.shared.config import RunConfig
with ray_cluster(RunConfig.model_validate_json(sys.argv[1])) as address:
    url = "http://" + address
    JobSubmissionClient(url).list_jobs()  # sends the token
    try:
        with urllib.request.urlopen(url + "/api/version", timeout=10):
            protected = False
    except urllib.error.HTTPError as refusal:
        protected = refusal.code == 401
print(json.dumps({"url": url, "protected": protected}))
"""


@dataclass(frozen=True)
class ProbeResult:
    """What a process that tried something left.

    Attributes:
        code: Exit status; negative when a signal ended it, None at the timeout.
        values: The JSON object on its last line of output, {} on failure.
        error: The last line of its errors.
    """

    code: int | None
    values: dict[str, Any]
    error: str


def probe(code: str, *arguments: str, timeout_s: float = PROBE_TIMEOUT_S) -> ProbeResult:
    """Runs Python code in a process of its own, with the project importable and nothing downloaded."""
    environment = {**os.environ, "PYTHONPATH": package_path(), "HF_HUB_OFFLINE": "1"}
    try:
        process = subprocess.run(
            [sys.executable, "-P", "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=environment,
            cwd=tempfile.gettempdir(),
        )
    except subprocess.TimeoutExpired:
        return ProbeResult(None, {}, f"no answer in {timeout_s:.0f} s; is the machine busy? then try again")
    errors = process.stderr.strip().splitlines()
    last = errors[-1].strip() if errors else f"exit status {process.returncode}"
    last = last.removeprefix("gflowvlm.shared.errors.UserError: ")
    if process.returncode != 0:
        return ProbeResult(process.returncode, {}, last)
    return ProbeResult(0, json.loads(process.stdout.strip().splitlines()[-1]), "")


def run_checks(config: RunConfig, folder: Path, *, start_ray: bool = False) -> list[Check]:
    """Runs every check.

    Args:
        config: The run that should work.
        folder: Where its run folder would stand.
        start_ray: Whether to start a small local Ray, too, and read its dashboard.
    """
    checks: list[Callable[[], Check | Iterable[Check]]] = [
        check_vllm,
        check_ray,
        lambda: check_model(config.policy.model),
        check_torch,
        check_torchvision,
    ]
    # Two at a time, the slowest first: enough for two cores.
    with ThreadPoolExecutor(max_workers=2) as pool:
        pending = [pool.submit(check) for check in checks]
        found = [f.result() for f in pending]
    probed = [c for result in found for c in ([result] if isinstance(result, Check) else result)]
    quick = [
        check_packages(),
        check_disk(folder),
        check_memory(),
        check_shared_memory(config),
        check_folder_of_ray(),
        check_dashboard_port(),
    ]
    started = [check_ray_start(config)] if start_ray else []
    return [quick[0], *probed[::-1], *quick[1:], *started]


def check_packages() -> Check:
    """Looks whether everything is installed."""
    missing = [name for name, version in versions().items() if version is None]
    if missing:
        return Check("packages", Status.BROKEN, f"not installed: {', '.join(missing)}", SET_UP)
    return Check("packages", Status.OK, "all installed")


def check_torch() -> list[Check]:
    """Computes something with torch, and looks for GPUs."""
    result = probe(_TORCH)
    if result.code != 0:
        return [Check("torch", Status.BROKEN, result.error, f"{SET_UP}, or remove .venv and {SET_UP}")]
    gpus = result.values["gpus"]
    if gpus:
        gpu = Check("gpu", Status.OK, f"{len(gpus)} x {gpus[0]}")
    else:
        advice = "the default run needs none; for numberline-7b set cluster.address to a Ray cluster with GPUs"
        gpu = Check("gpu", Status.NOTE, "none", advice)
    return [gpu, Check("torch", Status.OK, f"computes, {result.values['threads']} thread(s)")]


def check_torchvision() -> Check:
    """Looks for a torchvision that is installed and does not fit torch: it breaks transformers and vLLM."""
    result = probe(_IS_INSTALLED.format(name="torchvision") + _TORCHVISION)
    if result.code == _NOT_INSTALLED:
        return Check("torchvision", Status.OK, "absent: not needed by the shipped models, but by most real ones")
    if result.code != 0:
        remove = "`python -m pip uninstall -y torchvision torchaudio torchcodec`"
        return Check("torchvision", Status.BROKEN, f"does not fit torch: {result.error}", f"{SET_UP}, or {remove}")
    return Check("torchvision", Status.OK, f"{result.values['version']} works")


def check_vllm() -> Check:
    """Imports vLLM and loads its kernels."""
    way_out = "sampler.engine=transformers samples without vLLM"
    result = probe(_IS_INSTALLED.format(name="vllm") + _VLLM)
    if result.code == _NOT_INSTALLED:
        return Check("vllm", Status.BROKEN, "not installed", f"{SET_UP}; {way_out}")
    if result.code != 0:
        crashed = f"crashed (signal {-result.code})" if result.code is not None and result.code < 0 else result.error
        return Check("vllm", Status.BROKEN, crashed, f"{SET_UP}; {way_out}")
    return Check("vllm", Status.OK, f"imports, platform {result.values['platform']}")


def check_ray() -> Check:
    """Imports Ray with Serve and Train."""
    result = probe(_RAY)
    if result.code != 0:
        return Check("ray", Status.BROKEN, result.error, SET_UP)
    return Check("ray", Status.OK, "imports, with Serve and Train")


def check_model(name: str) -> Check:
    """Loads the run's model, and tells whether `[DONE]` is one token of it."""
    result = probe(_MODEL, name)
    if result.code != 0:
        advice = "check the checkout (`git status`) or the installation; `gflowvlm sft` makes the model again"
        return Check("model", Status.BROKEN, f"{name}: {result.error}", advice)
    parameters = result.values["parameters"] / 1e6
    done = result.values["done_id"]
    stop = "[DONE] is written in several tokens" if done is None else f"[DONE] is token {done}"
    return Check("model", Status.OK, f"{name} loads: {parameters:.2f} M parameters, {stop}")


def check_disk(folder: Path) -> Check:
    """Looks for room for the run's folder and for Ray's files."""
    if not os.access(folder, os.W_OK):
        return Check("disk", Status.BROKEN, f"{folder} is not writable", "change to a writable folder or use --run DIR")
    free = shutil.disk_usage(folder).free / GIB
    temporary = shutil.disk_usage(tempfile.gettempdir())
    detail = f"{free:.0f} GiB free here" if free >= 10 else f"{free:.1f} GiB free here"
    if free < NEEDED_DISK_GIB:
        return Check("disk", Status.BROKEN, detail, f"free {NEEDED_DISK_GIB:.0f} GiB or use --run DIR on another disk")
    if temporary.used / (temporary.used + temporary.free) > FULL_DISK_SHARE:
        advice = "above 95 % Ray cannot spill objects: make room, or put RAY_TMPDIR on another disk"
        return Check("disk", Status.NOTE, f"{detail}, {tempfile.gettempdir()} nearly full", advice)
    if free < COMFORTABLE_DISK_GIB:
        return Check("disk", Status.NOTE, detail, "enough for a default run; longer runs keep more trajectories")
    return Check("disk", Status.OK, detail)


def check_memory() -> Check:
    """Looks at the memory that is available now."""
    available = min(psutil.virtual_memory().available, memory_limit()) / GIB
    detail = f"{available:.1f} GiB available of {memory_limit() / GIB:.1f} GiB"
    if available < NEEDED_MEMORY_GIB:
        return Check("memory", Status.BROKEN, detail, "close programs: the default run takes several GiB")
    if available < COMFORTABLE_MEMORY_GIB:
        return Check("memory", Status.NOTE, detail, f"tight: runs are tried with {COMFORTABLE_MEMORY_GIB:.0f} GiB")
    return Check("memory", Status.OK, detail)


def check_shared_memory(config: RunConfig) -> Check:
    """Looks whether Ray's object store fits into /dev/shm."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return Check("/dev/shm", Status.NOTE, "not there", "Ray uses the disk instead, which is slower")
    free, wanted = shutil.disk_usage(shared).free / 2**20, config.cluster.object_store_mib
    detail = f"{free / 1024:.1f} GiB free, {wanted} MiB wanted"
    if free < wanted:
        return Check("/dev/shm", Status.NOTE, detail, "Ray falls back to the disk; in Docker give --shm-size=1g")
    return Check("/dev/shm", Status.OK, detail)


def check_folder_of_ray() -> Check:
    """Looks whether a local Ray can make its sockets and logs."""
    try:
        check_ray_folder()
    except UserError as error:
        found, _, advice = str(error).removeprefix("Ray cannot start: ").rpartition("; ")
        return Check("ray folder", Status.BROKEN, found, advice)
    return Check("ray folder", Status.OK, f"{ray_folder()} can be used")


def check_dashboard_port(port: int = 8265) -> Check:
    """Looks whether the dashboard's usual port is free."""
    if is_free(port):
        return Check(f"port {port}", Status.OK, "free for the dashboard")
    return Check(f"port {port}", Status.NOTE, "in use (another Ray?)", "a run takes the next free port and prints it")


def check_ray_start(config: RunConfig) -> Check:
    """Starts a local Ray as a run would, and reads the dashboard with Ray's token."""
    result = probe(_RAY_START, config.model_dump_json(), timeout_s=120.0)
    if result.code != 0:
        advice = f"see {ray_folder()}/session_latest/logs; RAY_AUTH_MODE=disabled if the token is what is refused"
        return Check("ray start", Status.BROKEN, result.error, advice)
    token = "answers with the token only" if result.values["protected"] else "answers without a token"
    return Check("ray start", Status.OK, f"starts; the dashboard at {result.values['url']} {token}")
