"""The machine and the versions that figures were measured on."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

GIB = 2**30
PACKAGES = ("torch", "vllm", "ray", "transformers", "peft")


def versions() -> dict[str, str | None]:
    """Returns the installed version of Python and of every package that matters; None when missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        # The wheel for machines without a GPU has another name and the same import package.
        candidates = (name, f"{name}-cpu") if name == "vllm" else (name,)
        found[name] = next((v for v in map(_version, candidates) if v is not None), None)
    return found


def machine() -> dict[str, Any]:
    """Returns ``cores`` and ``memory_gib`` as far as this process may use them, ``processor`` and ``platform``."""
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory_limit() / GIB, 1),
        "processor": _processor(),
        "platform": platform.platform(),
    }


def machine_lines() -> str:
    """Returns machine and versions as two lines of text."""
    facts = machine()
    packages = ", ".join(f"{name} {version or '-'}" for name, version in versions().items())
    return f"{facts['cores']} cores, {facts['memory_gib']} GiB, {facts['processor']}\n{packages}"


def memory_limit() -> int:
    """Returns the memory this process may use at most, bytes: a container's limit or all there is."""
    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
