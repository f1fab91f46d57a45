"""The GPU check at shapes that a CPU passes, with nothing installed but what a GPU machine may have."""

import json
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import gpu_parts
import pytest
import torch
from gpu_check import NEEDED, RESERVE_S, main
from gpu_parts import Add
from gpu_shapes import SHAPES, Shape, make_config, make_inputs
from packaging.requirements import Requirement
from transformers import AutoModelForImageTextToText

ROOT = Path(__file__).resolve().parents[2]


def packages_with(names: set[str]) -> set[str]:
    """Returns packages with all that they need, extras aside."""
    found: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        found.add(name.lower())
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        requirements = (Requirement(need) for need in needs)
        wanted = {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}
        waiting |= {each for each in wanted if each.lower() not in found}
    return found


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages like that of a machine where nothing else is installed than what the check names."""
    folder = tmp_path_factory.mktemp("packages")
    for name in packages_with(set(NEEDED.values())):
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        for entry in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / entry).exists():
                (folder / entry).symlink_to(Path(str(found.locate_file(entry))))
    assert not {"ray", "vllm", "gymnasium", "pandas", "gflowvlm"} & {path.name for path in folder.iterdir()}
    return folder


def check(packages: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # Without the site module there are no installed packages beside those of the folder.
    return subprocess.run(
        [sys.executable, "-S", str(ROOT / "scripts" / "gpu_check.py"), "--out", str(out), *options],
        cwd=out.parent,
        env={"PATH": "/usr/bin:/bin", "HOME": str(out.parent), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_it_measures_all_parts_without_ray_vllm_or_an_installation(packages: Path, tmp_path: Path) -> None:
    done = check(packages, tmp_path / "out", "--shapes", "tiny", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    parts = {part["part"]: part for part in content["parts"]}
    assert list(parts) == ["build", "head", "learner", "memory plan", "plain"]
    assert content["device"]["product_tflops"] > 0
    assert parts["head"]["difference"] < 1e-5
    assert parts["head"]["gradient_difference"] < 0.02
    # bfloat16: shared prompts and positions on several axes at most round otherwise.
    assert parts["learner"]["difference"] < 0.05
    assert parts["learner"]["updated"] == 1.0
    assert parts["memory plan"]["peak_gib"] > parts["memory plan"]["weights_gib"] > 0
    for name in ("learner", "plain"):
        assert parts[name]["tokens_per_s"] > 0
        assert 0 < parts[name]["share_of_peak"] < 1
    table = (tmp_path / "out" / "gpu_check.txt").read_text().splitlines()
    assert len(table) == 1 + len(parts)


def test_what_was_measured_before_the_limit_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(shape: Shape, clock: object, rate: float, checkpointing: bool, folder: Path, add: Add) -> None:
        add(shape.name, "build", {"seconds": 1.5})
        time.sleep(60)

    monkeypatch.setattr(gpu_parts, "check_shape", slow)
    options = ["--shapes", "tiny", "--device", "cpu", "--out", str(tmp_path), "--limit-s", f"{RESERVE_S + 3:g}"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *options])
    assert main() == 1
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert [part["part"] for part in parts] == ["build", "limit"]
    assert "why_not" in parts[1]
    assert "without figures: all limit" in capsys.readouterr().out


def test_a_part_that_fails_says_why_and_the_next_one_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object) -> dict[str, Any]:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(gpu_parts, "measure_learner", too_large)
    parts: dict[str, dict[str, Any]] = {}
    clock = gpu_parts.Clock(torch.device("cpu"), deadline=time.monotonic() + 60)
    gpu_parts.check_shape(
        SHAPES["tiny"], clock, 1.0, True, tmp_path, lambda shape, name, figures: parts.update({name: figures})
    )
    assert parts["learner"] == {"why_not": "out of memory"}
    assert parts["plain"]["seconds"] > 0


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("gpu_check.find_spec", lambda name: None if name in ("peft", "PIL") else object())
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert main() == 2
    assert capsys.readouterr().out == "gpu_check: not installed here: peft, pillow (pip install peft pillow)\n"


def test_a_machine_without_a_gpu_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert main() == 2
    assert capsys.readouterr().out == "gpu_check: torch sees no GPU here; --shapes tiny runs on a CPU\n"


@pytest.mark.parametrize(("name", "billions"), [("3b", 3.75), ("7b", 8.29)])
def test_the_shapes_are_as_large_as_the_published_models(name: str, billions: float, tmp_path: Path) -> None:
    shape = SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(make_config(shape, make_inputs(shape, tmp_path).tokenizer))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
