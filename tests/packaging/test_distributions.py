"""What the wheel and the source distribution hold, whichever way the tree was got."""

import importlib.metadata as metadata
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

import gflowvlm
from tests.packaging.builds import (
    PACKAGE,
    ROOMS,
    ROOT,
    build_editable,
    build_sdist,
    build_wheel,
    copy_tree,
    fresh_environment,
    run_in,
)


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel by name, without the record of their hashes."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith(".dist-info/RECORD")}


def test_no_other_distribution_owns_our_name() -> None:
    assert set(metadata.packages_distributions().get(PACKAGE, [])) <= {"gflowvlm"}


def test_our_package_comes_from_this_checkout() -> None:
    assert Path(str(gflowvlm.__file__)).parent == ROOT / PACKAGE


def test_wheel_holds_sources_and_data_and_nothing_else(wheel: Path) -> None:
    files = contents(wheel)
    (header,) = [text.decode() for name, text in files.items() if name.endswith(".dist-info/METADATA")]
    (entry_points,) = [text.decode() for name, text in files.items() if name.endswith(".dist-info/entry_points.txt")]
    assert "gflowvlm = gflowvlm.cli.main:main" in entry_points
    assert "License-Expression: Apache-2.0" in header
    assert re.search(r"^Requires-Python: >=3\.11$", header, re.MULTILINE)
    assert any(name.endswith("/licenses/LICENSE") for name in files)
    shipped = {name for name in files if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in shipped} == {PACKAGE}
    of_rooms = {
        f"{PACKAGE}/{file.relative_to(ROOT)}"
        for folder in ROOMS
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    own = {str(file.relative_to(ROOT)) for file in (ROOT / PACKAGE).iterdir() if file.is_file()}
    assert shipped == of_rooms | own


def test_a_source_distribution_holds_no_links_and_gives_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    for name in ("tree", "sdist", "unpacked", "wheel"):
        (tmp_path / name).mkdir()
    copy_tree(tmp_path / "tree")
    (tmp_path / "tree" / "tests").mkdir()
    (tmp_path / "tree" / "tests" / "test_stray.py").touch()
    with tarfile.open(build_sdist(tmp_path / "tree", tmp_path / "sdist")) as archive:
        assert not [member.name for member in archive.getmembers() if not (member.isfile() or member.isdir())]
        assert not [name for name in archive.getnames() if "/tests" in name]
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert contents(build_wheel(source, tmp_path / "wheel")) == contents(wheel)


def test_an_editable_install_is_the_tree_itself(tmp_path: Path) -> None:
    for name in ("tree", "wheel", "elsewhere"):
        (tmp_path / name).mkdir()
    copy_tree(tmp_path / "tree")
    fresh_environment(tmp_path / "environment", build_editable(tmp_path / "tree", tmp_path / "wheel"))
    python = str(tmp_path / "environment" / "bin" / "python")
    code = "import gflowvlm.envs.registry as r; print(r.__file__)"
    found = run_in(tmp_path / "elsewhere", python, "-c", code, PYTHONPATH="")
    assert Path(found.strip()).resolve() == tmp_path / "tree" / "envs" / "registry.py"
    told = run_in(tmp_path / "elsewhere", str(tmp_path / "environment" / "bin" / "gflowvlm"), "presets", PYTHONPATH="")
    assert "numberline-tiny" in told


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_git_keeps_the_links_and_an_archive_of_it_holds_the_same_package(tmp_path: Path) -> None:
    listed = run_in(ROOT, "git", "ls-files", "--stage", PACKAGE).splitlines()
    links = {line.split("\t")[1] for line in listed if line.startswith("120000 ")}
    assert links == {f"{PACKAGE}/{room}" for room in ROOMS}
    tar = subprocess.run(["git", "archive", "HEAD", PACKAGE, *ROOMS], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "x", "-C", str(tmp_path)], input=tar, check=True)
    for room in ROOMS:
        assert (tmp_path / PACKAGE / room).resolve() == tmp_path / room, room
