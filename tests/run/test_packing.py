"""What travels to a cluster, and what never does."""

import subprocess
import sys

import pytest

from gflowvlm.cluster.launch.installation import installation
from gflowvlm.run.packing import MAX_MIB, PACKAGE, pack, travelling_files
from gflowvlm.shared.errors import UserError

ROOMS = ("cluster", "envs", "run")


@pytest.fixture
def tree(tmp_path):
    """A source tree with all that lies around in one."""
    root = tmp_path / "tree"
    for file in (
        "gflowvlm/__init__.py",
        *(f"{room}/module.py" for room in ROOMS),
        "run/pretrained/tiny/model.safetensors",
        "run/presets/tiny.yaml",
        "cluster/__pycache__/module.cpython-311.pyc",
        "cluster/stray.pyc",
        "cluster/runs/r1/trajectories/0.parquet",
        "cluster/.cache/x",
        "cluster/.env",
        "cluster/own/pyvenv.cfg",
        "cluster/own/lib/site.py",
        "tests/test_module.py",
        ".git/config",
        ".venv/bin/python",
        "runs/r2/config.yaml",
        "secrets.txt",
    ):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("x")
    for room in ROOMS:
        (root / PACKAGE / room).symlink_to(f"../{room}")
    (root / "envs" / "link.py").symlink_to(root / "secrets.txt")
    (root / "envs" / "elsewhere").symlink_to(root / ".git")
    return root


def test_packages_and_their_data_travel_and_nothing_else(tree, tmp_path):
    pack(tree, tmp_path / "target")
    found = {str(path.relative_to(tmp_path / "target")) for path in (tmp_path / "target").rglob("*") if path.is_file()}
    assert found == {
        "gflowvlm/__init__.py",
        *(f"gflowvlm/{room}/module.py" for room in ROOMS),
        "gflowvlm/run/pretrained/tiny/model.safetensors",
        "gflowvlm/run/presets/tiny.yaml",
    }


def test_too_much_is_one_line_that_names_the_largest_files(tree, tmp_path):
    (tree / "cluster" / "weights.bin").write_bytes(b"0" * 2**20)
    with pytest.raises(UserError, match=r"at most 0.5 may; largest: gflowvlm/cluster/weights.bin \(1.0 MiB\)"):
        pack(tree, tmp_path / "target", limit_mib=0.5)
    assert not (tmp_path / "target").exists()


def test_this_tree_is_well_below_the_limit_and_runs_where_it_arrives(tmp_path):
    assert pack(installation(), tmp_path) < MAX_MIB / 4
    done = subprocess.run(
        [sys.executable, "-m", "gflowvlm.cli.main", "presets"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "numberline-tiny" in done.stdout, done.stderr
    assert all(path.parts[0] == PACKAGE for path in travelling_files(installation()))
