"""Set-up: what `make` decides to do, which engine it picks, and the repair of a torchvision that does not work."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORKS = "import torch\n"
# Fails the way the CUDA build does next to a CPU torch: its library does not load, and its operators have no schemas.
NEEDS_CUDA = (
    "import torch\nfrom torchvision import extension\n"
    "torch.library.register_fake('torchvision::nms')(lambda dets, scores, iou_threshold: dets)\n"
)
BROKEN = "raise RuntimeError('made for another torch')\n"


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs make in a folder."""
    command = [str(shutil.which("make")), *arguments]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the Makefile and its inputs; the set-up script is replaced by one that only counts its calls."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "set_up.py").write_text(
        "import sys, pathlib\npathlib.Path('.venv').mkdir(exist_ok=True)\n"
        "open('calls', 'a').write(sys.argv[-1] + '\\n')\n"
    )
    return tmp_path


@pytest.fixture
def set_up() -> ModuleType:
    """The set-up script as a module of its own."""
    spec = importlib.util.spec_from_file_location("set_up_under_test", ROOT / "scripts" / "set_up.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_second_make_setup_does_nothing_and_a_new_constraint_does_it_again(project: Path) -> None:
    for _ in range(2):
        assert make(project, "setup", f"PYTHON={sys.executable}").returncode == 0
    assert (project / "calls").read_text() == "auto\n"
    stamp = project / ".venv" / ".set-up-auto"
    later = stamp.stat().st_mtime + 10
    os.utime(project / "constraints.txt", (later, later))
    assert make(project, "setup", f"PYTHON={sys.executable}").returncode == 0
    assert (project / "calls").read_text() == "auto\nauto\n"


def test_failed_set_up_is_not_taken_for_done(project: Path) -> None:
    (project / "scripts" / "set_up.py").write_text("raise SystemExit(2)\n")
    assert make(project, "setup", f"PYTHON={sys.executable}").returncode != 0
    assert make(project, "-q", "setup", f"PYTHON={sys.executable}").returncode == 1


def test_missing_python_is_said_in_words(project: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "bash", "touch", "sed"):
        (tools / name).symlink_to(str(shutil.which(name)))
    done = make(project, "setup", PATH=str(tools))
    assert done.returncode != 0
    assert "no Python 3.11 or later found" in done.stderr
    assert not (project / "calls").exists()


def test_help_is_the_default_and_lists_every_target(project: Path) -> None:
    told = make(project).stdout
    for target in ("setup", "train", "test", "test-fast", "lint", "format", "bench", "help"):
        assert f"make {target} " in told


def test_arguments_reach_the_command(project: Path) -> None:
    told = make(project, "-n", "train", "ARGS=--preset numberline-7b train.steps=3").stdout
    assert ".venv/bin/gflowvlm train --preset numberline-7b train.steps=3" in told


@pytest.mark.parametrize(
    ("script", "engine"),
    [("echo 'GPU 0: NVIDIA H100'", "gpu"), ("echo 'No devices were found'; exit 6", "cpu")],
)
def test_engine_follows_what_nvidia_smi_lists(
    set_up: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, engine: str
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert set_up.choose_engine("auto") == engine
    assert set_up.choose_engine("none") == "none"


def test_planner_is_compiled_without_what_is_for_debuggers(set_up: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[str] = []
    monkeypatch.setenv("LDFLAGS", "-L/opt/lib")
    monkeypatch.setattr(set_up, "pip_or_stop", lambda *_: flags.append(os.environ["LDFLAGS"]))
    monkeypatch.setattr(set_up, "unmet_requirements", list)
    monkeypatch.setattr(set_up, "probe", lambda _: subprocess.CompletedProcess([], 0))
    set_up.install_alfworld()
    assert flags == ["-L/opt/lib -s"]


def torchvision_wheel(folder: Path, version: str, source: str) -> Path:
    """Writes an installable torchvision whose `transforms.v2` imports what the given source does."""
    wheel = folder / f"torchvision-{version}-py3-none-any.whl"
    info = f"torchvision-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("torchvision/__init__.py", source)
        archive.writestr("torchvision/extension.py", "import torch\n\n\ndef _has_ops():\n    return False\n")
        archive.writestr("torchvision/transforms/__init__.py", "")
        archive.writestr("torchvision/transforms/v2.py", "")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torchvision\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that sees this one's packages but its torchvision, and can neither change nor remove them."""
    folder = tmp_path_factory.mktemp("set_up")
    seen = folder / "seen"
    seen.mkdir()
    for package in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not package.name.startswith("torchvision") and package.suffix != ".pth":
            (seen / package.name).symlink_to(package)
    subprocess.run([sys.executable, "-m", "venv", str(folder / ".venv")], check=True, timeout=120)
    (packages,) = (folder / ".venv").glob("lib/python*/site-packages")
    (packages / "seen.pth").write_text(f"{seen}\n")
    return folder / ".venv"


@pytest.fixture
def packages(set_up: ModuleType, environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the environment keeps its packages, no torchvision among them. Pip finds what is in ``wheels`` only."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setattr(set_up, "VENV", environment)
    monkeypatch.setattr(set_up, "VENV_PYTHON", environment / "bin" / "python")
    monkeypatch.setattr(set_up, "LOG", environment / "set-up.log")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (packages,) = environment.glob("lib/python*/site-packages")
    yield packages
    for left in packages.glob("torchvision*"):
        shutil.rmtree(left)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "stays"), [(WORKS, True), (BROKEN, False)])
def test_only_a_torchvision_that_does_not_work_is_removed(
    set_up: ModuleType, packages: Path, tmp_path: Path, source: str, stays: bool
) -> None:
    set_up.pip_or_stop("install", str(torchvision_wheel(tmp_path, "0.0.1", source)))
    for _ in range(2):
        # The second time there is nothing to do.
        set_up.remove_broken_torchvision()
        assert (packages / "torchvision").exists() is stays
        assert set_up.probe("import torch").returncode == 0


@pytest.mark.slow
def test_a_torchvision_that_was_built_for_cuda_is_made_to_import(
    set_up: ModuleType, packages: Path, tmp_path: Path
) -> None:
    torchvision_wheel(tmp_path / "wheels", set_up.TORCHVISION, NEEDS_CUDA)
    set_up.install_torchvision()
    assert set_up.probe("import torchvision.transforms.v2").returncode == 0
    extension = packages / "torchvision" / "extension.py"
    written = extension.read_text()
    set_up.install_torchvision()
    set_up.define_operator_schemas()
    assert extension.read_text() == written


@pytest.mark.slow
def test_a_build_for_cpus_is_preferred_and_a_working_torchvision_is_left_alone(
    set_up: ModuleType, packages: Path, tmp_path: Path
) -> None:
    torchvision_wheel(tmp_path / "wheels", set_up.TORCHVISION, BROKEN)
    torchvision_wheel(tmp_path / "wheels", f"{set_up.TORCHVISION}+cpu", WORKS)
    set_up.install_torchvision()
    assert (packages / f"torchvision-{set_up.TORCHVISION}+cpu.dist-info").exists()
    (tmp_path / "wheels" / f"torchvision-{set_up.TORCHVISION}-py3-none-any.whl").unlink()
    set_up.install_torchvision()
    assert (packages / f"torchvision-{set_up.TORCHVISION}+cpu.dist-info").exists()


@pytest.mark.slow
@pytest.mark.parametrize("offered", [False, True])
def test_a_torchvision_that_cannot_be_had_does_not_end_the_set_up(
    set_up: ModuleType, packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], offered: bool
) -> None:
    if offered:
        torchvision_wheel(tmp_path / "wheels", set_up.TORCHVISION, BROKEN)
    set_up.install_torchvision()
    assert not (packages / "torchvision").exists()
    said = capsys.readouterr().out
    assert ("removing torchvision" if offered else "cannot be had") in said


def test_failing_pip_stops_with_the_end_of_its_output(
    set_up: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(set_up, "ROOT", tmp_path)
    monkeypatch.setattr(set_up, "VENV_PYTHON", Path(sys.executable))
    monkeypatch.setattr(set_up, "LOG", tmp_path / "set-up.log")
    with pytest.raises(set_up.SetUpError, match="no-such-folder"):
        set_up.pip_or_stop("install", "--no-index", "--no-deps", "./no-such-folder")


def test_a_tree_that_was_unpacked_without_its_links_is_said_in_words(
    set_up: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As zip programs without links, and git on file systems without them, leave it.
    for room in ("actors", "shared"):
        (tmp_path / room).mkdir()
        (tmp_path / "gflowvlm").mkdir(exist_ok=True)
        (tmp_path / "gflowvlm" / room).write_text(f"../{room}")
    monkeypatch.setattr(set_up, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["set_up.py", "--engine", "none"])
    assert set_up.main() == 2
    assert "gflowvlm/actors is a file and not a link to the folder actors/" in capsys.readouterr().err
    assert not (tmp_path / ".venv").exists()
    set_up.ROOT = ROOT
    set_up.check_links()
