"""Set-up: what `make` decides to do, which engine it picks, and the repair of a torchvision that does not work."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORKING_OPS = "def nms(boxes, scores, threshold):\n    return scores\n"
# Fails the way the CUDA build does next to a CPU torch.
BROKEN_OPS = 'raise RuntimeError("operator torchvision::nms does not exist")\n'


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


def torchvision_wheel(folder: Path, ops: str) -> Path:
    """Writes an installable torchvision whose `ops` module is the given source."""
    wheel = folder / "torchvision-0.0.1-py3-none-any.whl"
    info = "torchvision-0.0.1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("torchvision/__init__.py", "from torchvision import ops\n")
        archive.writestr("torchvision/ops.py", ops)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.0.1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.mark.slow
@pytest.mark.parametrize(("ops", "stays"), [(WORKING_OPS, True), (BROKEN_OPS, False)])
def test_only_a_torchvision_that_does_not_work_is_removed(
    set_up: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ops: str, stays: bool
) -> None:
    environment = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=120)
    (packages,) = environment.glob("lib/python*/site-packages")
    # The new environment sees this one's torch and can neither change nor remove it.
    (packages / "torch.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    monkeypatch.setattr(set_up, "VENV", environment)
    monkeypatch.setattr(set_up, "VENV_PYTHON", environment / "bin" / "python")
    monkeypatch.setattr(set_up, "LOG", environment / "set-up.log")
    set_up.pip_or_stop("install", "--no-index", str(torchvision_wheel(tmp_path, ops)))
    set_up.remove_broken_torchvision()
    assert (packages / "torchvision").exists() is stays
    assert set_up.probe("import torch").returncode == 0
    # A second call finds nothing to do.
    set_up.remove_broken_torchvision()
    assert (packages / "torchvision").exists() is stays


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
